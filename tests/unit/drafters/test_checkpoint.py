"""checkpoint.py: round trips, and a sentence for everything that can be wrong with the files."""

from __future__ import annotations

import json
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_pair, random_steering, tiny_config
from safetensors.torch import load_file, save_file

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.module import Steering

TARGET = tiny_config("llama", num_hidden_layers=7)
WEIGHTS, GOLDEN, CONFIG = "model.safetensors", "golden.safetensors", "config.json"


def make(rank: int | None = None, **keys: Any) -> Steering:
    return random_steering(TARGET, tiny_config("llama"), rank, **keys)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "ckpt", make())
    return tmp_path / "ckpt"


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, rank: int | None, dtype: torch.dtype) -> None:
    steering = make(rank, provenance={"seed": 1}, acceptance={"greedy": 2.5}, draft_length=3).to(dtype)
    folder = checkpoint.save(tmp_path, steering)
    assert sorted(p.name for p in folder.iterdir()) == sorted(checkpoint.FILES)
    assert load_file(folder / WEIGHTS)["fuse.weight"].dtype == dtype
    back = checkpoint.load(tmp_path)
    assert back.config == steering.config
    for name, tensor in steering.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.float()), name
    assert not any(p.requires_grad for p in back.parameters())


def test_untrained_and_barely_trained_steering_pass_their_golden_check(tmp_path: Path) -> None:
    steering = make()
    for std in (0.0, 1e-6, 1e-3):
        torch.nn.init.normal_(steering.output.weight, std=std)
        checkpoint.save(tmp_path, steering)
        assert torch.equal(checkpoint.load(tmp_path).output.weight, steering.output.weight)


def test_files_can_be_read_by_others(saved: Path) -> None:
    for path in [saved / "steering", *(saved / "steering").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044


def test_not_finite_weights_are_not_saved(saved: Path) -> None:
    bad = make()
    bad.fuse.bias[3] = float("nan")
    with pytest.raises(SteeringError, match="fuse.bias.*not finite"):
        checkpoint.save(saved, bad)
    checkpoint.load(saved)


@pytest.mark.parametrize("step", ["save_file", "rename away", "rename in"])
def test_a_failed_save_leaves_the_old_folder(saved: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = checkpoint.load(saved)
    real, calls = Path.rename, []

    def rename(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) == {"rename away": 1, "rename in": 2}[step]:
            raise OSError("disk on fire")
        return real(self, other)

    def fail(*_args: Any) -> None:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk on fire"):
        if step == "save_file":
            patch.setattr(checkpoint, "save_file", fail)
        else:
            patch.setattr(Path, "rename", rename)
        checkpoint.save(saved, make(seed=9))
    assert torch.equal(checkpoint.load(saved).fuse.weight, before.fuse.weight)
    assert [p.name for p in saved.iterdir()] == ["steering"]
    checkpoint.save(saved, make(seed=9))
    assert not torch.equal(checkpoint.load(saved).fuse.weight, before.fuse.weight)


# --- bad input ----------------------------------------------------------------------------------------------


def edit_tensors(file: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return edit


def edit_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / CONFIG).read_text())
        change(raw)
        (folder / CONFIG).write_text(json.dumps(raw))

    return edit


def truncate(file: str, part: float) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes()[: int((folder / file).stat().st_size * part)]
    )


def put(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def with_value(name: str, value: float) -> Callable[[dict], None]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value) and None


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tensor missing": (edit_tensors(WEIGHTS, lambda t: t.pop("norm.bias")), [WEIGHTS, "'norm.bias' is missing"]),
    "tensor extra": (
        edit_tensors(WEIGHTS, lambda t: t.update(colour=torch.ones(1))),
        [WEIGHTS, "unknown tensor 'colour'", "allowed are fuse.bias"],
    ),
    "tensor NaN": (edit_tensors(WEIGHTS, with_value("fuse.weight", float("nan"))), ["'fuse.weight' has NaN", "again"]),
    "tensor infinite": (edit_tensors(WEIGHTS, with_value("norm.weight", float("inf"))), ["'norm.weight' has NaN or"]),
    "tensor integer": (
        edit_tensors(WEIGHTS, lambda t: t.update({"fuse.bias": torch.ones(64, dtype=torch.int64)})),
        ["'fuse.bias' is torch.int64", "allowed are float32"],
    ),
    "tensor float64": (
        edit_tensors(WEIGHTS, lambda t: t.update({"fuse.bias": torch.ones(64, dtype=torch.float64)})),
        ["'fuse.bias' is torch.float64", "allowed are float32"],
    ),
    "tensor shape": (
        edit_tensors(WEIGHTS, lambda t: t.update({"fuse.bias": torch.ones(65)})),
        ["'fuse.bias' has shape [65]", "[64]", "different checkpoints"],
    ),
    "low-rank weights, full-rank config": (
        edit_config(lambda raw: raw.update(rank=4)),
        [WEIGHTS, "'project.down.weight' is missing", "needed are"],
    ),
    "weights from elsewhere": (
        edit_tensors(WEIGHTS, lambda t: t["project.weight"].mul_(1.01)),
        [GOLDEN, "differ from the recorded ones", "different checkpoints", "copy both"],
    ),
    "golden deltas from elsewhere": (
        edit_tensors(GOLDEN, with_value("deltas", 0.5)),
        [GOLDEN, "differ from the recorded ones"],
    ),
    "golden NaN": (edit_tensors(GOLDEN, with_value("deltas", float("nan"))), [GOLDEN, "'deltas' has NaN"]),
    "golden shape": (
        edit_tensors(GOLDEN, lambda t: t.update(states=t["states"][:2].clone())),
        [GOLDEN, "'states' has shape [2, 192]", "[4, 192]"],
    ),
    "golden tensor missing": (edit_tensors(GOLDEN, lambda t: t.pop("states")), [GOLDEN, "'states' is missing"]),
    "golden file missing": (lambda f: (f / GOLDEN).unlink(), [GOLDEN, "is missing", "again"]),
    "weights file missing": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "is missing", "again"]),
    "config missing": (lambda f: (f / CONFIG).unlink(), ["cannot read", CONFIG]),
    "config cut": (truncate(CONFIG, 0.6), [CONFIG, "not valid JSON", "again"]),
    "config empty": (truncate(CONFIG, 0), [CONFIG, "not valid JSON"]),
    "config of bytes": (put(CONFIG, b"\xff\xfe\x00{"), [CONFIG, "not valid JSON"]),
    "config unknown key": (edit_config(lambda raw: raw.update(colour=1)), [CONFIG, "unknown key 'colour'"]),
    "config newer": (edit_config(lambda raw: raw.update(format_version=2)), ["version 2 is newer", "upgrade"]),
    "config ids": (
        edit_config(lambda raw: raw.update(target_layer_ids=[2, 3, 7])),
        [CONFIG, "target_layer_ids [2, 3, 7]", "0 to 6"],
    ),
    "config steered ids": (
        edit_config(lambda raw: raw.update(steered_layers=[0, 2])),
        [CONFIG, "steered_layers [0, 2]", "0 to 1"],
    ),
    "config of another size": (
        edit_config(lambda raw: raw["target"].update(hidden_size=72)),
        ["has shape", "config.json asks for", "different checkpoints"],
    ),
    "config of absurd size": (
        edit_config(lambda raw: raw["drafter"].update(intermediate_size=10**30)),
        [CONFIG, "beyond any model"],
    ),
    "pickle beside": (
        lambda f: torch.save({}, f / "pytorch_model.bin"),
        ["pytorch_model.bin is a pickle", "only safetensors", "vllm-steer import"],
    ),
    "pickle under a safetensors name": (
        put(WEIGHTS, pickle.dumps({"fuse.weight": [1.0]})),
        [WEIGHTS, "not a safetensors file", "again"],
    ),
    "stranger in the folder": (put("notes.txt", b"x"), ["notes.txt: unknown file", "and nothing else"]),
}
for part in (0, 0.001, 0.01, 0.5, 0.999):
    BAD[f"weights cut to {part:.1%}"] = (truncate(WEIGHTS, part), [WEIGHTS, "truncated", "again"])
    BAD[f"golden cut to {part:.1%}"] = (truncate(GOLDEN, part), [GOLDEN, "truncated", "again"])


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(saved: Path, case: str) -> None:
    spoil, words = BAD[case]
    spoil(saved / "steering")
    with pytest.raises(SteeringError) as caught:
        checkpoint.load(saved)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (".", ["no steering/ folder"]),
        ("absent", ["no such directory"]),
        ("ckpt/steering", ["is the steering/ folder itself", "ckpt"]),
        ("ckpt/steering/config.json", ["config.json is a file", "give the directory"]),
    ],
)
def test_wrong_places(saved: Path, place: str, words: list[str]) -> None:
    with pytest.raises(SteeringError) as caught:
        checkpoint.load(saved.parent / place)
    for word in [place.split("/")[-1].strip("."), *words]:
        assert word in str(caught.value)


def test_a_killed_save_is_recognised(saved: Path) -> None:
    (saved / "steering").rename(saved / checkpoint.OLD)
    with pytest.raises(SteeringError, match=r"rename its \.steering-old/"):
        checkpoint.load(saved)


def test_resolve(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.resolve(saved) == saved
    for source, words in (
        (str(saved / "absent"), "no such directory"),
        ("./absent", "no such directory"),
        ("absent", "hub id OWNER/NAME"),
        (str(saved / "steering" / CONFIG), "is a file: give the directory"),
    ):
        with pytest.raises(SteeringError, match=words):
            checkpoint.resolve(source)

    asked: list[Any] = []

    def snapshot_download(source: str, **how: Any) -> str:
        asked.append((source, how))
        if source == "owner/absent":
            raise OSError("offline")
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert checkpoint.resolve("owner/name", "v2") == saved
    assert asked == [("owner/name", {"revision": "v2", "allow_patterns": ["steering/*"]})]
    with pytest.raises(SteeringError, match=r"owner/absent: .*could not be fetched.*offline.*check the name"):
        checkpoint.resolve("owner/absent")


# --- with models --------------------------------------------------------------------------------------------


def test_load_for_checks_the_pair(saved: Path) -> None:
    checkpoint.load_for(saved, TARGET, tiny_config("llama"))
    with pytest.raises(SteeringError, match="this target has hidden_size=96"):
        checkpoint.load_for(saved, tiny_config("llama", hidden_size=96), tiny_config("llama"))


def test_adapter_and_merge(tmp_path: Path) -> None:
    _, drafter, steered = make_pair(tmp_path, "qwen3", rank=4)
    adapter, output = tmp_path / "adapter", tmp_path / "merged"
    steering = checkpoint.load(steered)
    checkpoint.save(adapter, steering)
    checkpoint.merge_adapter(adapter, drafter, output)
    assert checkpoint.has_steering(output) and not checkpoint.has_steering(drafter)
    assert sorted(p.name for p in output.iterdir()) == sorted([*(p.name for p in drafter.iterdir()), "steering"])
    for name in ("model.safetensors", "tokenizer.json"):
        assert (output / name).read_bytes() == (drafter / name).read_bytes()
    assert checkpoint.MARKER in json.loads((output / CONFIG).read_text())
    assert checkpoint.MARKER not in json.loads((drafter / CONFIG).read_text())
    for name, tensor in checkpoint.load(output).state_dict().items():
        assert torch.equal(tensor, steering.state_dict()[name])


def test_merge_refuses(tmp_path: Path) -> None:
    target, drafter, steered = make_pair(tmp_path, "qwen3", rank=4)
    for base, output, words in (
        (target, tmp_path / "new", "give the drafter it was trained with"),
        (tmp_path / "absent", tmp_path / "new", "absent has no config.json"),
        (drafter, steered, "exists and is not an empty directory"),
        (drafter, steered / CONFIG, "exists and is not an empty directory"),
    ):
        with pytest.raises(SteeringError, match=words):
            checkpoint.merge_adapter(steered, base, output)
    assert not (tmp_path / "new").exists()
