"""Files that were cut: each is refused in a sentence, whatever was lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damage import GOLDEN, copy_of, cuts, engine_config
from safetensors import SafetensorError

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.provenance import fingerprint
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.import_sd2 import import_published
from vllm_steer.serving.plan import Plan


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

    spoiled = copy_of(pair.steered, tmp_path / "spoiled")
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
    spoiled = copy_of(pair.drafter, tmp_path / "spoiled")
    index = spoiled / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys("abc", "model.safetensors")}))
    for _ in cuts(index):
        with pytest.raises(SteeringError, match=f"cannot read {index}"):
            fingerprint(spoiled)
    assert fingerprint(spoiled) == fingerprint(pair.drafter)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_weight_index_of_junk(pair, tmp_path: Path, text: str) -> None:
    spoiled = copy_of(pair.drafter, tmp_path / "spoiled")
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
