"""Another adapter for a running engine: which names lead where, and what is refused before anything changes."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_pair

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import fingerprint
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.serving import adapters


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_pair(tmp_path_factory.mktemp("adapters"), "llama")


def engine(pair: Any, root: Path | None) -> tuple[Any, Any]:
    """A part of an Injection, and of vLLM's configuration."""
    config = checkpoint.load(pair.steered).config
    taken: list[str] = []
    injection = types.SimpleNamespace(
        config=config,
        adapter="initial",
        plan=types.SimpleNamespace(source=str(pair.steered), revision=None),
        place=lambda steering: steering,
        take=lambda placed, name: taken.append(name),
        taken=taken,
    )
    own = {} if root is None else {"vllm_steer": {"adapters": str(root)}}
    draft = types.SimpleNamespace(model=str(pair.drafter), revision=None)
    spec = types.SimpleNamespace(draft_model_config=draft)
    return injection, types.SimpleNamespace(additional_config=own, speculative_config=spec)


def other(pair: Any, directory: Path, **changes: Any) -> Path:
    """An adapter with other weights."""
    config = dataclasses.replace(checkpoint.load(pair.steered).config, **changes)
    steering = Steering(config)
    torch.nn.init.normal_(steering.output.weight, std=0.01)
    checkpoint.save(directory, steering)
    return directory


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker."""
    monkeypatch.setattr(adapters, "_all_agree", lambda ready: ready)


def test_one_is_taken_over_and_the_first_one_again(pair: Any, tmp_path: Path) -> None:
    other(pair, tmp_path / "mine")
    injection, config = engine(pair, tmp_path)
    assert adapters.swap(injection, config, "mine") is None
    assert adapters.swap(injection, config, "initial") is None
    assert injection.taken == ["mine", "initial"]


def test_a_device_without_room_keeps_the_old_one(pair: Any, tmp_path: Path) -> None:
    other(pair, tmp_path / "mine")
    injection, config = engine(pair, tmp_path)

    def full(steering: Steering) -> None:
        raise RuntimeError("out of memory")

    injection.place = full
    assert adapters.swap(injection, config, "mine") == "RuntimeError: out of memory" and not injection.taken


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside", "leads out of"),
        (".", "leads out of"),
        ("/etc", "leads out of"),
        ("link", "leads out of"),
        ("none", "there is no adapter 'none' in .*; there are mine"),
        ("", "adapter is ''"),
        (3, "adapter is 3"),
        (None, "adapter is None"),
        ("a\0b", "is not a usable name"),
    ],
)
def test_names_that_lead_elsewhere(name: Any, words: str, pair: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    other(pair, root / "mine")
    other(pair, tmp_path / "outside")
    (root / "link").symlink_to(tmp_path / "outside")
    injection, config = engine(pair, root)
    with pytest.raises(SteeringError, match=words):
        adapters.find(str(root), name)
    assert adapters.swap(injection, config, name) is not None and not injection.taken


def test_nothing_may_be_loaded_unless_the_server_was_told(pair: Any) -> None:
    injection, config = engine(pair, None)
    assert "start it with --additional-config" in adapters.swap(injection, config, "mine")
    assert adapters.swap(injection, config, "initial") is None


def test_a_damaged_one_is_refused(pair: Any, tmp_path: Path) -> None:
    path = other(pair, tmp_path / "mine") / "steering"
    for name, change in (
        ("model.safetensors", lambda raw: raw[:-8]),
        ("golden.safetensors", lambda raw: raw[:-8]),
        ("config.json", lambda raw: b"{"),
    ):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(change(whole))
        injection, config = engine(pair, tmp_path)
        assert name in adapters.swap(injection, config, "mine") and not injection.taken
        (path / name).write_bytes(whole)
    weights = (path / "model.safetensors").read_bytes()
    other(pair, tmp_path / "second")
    (path / "model.safetensors").write_bytes((tmp_path / "second/steering/model.safetensors").read_bytes())
    assert "belong to different checkpoints" in adapters.swap(injection, config, "mine")
    (path / "model.safetensors").write_bytes(weights)
    assert adapters.swap(injection, config, "mine") is None


def test_another_form_needs_a_restart(pair: Any, tmp_path: Path) -> None:
    layers = checkpoint.load(pair.steered).config.steered_layers
    other(pair, tmp_path / "ranked", rank=4)
    other(pair, tmp_path / "fewer", steered_layers=layers[:1])
    injection, config = engine(pair, tmp_path)
    assert "has rank 4, the running one None: it needs a restart" in adapters.swap(injection, config, "ranked")
    assert "has steered_layers" in adapters.swap(injection, config, "fewer")
    assert not injection.taken


def test_other_models_are_refused(pair: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = str(fingerprint(pair.drafter))
    other(pair, tmp_path / "right", provenance={"identity": {"drafter": mine}})
    other(pair, tmp_path / "wrong", provenance={"identity": {"drafter": mine.replace("v2:", "v2:0")}})
    other(pair, tmp_path / "away", provenance={"identity": {"drafter": mine, "target": "v2:a:b:c"}})
    injection, config = engine(pair, tmp_path)
    assert adapters.swap(injection, config, "right") is None and "does not record" not in caplog.text
    assert "was trained for another drafter" in adapters.swap(injection, config, "wrong")
    running = {"identity": {"target": "v2:x:y:z"}}
    injection.config = dataclasses.replace(injection.config, provenance=running)
    assert "was trained for another target" in adapters.swap(injection, config, "away")
    other(pair, tmp_path / "silent")
    assert adapters.swap(injection, config, "silent") is None and "does not record" in caplog.text


def test_one_with_a_drafter_of_its_own_must_have_the_running_one(pair: Any, tmp_path: Path) -> None:
    checkpoint.merge_adapter(other(pair, tmp_path / "a"), pair.drafter, tmp_path / "root/same")
    injection, config = engine(pair, tmp_path / "root")
    assert adapters.swap(injection, config, "same") is None, "the same weights, though one config has our marker"
    config.speculative_config.draft_model_config.model = str(pair.target)
    assert "was trained for another drafter" in adapters.swap(injection, config, "same")


def test_all_workers_or_none(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other(pair, tmp_path / "mine")
    injection, config = engine(pair, tmp_path)
    monkeypatch.setattr(adapters, "_all_agree", lambda ready: False)
    assert "another worker of this engine refused" in adapters.swap(injection, config, "mine")
    assert not injection.taken


def test_the_form_is_all_that_shapes_buffers() -> None:
    """A field that comes later must be compared, or named here as one that may differ."""
    free = {"draft_length", "format_version", "provenance", "acceptance"}
    assert {f.name for f in dataclasses.fields(SteeringConfig)} == {"target", "drafter", *adapters.SAME} | free
