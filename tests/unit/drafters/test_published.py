"""published.py: every key of the authors' layout has a place, their weights arrive unchanged, pickles stay harmless."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.hf import attach
from vllm_steer.drafters.steered.import_sd2 import import_published

GOLDEN = ROOT / "tests/golden/tiny_qwen3"
DRAFTER, TARGET = GOLDEN / "base_drafter", GOLDEN / "verifier"
PROJECT = "latent_mod_prep.w_guide.weight"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return torch.load(GOLDEN / "pytorch_model.bin", weights_only=True)


@pytest.fixture
def publish(tmp_path: Path, state: State) -> Callable[..., Path]:
    """Write a variant of the golden checkpoint."""

    def write(change: Callable[[State], Any] = lambda s: None, **config: Any) -> Path:
        source = tmp_path / "published"
        source.mkdir()
        raw = json.loads((GOLDEN / "config.json").read_text()) | config
        (source / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
        copy = dict(state)
        torch.save(change(copy) or copy, source / "pytorch_model.bin")
        return source

    return write


def run(source: Path, drafter: Path = DRAFTER, target: Path = TARGET) -> Path:
    return import_published(source, drafter, target, source.parent / "out")


def test_every_source_key_arrives_unchanged(publish: Callable, state: State) -> None:
    output = run(publish())
    own, base = load_file(output / "steering/model.safetensors"), load_file(output / "model.safetensors")
    tied = json.loads((output / "config.json").read_text()).get("tie_word_embeddings", False)
    for key, tensor in state.items():
        if key.startswith("d_base."):
            name = key.removeprefix("d_base.").replace(".l.", ".")
            if name == "lm_head.weight" and tied:
                name = "model.embed_tokens.weight"
            assert torch.equal(base[name], tensor), key
        else:
            assert sum(t.shape == tensor.shape and torch.equal(t, tensor) for t in own.values()) == 1, key
    assert len(own) == 5
    config = checkpoint.load(output).config
    assert (config.target_layer_ids, config.steered_layers, config.draft_length) == ((1, 4, 6), (0, 1, 2), 4)
    assert (config.target.name, config.drafter.name) == ("tiny-qwen-verifier", "tiny-qwen-drafter")
    assert config.provenance["published_config"]["lr_start"] == 0.0003
    assert checkpoint.MARKER in json.loads((output / "config.json").read_text())


def test_fine_tuned_weights_are_kept_not_the_base_ones(publish: Callable) -> None:
    ours, base = load_file(run(publish()) / "model.safetensors"), load_file(DRAFTER / "model.safetensors")
    assert any(not torch.equal(ours[name], base[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype_whatever_the_config_says(publish: Callable, tmp_path: Path, dtype) -> None:
    drafter = tmp_path / "base"
    shutil.copytree(DRAFTER, drafter)
    raw = json.loads((drafter / "config.json").read_text())
    (drafter / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    (drafter / "tokenizer.json").write_text("{}")
    (drafter / "tokenizer.json").chmod(0o444)
    source = publish(lambda s: {k: v.to(dtype) for k, v in s.items()})
    output = run(source, drafter)
    sent = torch.load(source / "pytorch_model.bin", weights_only=True)["d_base.model.norm.weight"]
    assert torch.equal(load_file(output / "model.safetensors")["model.norm.weight"], sent)
    assert (output / "tokenizer.json").read_text() == "{}"
    checkpoint.load(output)


def test_some_layers_steered(publish: Callable, state: State) -> None:
    """d_layer [0, 2]: layer 1 is not wrapped, and gives what the full one gives with its delta zeroed."""

    def drop_layer_1(s: State) -> State:
        rows = s[PROJECT].unflatten(0, (3, -1))[[0, 2]].flatten(0, 1).clone()
        return {k.replace("layers.1.l.", "layers.1."): rows if k == PROJECT else v for k, v in s.items()}

    output = run(publish(drop_layer_1, d_layer=[0, 2]))
    steering = checkpoint.load(output)
    assert steering.config.steered_layers == (0, 2)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids, states = torch.arange(8)[None], torch.randn(1, 8, 3 * 96)
    project = state[PROJECT].unflatten(0, (3, -1))
    full = torch.einsum("lfh,bth->btlf", project, steering.norm(steering.guide(states)))
    full[:, :, 1] = 0
    with torch.no_grad():
        injector = attach(model, (0, 2))
        with injector.using(steering(states)):
            found = model(ids).logits
        injector.detach()
        with attach(model, (0, 1, 2)).using(full):
            torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def rename(old: str, new: str) -> Callable[[State], None]:
    return lambda s: s.update({new: s.pop(old)})


def drop(key: str) -> Callable[[State], None]:
    return lambda s: s.__delitem__(key)


def replace(key: str, tensor: Tensor) -> Callable[[State], None]:
    return lambda s: s.update({key: tensor})


NORM = "d_base.model.norm.weight"
BAD: dict[str, tuple[Callable[[State], Any], dict[str, Any], list[str]]] = {
    "unknown key": (rename(NORM, "colour"), {}, ["'colour' has no place", "nothing was written"]),
    "unknown drafter key": (rename(NORM, "d_base.colour"), {}, ["'model.norm.weight'", "wrong base drafter"]),
    "extra drafter key": (replace("d_base.x.weight", torch.ones(2)), {}, ["has 'x.weight', which fits nowhere"]),
    "drafter key missing": (drop(NORM), {}, ["lacks 'model.norm.weight'", "not a complete"]),
    "steering key missing": (drop(PROJECT), {}, ["lacks 'project.weight'"]),
    "layer not wrapped": (
        rename("d_base.model.layers.0.l.mlp.up_proj.weight", "d_base.model.layers.0.mlp.up.weight"),
        {},
        ["lacks 'model.layers.0.mlp.up_proj.weight'"],
    ),
    "shape": (replace(NORM, torch.ones(65)), {}, ["'model.norm.weight' has shape [65]", "[64]", "it was trained with"]),
    "NaN": (replace(NORM, torch.full((64,), float("nan"))), {}, ["'model.norm.weight' has NaN"]),
    "integers": (replace(NORM, torch.ones(64, dtype=torch.int64)), {}, ["'model.norm.weight' is torch.int64"]),
    "not a tensor": (lambda s: s.update(epoch=3), {}, ["not a plain state dict of tensors"]),
    "layers of the target": (lambda s: None, {"v_layer": [1, 4, 8]}, ["config.json", "[1, 4, 8]", "0 to 7"]),
    "layers out of order": (lambda s: None, {"v_layer": [4, 1, 6]}, ["[4, 1, 6]", "ascending"]),
    "layers not a list": (lambda s: None, {"v_layer": 4}, ["v_layer is 4", "list"]),
    "no layers": (lambda s: None, {"v_layer": ...}, ["no 'v_layer'", "not a published"]),
    "layers of the drafter": (lambda s: None, {"d_layer": [0, 3]}, ["[0, 3]", "0 to 2"]),
    "layers of the drafter by name": (lambda s: None, {"d_layer": "last"}, ["d_layer is 'last'", "list"]),
    "fewer layers than wrapped": (
        lambda s: None,
        {"d_layer": [0, 1]},
        ["'project.weight' has shape [336, 96]", "[224, 96]"],
    ),
    "draft length": (lambda s: None, {"ngram": 0}, ["draft_length is 0"]),
    "other method": (lambda s: None, {"guide_method": "after"}, ["guide_method 'after'", "only", "'merged'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(publish: Callable, case: str) -> None:
    change, config, words = BAD[case]
    source = publish(change, **config)
    with pytest.raises(SteeringError) as caught:
        run(source)
    for word in words:
        assert word in str(caught.value)
    assert not (source.parent / "out").exists()


def test_wrong_directories(publish: Callable, tmp_path: Path) -> None:
    source = publish()
    for args, words in (
        ((tmp_path / "absent", DRAFTER, TARGET), "cannot read .*absent/config.json"),
        ((source, tmp_path / "absent", TARGET), "absent has no config.json: give the base drafter"),
        ((source, DRAFTER, tmp_path), "cannot read the model config"),
        ((source, DRAFTER, DRAFTER), r"0 to 2|project.weight|has shape"),  # the drafter is no target of this one
        ((source, TARGET, TARGET), "wrong base drafter|lacks|has shape"),
    ):
        with pytest.raises(SteeringError, match=words):
            import_published(*args, tmp_path / "out")
    with pytest.raises(SteeringError, match="not an empty directory"):
        import_published(source, DRAFTER, TARGET, source)
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(SteeringError, match="pytorch_model.bin is missing"):
        run(source)


class Malicious:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_a_malicious_pickle_is_refused_and_not_executed(publish: Callable, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    source = publish(lambda s: s.update(payload=Malicious(proof)))
    with pytest.raises(SteeringError, match="not a plain state dict.*holds code, which was not run"):
        run(source)
    assert not proof.exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)  # the payload does work where it is let in
    assert proof.exists()


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated_pickle(publish: Callable, part: float) -> None:
    source = publish()
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(SteeringError, match="pytorch_model.bin is not a plain state dict"):
        run(source)
