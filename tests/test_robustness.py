"""Damaged, fuzzed and hostile files: each ends in its sentence, quickly; nothing is run, left half-made or left out.

Faults with one expected sentence each are in test_checkpoint.py, test_config.py, test_published.py and test_plan.py.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import make_pair
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_config import raw as valid_config
from torch import nn

import vllm_steer
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.provenance import fingerprint
from vllm_steer.drafters.models import DrafterShape, TargetShape, read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.import_sd2 import import_published
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.serving.plan import PLAN, Plan

PARTS = [n / 10 for n in range(10)]  # 0 %, 10 %, ... 90 %
SECONDS = 1.0  # of processor time, for refusing a file of a few kilobytes
GOLDEN = Path(__file__).parent / "golden/tiny_qwen3"
fuzz = settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
fewer = settings(fuzz, max_examples=400)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", rank=4)


@pytest.fixture(scope="module")
def adapter(pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    checkpoint.save(directory, checkpoint.load(pair[2]))
    return directory


@pytest.fixture
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM waits two seconds before it reads a bad config.json again."""
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda seconds: None)


def engine_config(target: Path, drafter: Path, adapter: Path | None = None) -> Any:
    """What a server start does before any engine process."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(target),
        speculative_config={"model": str(drafter), "num_speculative_tokens": 3},
        additional_config={"vllm_steer": {"adapter": str(adapter)}} if adapter else {},
        dtype="float32",
        max_model_len=256,
    ).create_engine_config()


def copy_of(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def cuts(path: Path) -> Iterator[None]:
    """The file cut at every tenth of its length, then whole again."""
    whole = path.read_bytes()
    for part in PARTS:
        path.write_bytes(whole[: int(len(whole) * part)])
        yield
    path.write_bytes(whole)


# --- truncation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", checkpoint.FILES)
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_steering_files_cut(pair, adapter: Path, tmp_path: Path, kind: str, file: str) -> None:
    target, drafter, steered = pair
    spoiled = copy_of(adapter if kind == "adapter" else steered, tmp_path / "spoiled")
    start = lambda: engine_config(target, *((drafter, spoiled) if kind == "adapter" else (spoiled,)))  # noqa: E731
    path = spoiled / "steering" / file
    for _ in cuts(path):
        with pytest.raises(SteeringError) as caught:
            checkpoint.load(spoiled)
        assert str(path) in str(caught.value) and "again" in str(caught.value)
        with pytest.raises(ValueError) as caught:  # pydantic wraps a SteeringError, word for word
            start()
        assert str(path) in str(caught.value)
    assert Plan.of(start()) is not None


def test_drafter_config_cut(pair, adapter: Path, tmp_path: Path, awake: None) -> None:
    target, drafter, steered = pair
    spoiled, base = copy_of(steered, tmp_path / "spoiled"), copy_of(drafter, tmp_path / "base")
    for _ in cuts(spoiled / "config.json"):
        with pytest.raises((OSError, ValueError), match="spoiled/config.json"):  # vLLM's own error
            engine_config(target, spoiled)
        with pytest.raises(SteeringError, match="cannot read the model config of .*spoiled"):
            read_model_config(spoiled)
        with pytest.raises(SteeringError, match="cannot read the config.json of .*spoiled"):
            fingerprint(spoiled)
    for _ in cuts(base / "config.json"):
        with pytest.raises(SteeringError, match="cannot read the model config of .*base"):
            checkpoint.merge_adapter(adapter, base, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_drafter_weights_cut(pair, tmp_path: Path) -> None:
    """The front end leaves them to vLLM, which refuses them; none passes for the weights it was cut from."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    spoiled = copy_of(pair[2], tmp_path / "spoiled")
    weights, seen = str(spoiled / "model.safetensors"), {fingerprint(spoiled)}
    for number, _ in enumerate(cuts(spoiled / "model.safetensors"), 2):
        seen.add(fingerprint(spoiled))
        assert len(seen) == number
        with pytest.raises(SafetensorError):
            list(safetensors_weights_iterator([weights], use_tqdm_on_load=False))


def test_other_drafter_files_cut_change_nothing(pair, tmp_path: Path) -> None:
    target, _, steered = pair
    spoiled = copy_of(steered, tmp_path / "spoiled")
    plan = Plan.of(engine_config(target, spoiled))
    names = sorted(p.name for p in spoiled.iterdir() if p.is_file())
    assert names == ["config.json", "generation_config.json", "model.safetensors", *names[-2:]]
    for name in names[1:]:
        for _ in cuts(spoiled / name):
            assert Plan.of(engine_config(target, spoiled)) == plan is not None


def test_weight_index_cut(pair, tmp_path: Path) -> None:
    spoiled = copy_of(pair[1], tmp_path / "spoiled")
    index = spoiled / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys("abc", "model.safetensors")}))
    for _ in cuts(index):
        with pytest.raises(SteeringError, match=f"cannot read {index}"):
            fingerprint(spoiled)
    assert fingerprint(spoiled) == fingerprint(pair[1])


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_weight_index_of_junk(pair, tmp_path: Path, text: str) -> None:
    spoiled = copy_of(pair[1], tmp_path / "spoiled")
    (spoiled / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SteeringError, match="cannot read .*index.json"):
        fingerprint(spoiled)
    (spoiled / "model.safetensors.index.json").unlink()
    (spoiled / "config.json").write_text(text.replace("{}", "null"))
    if "weight_map" not in text:
        with pytest.raises(SteeringError, match="cannot read the config.json of"):
            fingerprint(spoiled)


def test_published_config_cut(tmp_path: Path) -> None:
    source = copy_of(GOLDEN, tmp_path / "published")
    for _ in cuts(source / "config.json"):
        with pytest.raises(SteeringError, match="cannot read .*published/config.json"):
            import_published(source, GOLDEN / "base_drafter", GOLDEN / "verifier", tmp_path / "out")
        assert not (tmp_path / "out").exists()


# --- fuzzed configs -----------------------------------------------------------------------------------------

VALID = valid_config()
REQUIRED = {"target", "drafter", "target_layer_ids", "steered_layers"}
SIZES = {"target": ["hidden_size", "num_hidden_layers", "vocab_size"]}
SIZES["drafter"] = [*SIZES["target"], "intermediate_size"]


def is_config(raw: Any) -> bool:
    """The format's rules written a second time, to compare the reader with."""

    def whole(value: Any, low: int = 1, high: float = float("inf")) -> bool:
        return type(value) is int and low <= value < high

    def ids(value: Any, count: int) -> bool:
        return type(value) is list and all(whole(i, 0, count) for i in value) and value == sorted(set(value)) != []

    def shape(value: Any, keys: list[str]) -> bool:
        if type(value) is not dict or set(value) != {"name", *keys} or type(value["name"]) is not str:
            return False
        printable = not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value["name"])
        return printable and all(whole(value[key]) for key in keys)

    return (
        type(raw) is dict
        and REQUIRED <= set(raw) <= set(VALID)
        and all(shape(raw[role], keys) for role, keys in SIZES.items())
        and ids(raw["target_layer_ids"], raw["target"]["num_hidden_layers"])
        and len(raw["target_layer_ids"]) == 3
        and ids(raw["steered_layers"], raw["drafter"]["num_hidden_layers"])
        and all(raw.get(key) is None or whole(raw[key]) for key in ("rank", "draft_length"))
        and whole(raw.get("format_version", 1), 1, 2)
        and all(type(raw.get(key, {})) is dict for key in ("provenance", "acceptance"))
    )


def check_reading(path: Path, text: bytes) -> str:
    """Read `text` as a config: whatever loads is valid and says what the JSON says, whatever is valid loads."""
    path.write_bytes(text)
    begin = time.process_time()
    try:
        shown = json.dumps(SteeringConfig.read(path).to_dict())
    except SteeringError as error:
        assert str(path) in str(error)
        try:
            assert not is_config(json.loads(text.decode())) or "recursion" in str(error)
        except (ValueError, RecursionError):  # no JSON at all
            pass
        return "refused"
    finally:
        assert time.process_time() - begin < SECONDS
    raw = json.loads(text)
    assert is_config(raw)
    assert json.dumps({key: json.loads(shown)[key] for key in raw}) == json.dumps(raw)  # as text: NaN is not NaN
    return "loaded"


NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, -1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.0, 1.0, 1e308, float("nan"), float("inf"), True]
)
TEXTS = st.text(max_size=8) | st.sampled_from(["1", "../../x", "/etc/passwd", "\x00", "\x1b[31m", "\ud800", "Ａ‮é"])
JUNK = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
IDS = st.lists(st.integers(-1, 9), max_size=4).map(sorted)


@st.composite
def config_texts(draw: st.DrawFn) -> bytes:
    """A valid config with one to three values dropped, added or replaced; at times doubled, deepened or no object."""
    raw: Any = deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([raw, *(value for value in raw.values() if isinstance(value, dict))]))
        key = draw(st.sampled_from(sorted(place))) if place and draw(st.integers(0, 5)) else draw(TEXTS)
        change = draw(st.sampled_from(["drop", "number", "number", "ids", "junk", "deep"]))
        if change == "drop":
            place.pop(key, None)
        else:
            values = {"number": st.integers(1, 20) | NUMBERS, "ids": IDS, "junk": JUNK, "deep": st.just("DEEP")}
            place[key] = draw(values[change])
    text = json.dumps(draw(JUNK) if draw(st.integers(0, 30)) == 0 else raw)
    if draw(st.integers(0, 5)) == 0:
        text = text.replace("{", "{" + f'"{draw(st.sampled_from(sorted(VALID)))}": {json.dumps(draw(JUNK))}, ', 1)
    depth = draw(st.sampled_from([10, 200, 990, 1000, 5000]))
    text = text.replace(
        '"DEEP"', draw(st.sampled_from(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]))
    )
    return text.encode(draw(st.sampled_from(["utf-8"] * 12 + ["utf-16", "utf-8-sig"])))


@st.composite
def config_bytes(draw: st.DrawFn) -> bytes:
    """A valid config's text with bytes cut out, put in or overwritten; at times only random bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(json.dumps(VALID).encode())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.binary(max_size=4) | st.sampled_from([b"9", b"0", b"-", b"e9", b'"', b"}", b"9" * 5000, b" "]))
        data[at : at + draw(st.integers(0, 4))] = new
    return bytes(data)


@pytest.mark.parametrize(("texts", "loaded"), [(config_texts(), 100), (config_bytes(), 10)], ids=["values", "bytes"])
def test_fuzzed_configs(tmp_path: Path, texts: st.SearchStrategy[bytes], loaded: int) -> None:
    outcomes: Counter[str] = Counter()

    @fuzz
    @given(texts)
    def run(text: bytes) -> None:
        outcomes[check_reading(tmp_path / "config.json", text)] += 1

    run()
    print(f"\n{dict(outcomes)}")
    assert outcomes["loaded"] >= loaded and outcomes["refused"] >= 500  # or the fuzzer tests one side only


def small(rank: int | None = 4) -> Steering:
    """A steering of a few hundred weights, none trivial."""
    config = SteeringConfig(
        TargetShape(**VALID["target"]), DrafterShape(**VALID["drafter"]), (1, 4, 6), (0, 2), rank, draft_length=5
    )
    torch.manual_seed(0)
    steering = Steering(config).requires_grad_(False)
    for parameter in steering.parameters():
        nn.init.normal_(parameter, std=0.5)
    return steering


def check_loading(directory: Path, expected: Steering, tolerance: float = 0.0) -> str:
    """Load: refused with one of its files named, or these weights; `tolerance` of the largest delta is allowed."""
    begin = time.process_time()
    try:
        found = checkpoint.load_for(directory, SimpleNamespace(**VALID["target"]), SimpleNamespace(**VALID["drafter"]))
    except SteeringError as error:
        assert any(word in str(error) for word in (*checkpoint.FILES, "the steering was trained for"))
        assert len(str(error)) < 5000 and "\n" not in str(error)
        return "refused"
    finally:
        assert time.process_time() - begin < SECONDS
    for key in ("target_layer_ids", "steered_layers", "rank"):
        assert getattr(found.config, key) == getattr(expected.config, key)
    if tolerance:
        states = torch.randn(16, 3 * 12, generator=torch.Generator().manual_seed(7))
        want = expected(states)
        assert (found(states) - want).abs().max() <= tolerance * want.abs().max()
    else:
        assert all(torch.equal(found.state_dict()[name], want) for name, want in expected.state_dict().items())
    return "loaded"


def test_fuzzed_configs_against_their_tensors(tmp_path: Path) -> None:
    """Whatever loads for a pair has that pair's sizes, the layers it was saved for and the weights in the file."""
    checkpoint.save(tmp_path, small())
    outcomes: Counter[str] = Counter()
    places = [(role, key) for role in SIZES for key in ("name", *SIZES[role])] + [(None, k) for k in VALID]

    @fuzz
    @given(st.lists(st.tuples(st.sampled_from(places), st.integers(1, 13) | NUMBERS | IDS | TEXTS), max_size=2))
    def run(changes: list) -> None:
        raw = json.loads(json.dumps(small_config))
        for (role, key), value in changes:
            if role is None:
                raw[key] = value
            elif isinstance(raw[role], dict):
                raw[role][key] = value
        (tmp_path / "steering/config.json").write_text(json.dumps(raw))
        outcomes[check_loading(tmp_path, expected)] += 1

    expected = checkpoint.load(tmp_path)
    small_config = json.loads((tmp_path / "steering/config.json").read_text())
    run()
    print(f"\n{dict(outcomes)}")
    assert outcomes["loaded"] >= 10 and outcomes["refused"] >= 500


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "3",
        '{"model_type": []}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "torch_dtype": "nothing"}',
        '{"model_type": "llama", "id2label": 3}',
        '{"model_type": "llama", "x": ' + "[" * 100_000 + "}",
    ],
)
def test_model_configs_that_break_transformers(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SteeringError, match=f"cannot read the model config of {tmp_path}"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("source", ["x" * 5000, "~no-such-user-here/x", "a\0b", "owner/..", "a/" + "b" * 4000])
def test_sources_that_are_no_paths(source: str) -> None:
    with pytest.raises(SteeringError):
        checkpoint.resolve(source)


# --- fuzzed tensors -----------------------------------------------------------------------------------------

LENGTHS = st.sampled_from([0, 1, 7, 10**8, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2000)
DTYPES = "F64 F32 F16 BF16 I64 I8 U8 BOOL C64 F8_E4M3 F8_E5M2 F8_E8M0 F4 X".split()
COUNTS = st.integers(-1, 200) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, None, "1"])


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def tensor_files(draw: st.DrawFn, whole: bytes) -> bytes:
    """A safetensors file with its header, header length or data changed."""
    header, data = split(whole)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(header)))
        entry = header[name] if isinstance(header[name], dict) else {}
        change = draw(st.sampled_from(["dtype", "shape", "offsets", "drop", "rename", "extra", "junk", "data", "same"]))
        if change == "dtype" and "dtype" in entry:
            entry["dtype"] = draw(st.sampled_from(DTYPES) | JUNK)
        elif change == "shape" and "shape" in entry:
            entry["shape"] = draw(st.permutations(entry["shape"]) | st.lists(COUNTS, max_size=3))
        elif change == "offsets" and "data_offsets" in entry:
            entry["data_offsets"] = draw(st.lists(COUNTS, min_size=1, max_size=3))
        elif change == "drop":
            del header[name]
        elif change == "rename":
            header[draw(st.sampled_from(sorted(header)) | TEXTS)] = header.pop(name)
        elif change == "extra":
            header[draw(TEXTS)] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        elif change == "junk":
            header[name] = draw(JUNK)
        elif change == "data":
            value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
            at = 4 * draw(st.integers(0, len(data) // 4 - 1))
            data = data[:at] + struct.pack("<f", value) + data[at + 4 :]
        if not header:
            break
    text = json.dumps(header).encode()
    length = draw(LENGTHS) if draw(st.integers(0, 4)) == 0 else len(text)
    data = data[draw(st.sampled_from([0] * 8 + [1, 4])) :] + b"\0" * draw(st.sampled_from([0] * 8 + [1, 4]))
    return struct.pack("<Q", length) + text + data


@pytest.mark.parametrize("file", checkpoint.FILES[1:])
def test_fuzzed_tensors(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path, small())
    path, outcomes, expected = tmp_path / "steering" / file, Counter(), checkpoint.load(tmp_path)
    whole = path.read_bytes()

    @fewer
    @given(tensor_files(whole))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        outcomes[check_loading(tmp_path, expected)] += 1

    run()
    print(f"\n{dict(outcomes)}")
    assert outcomes["loaded"] >= 10 and outcomes["refused"] >= 200


def test_a_header_may_claim_any_size(tmp_path: Path) -> None:
    """A file that is all hole: as large as its header says, and nothing of that is read or allocated."""
    checkpoint.save(tmp_path, small())
    path, size = tmp_path / "steering/model.safetensors", 2**36
    header, _ = split(path.read_bytes())
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in header}
    header["fuse.bias"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    begin = time.process_time()
    with pytest.raises(SteeringError, match="model.safetensors.*(has shape|unable to mmap)"):  # by the machine's size
        checkpoint.load(tmp_path)
    assert time.process_time() - begin < SECONDS


def test_a_file_that_is_written_to_later_changes_no_loaded_weights(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small())
    path, loaded = tmp_path / "steering/model.safetensors", checkpoint.load(tmp_path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(loaded.state_dict()[name], want) for name, want in small().state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4])
def test_flipped_bits_in_the_weights(tmp_path: Path, dtype: torch.dtype, rank: int | None) -> None:
    """The golden deltas find a flipped bit, or it moves no delta of other states by a thousandth of the largest."""
    checkpoint.save(tmp_path, small(rank).to(dtype))
    path, expected = tmp_path / "steering/model.safetensors", checkpoint.load(tmp_path)
    header, data = split(path.read_bytes())
    start, width, outcomes = path.stat().st_size - len(data), dtype.itemsize, Counter()
    whole = bytearray(path.read_bytes())
    rng = torch.Generator().manual_seed(0)
    for bit in range(8 * width):
        for weight in torch.randint(len(data) // width, (12,), generator=rng).tolist():
            at = start + weight * width + bit // 8
            whole[at] ^= 1 << bit % 8
            path.write_bytes(whole)
            place = "exponent's top" if bit == 8 * width - 2 else "sign or exponent" if bit >= 8 * width - 9 else "rest"
            outcomes[place, check_loading(tmp_path, expected, tolerance=1e-3)] += 1
            whole[at] ^= 1 << bit % 8
    print(f"\n{dict(outcomes)}")
    assert outcomes["exponent's top", "loaded"] == 0
    assert outcomes["sign or exponent", "refused"] > 4 * outcomes["sign or exponent", "loaded"]


@pytest.mark.parametrize("file", checkpoint.FILES)
def test_flipped_bits_in_every_byte_of_a_header_or_config(tmp_path: Path, file: str) -> None:
    """Free text and the draft length (of which only a warning hangs) may change; sizes, layers and weights may not."""
    checkpoint.save(tmp_path, small())
    path, expected, outcomes = tmp_path / "steering" / file, checkpoint.load(tmp_path), Counter()
    whole = bytearray(path.read_bytes())
    end = len(whole) if file == "config.json" else len(whole) - len(split(bytes(whole))[1])
    for at in range(end):
        for bit in (0, 1 + at % 7):  # the lowest makes another digit of a digit
            whole[at] ^= 1 << bit
            path.write_bytes(whole)
            outcomes[check_loading(tmp_path, expected)] += 1
            whole[at] ^= 1 << bit
    print(f"\n{dict(outcomes)}")
    assert outcomes["refused"] > 5 * outcomes["loaded"]


def test_checkpoints_that_do_not_record_their_layers_load(tmp_path: Path) -> None:
    """Those saved before the golden file had metadata; with it, another layer id in config.json is found."""
    from safetensors.torch import save_file

    checkpoint.save(tmp_path, small())
    config = tmp_path / "steering/config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"target_layer_ids": [1, 4, 7]}))
    with pytest.raises(SteeringError, match=r"layers target \[1, 4, 6\], .* config.json names target \[1, 4, 7\]"):
        checkpoint.load(tmp_path)
    config.write_text(text)
    save_file(load_file(tmp_path / "steering/golden.safetensors"), tmp_path / "steering/golden.safetensors")
    checkpoint.load(tmp_path)


# --- a full disk --------------------------------------------------------------------------------------------

CHILD = """
import contextlib, io, json, os, resource, shutil, sys
from pathlib import Path
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.cli import main
jobs, limits, adapter = json.load(sys.stdin)
steering = checkpoint.load(adapter)
answers = []
for limit in limits:
    for verb, *args, output in jobs:
        said, code = io.StringIO(), None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with contextlib.redirect_stderr(said):
                if verb == "save":
                    code = checkpoint.save(output, steering) and 0
                else:
                    code = main([verb, *args, "--output", output])
        except Exception as error:
            said.write(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        left = sorted(str(p) for p in Path(output).rglob("*")) if os.path.exists(output) else None
        if code == 0 and limit != -1:
            shutil.rmtree(output)
        answers.append([verb, limit, output, code, said.getvalue(), left])
json.dump(answers, open(sys.argv[1], "w"))
"""


def test_a_full_disk_is_told_and_leaves_nothing_that_loads(pair, adapter: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit, for limits that stop at each file in turn: a write fails like on a full disk."""
    published = [str(GOLDEN), "--drafter", str(GOLDEN / "base_drafter"), "--target", str(GOLDEN / "verifier")]
    jobs = [
        ["merge", str(adapter), "--drafter", str(pair[1]), str(tmp_path / "merged")],
        ["import", *published, str(tmp_path / "imported")],
        ["save", str(tmp_path / "saved")],
    ]
    written = [*pair[2].rglob("*"), *GOLDEN.glob("*/*.*"), *adapter.rglob("*")]
    sizes = sorted({path.stat().st_size for path in written if path.is_file()})
    limits = [0, *(size - 1 for size in sizes), -1]  # -1: none
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "answers.json")],
        input=json.dumps([jobs, limits, str(adapter)]),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert child.returncode == 0, child.stderr
    failed: Counter[str] = Counter()
    for verb, limit, output, code, said, left in json.loads((tmp_path / "answers.json").read_text()):
        if code == 0:
            assert f"{output}/steering/config.json" in left
            continue
        failed[verb] += 1
        assert limit != -1 and output in said and "File too large" in said, said
        assert not left, f"{verb} under {limit} left {left}"
        assert code == 1 or (verb == "save" and said.startswith("OSError: cannot write"))
    assert all(failed[verb] >= 3 for verb, *_ in jobs), failed
    for name in ("merged", "imported", "saved"):
        checkpoint.load(tmp_path / name)


# --- code and paths in files --------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


PICKLES: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda value, path: torch.save(value, path),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "plain": lambda value, path: path.write_bytes(pickle.dumps(value)) and None,
    "protocol 0": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)) and None,
}


@pytest.fixture(params=PICKLES)
def plant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Writes a pickle with a payload; afterwards the payload must not have run, though it can."""
    proof, planted = tmp_path / "executed", []

    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        PICKLES[request.param]({"fuse.weight": torch.ones(2), "payload": Payload(proof)}, path)
        planted.append(path)

    yield write
    assert planted and not proof.exists()
    try:
        torch.load(shutil.copy(planted[-1], tmp_path / "control"), weights_only=False)
    except (pickle.UnpicklingError, RuntimeError):  # no file of torch's: Python's own reader takes it
        pickle.loads(planted[-1].read_bytes())
    assert proof.exists()


@pytest.mark.parametrize("name", [*checkpoint.FILES, "model.pt", "pytorch_model.bin", "x.pkl", "x.ckpt", "x.joblib"])
def test_pickles_in_the_steering_folder(pair, tmp_path: Path, plant: Callable, name: str) -> None:
    spoiled = copy_of(pair[2], tmp_path / "spoiled")
    plant(spoiled / "steering" / name)
    with pytest.raises(SteeringError, match=f"{spoiled}/steering/{name}"):
        checkpoint.load(spoiled)
    with pytest.raises(ValueError, match=f"{spoiled}/steering/{name}"):
        engine_config(pair[0], spoiled)


def test_pickles_as_published_weights(tmp_path: Path, plant: Callable) -> None:
    source = copy_of(GOLDEN, tmp_path / "published")
    plant(source / "pytorch_model.bin")
    with pytest.raises(SteeringError, match="pytorch_model.bin is not a plain state dict.*was not run"):
        import_published(source, GOLDEN / "base_drafter", GOLDEN / "verifier", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_as_drafter_weights(pair, adapter: Path, tmp_path: Path, plant: Callable) -> None:
    """The plan, a merge and a fingerprint do not open them; vLLM and transformers refuse what is in them."""
    from transformers import AutoModelForCausalLM
    from vllm.model_executor.model_loader.weight_utils import pt_weights_iterator

    for base, steering in ((pair[2], None), (pair[1], adapter)):
        spoiled = copy_of(base, tmp_path / f"spoiled-{base.name}")
        (spoiled / "model.safetensors").unlink()
        plant(spoiled / "pytorch_model.bin")
        assert Plan.of(engine_config(pair[0], spoiled, steering)) is not None
        fingerprint(spoiled)
    checkpoint.merge_adapter(adapter, spoiled, tmp_path / "merged")
    checkpoint.load(tmp_path / "merged")
    with pytest.raises(pickle.UnpicklingError):
        list(pt_weights_iterator([str(spoiled / "pytorch_model.bin")], use_tqdm_on_load=False))
    with pytest.raises((pickle.UnpicklingError, OSError, ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(spoiled)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update({3: torch.ones(2)}),
        lambda s: s.update({"d_base.model.norm.weight": torch.ones(64).to_sparse()}),
        lambda s: s.update({"d_base.model.norm.weight": torch.ones(64, device="meta")}),
        lambda s: s.update({"d_base.model.norm.weight": torch.quantize_per_tensor(torch.ones(64), 1, 0, torch.quint8)}),
        lambda s: s.update({name: tensor.to(torch.complex64) for name, tensor in s.items()}),
    ],
    ids=["a key of another type", "sparse", "without values", "quantised", "complex"],
)
def test_published_tensors_of_other_kinds(tmp_path: Path, change: Callable[[dict], None]) -> None:
    source = copy_of(GOLDEN, tmp_path / "published")
    state = torch.load(source / "pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(SteeringError, match=f"{source}.* (is not a plain state dict|is torch.complex64, allowed)"):
        import_published(source, GOLDEN / "base_drafter", GOLDEN / "verifier", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_model_is_not_run(pair, adapter: Path, tmp_path: Path, monkeypatch, known: bool) -> None:
    """transformers would ask on the terminal whether to run it: it is not let, whoever would answer."""
    base, proof = copy_of(pair[1], tmp_path / "base"), tmp_path / "executed"
    (base / "code.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\nclass C: pass\n")
    raw = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "code.C"}}
    (base / "config.json").write_text(json.dumps(raw | ({} if known else {"model_type": "of-this-author"})))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    if known:  # a class of transformers' own
        checkpoint.merge_adapter(adapter, base, tmp_path / "merged")
    else:
        with pytest.raises(SteeringError, match="cannot read the model config of .*custom code"):
            checkpoint.merge_adapter(adapter, base, tmp_path / "merged")
    assert not proof.exists()


def test_a_config_cannot_bring_its_own_plan(pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that the front end writes names where workers read the steering: not a thing for a file to say."""
    target, drafter, steered = pair
    plan = dict(getattr(engine_config(target, steered).speculative_config.draft_model_config.hf_config, PLAN))
    for number, base in enumerate((steered, drafter)):
        forged = copy_of(base, tmp_path / f"forged{number}")
        raw = json.loads((forged / "config.json").read_text())
        for value in (plan | {"source": "../../elsewhere"}, plan, 3):
            (forged / "config.json").write_text(json.dumps(raw | {PLAN: value}))
            with pytest.raises(ValueError, match=f"forged{number}/config.json has the key '{PLAN}', which only"):
                engine_config(target, forged)
    monkeypatch.setenv("STEER_DISABLE", "1")
    assert Plan.of(engine_config(target, tmp_path / "forged0")) is None


def test_the_plan_travels_with_its_config(pair) -> None:
    from vllm.config.utils import replace

    config = engine_config(pair[0], pair[2])
    plan = Plan.of(config)
    for copy in (deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config, additional_config={})):
        assert Plan.of(copy) == plan is not None


def test_the_marker_cannot_point_elsewhere(pair, tmp_path: Path) -> None:
    target, _, steered = pair
    copy = copy_of(steered, tmp_path / "copy")
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"vllm_steer": {"steering": "../../elsewhere"}}))
    assert Plan.of(engine_config(target, copy)).source == str(copy)
    shutil.rmtree(copy / "steering")
    with pytest.raises(ValueError, match="its steering/ folder is missing"):
        engine_config(target, copy)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/../../b", "absent"])
def test_a_weight_index_names_files_beside_it_only(pair, tmp_path: Path, name: str) -> None:
    spoiled = copy_of(pair[1], tmp_path / "spoiled")
    shutil.copy(spoiled / "model.safetensors", tmp_path / "outside.safetensors")
    (spoiled / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SteeringError, match=f"index.json names {name!r}, which is no file beside it"):
        fingerprint(spoiled)


@pytest.mark.parametrize("name", ["steering", *(f"steering/{name}" for name in checkpoint.FILES)])
def test_links_out_of_a_checkpoint(pair, tmp_path: Path, name: str) -> None:
    spoiled = copy_of(pair[2], tmp_path / "spoiled")
    outside = tmp_path / "outside"
    shutil.move(spoiled / name, outside)
    (spoiled / name).symlink_to(outside)
    with pytest.raises(SteeringError, match=f"steering/.* is a link out of {spoiled}, to {outside}.*copy the file"):
        checkpoint.load(spoiled)
    with pytest.raises(ValueError, match="is a link out of"):
        engine_config(pair[0], spoiled)


def test_links_within_a_checkpoint_and_to_one(pair, tmp_path: Path) -> None:
    spoiled = copy_of(pair[2], tmp_path / "spoiled")
    shutil.move(spoiled / "steering/config.json", spoiled / "moved.json")
    (spoiled / "steering/config.json").symlink_to("../moved.json")
    (tmp_path / "latest").symlink_to("spoiled")
    checkpoint.load(tmp_path / "latest")


@pytest.mark.parametrize("blobs", ["models--o--n/blobs", "blobs"])
def test_links_of_the_hubs_cache(pair, adapter: Path, tmp_path: Path, blobs: str) -> None:
    """There every file is a link into the repository's blobs, or into those of all repositories."""
    snapshot = copy_of(pair[1], tmp_path / "models--o--n/snapshots/0123")
    copy_of(adapter / "steering", snapshot / "steering")
    (tmp_path / blobs).mkdir()
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        shutil.move(path, tmp_path / blobs / str(number))
        path.symlink_to(os.path.relpath(tmp_path / blobs / str(number), path.parent))
    checkpoint.load(snapshot)
    checkpoint.merge_adapter(snapshot, snapshot, tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))


def test_merge_and_import_copy_nothing_from_outside(adapter: Path, pair, tmp_path: Path) -> None:
    """Or a directory from elsewhere could have a key of the user copied, and pushed to the hub."""
    secret = tmp_path / "secret"
    secret.write_text("a key")
    base, golden = copy_of(pair[1], tmp_path / "base"), copy_of(GOLDEN / "base_drafter", tmp_path / "golden")
    for directory in (base, golden):
        (directory / "notes.txt").symlink_to(secret)
    with pytest.raises(SteeringError, match=f"notes.txt is a link out of {base}, to {secret}"):
        checkpoint.merge_adapter(adapter, base, tmp_path / "out")
    with pytest.raises(SteeringError, match=f"notes.txt is a link out of {golden}, to {secret}"):
        import_published(GOLDEN, golden, GOLDEN / "verifier", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop"])
@pytest.mark.parametrize("name", checkpoint.FILES)
def test_files_that_are_none(pair, tmp_path: Path, kind: str, name: str) -> None:
    """Reading a pipe would wait for ever, reading /dev/zero would fill the memory."""
    spoiled = copy_of(pair[2], tmp_path / "spoiled")
    path = spoiled / "steering" / name
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    with pytest.raises(SteeringError, match=f"{path} is (not a plain file|a link)"):
        checkpoint.load(spoiled)


# --- what the sources may not do ----------------------------------------------------------------------------

SOURCES = sorted(Path(vllm_steer.__file__).parent.rglob("*.py"))
NO_IMPORT = {  # readers that run what they read, and servers
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"),
    *("socket", "_socket", "socketserver", "http.server", "xmlrpc", "wsgiref", "asyncio", "uvicorn", "hypercorn"),
    *("gunicorn", "aiohttp", "flask", "tornado", "websockets", "zmq", "grpc", "multiprocessing.connection"),
}
NO_BUILTIN = {"eval", "exec", "compile", "__import__"}
NO_METHOD = {"system", "popen", "bind", "listen", "serve_forever", "start_server", "create_server", "load_pickle"}


READS_STATE_DICTS = ("import_sd2.py", "tensor_hashes.py", "record.py")  # with weights_only=True, as `offences` checks


def offences(source: str) -> list[str]:
    """What a source does that no file of this package may: run data as code, load pickles, listen."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [name for name in names if {name, name.split(".")[0]} & NO_IMPORT or name == "torch.load"]
        if not isinstance(node, ast.Call):
            continue
        keys = {key.arg: getattr(key.value, "value", key.value) for key in node.keywords}
        called = ast.unparse(node.func)
        if called in NO_BUILTIN or (isinstance(node.func, ast.Attribute) and node.func.attr in NO_METHOD):
            found.append(called)
        if called == "torch.load" and keys.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        found += [f"{k}={keys[k]}" for k in ("trust_remote_code", "shell", "allow_pickle") if keys.get(k, False)]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_sources_run_no_data_and_listen_nowhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not offences(text)
    assert "torch.load(" not in text or path.name in READS_STATE_DICTS, "state dicts are read in these places only"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from http.server import HTTPServer",
        "import http.server as s",
        "from http import server",
        "from asyncio import start_server",
        "from torch import load",
        "def f(): import socket",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=flag)",
        "eval(x)",
        "__import__('pick' + 'le')",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "np.load(p, allow_pickle=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "s.listen(1)",
    ],
)
def test_the_source_check_finds(source: str) -> None:
    assert offences(source)
    assert not offences("import torch\nmodel.eval()\ntorch.load(p, weights_only=True)\nsubprocess.run(['git'])")
