"""Configs that nobody wrote: each loads with the right values, or ends in a sentence, quickly."""

from __future__ import annotations

import json
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from damage import JUNK, NUMBERS, SECONDS, TEXTS, VALID, check_loading, fuzz, small
from hypothesis import given
from hypothesis import strategies as st

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig

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
