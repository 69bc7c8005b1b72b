"""What keeps a result from being written is found before the first step; `check` refuses what cannot be served."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import VOCAB, folder, make_tokenizer, options  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

from vllm_steer import cli
from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.models import require_loadable
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.training import trainer, writing

VICUNA = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("the training had begun"))


@pytest.mark.parametrize("mode", ["joint", "distill"])
def test_sampling_values_without_do_sample(folder: Path, tmp_path: Path, mode: str) -> None:  # noqa: F811
    """transformers loads such a generation config and refuses to save it: Vicuna's and Llama 2's are of that kind."""
    shutil.copytree(folder / "drafter", tmp_path / "drafter")
    text = json.dumps(VICUNA, indent=1)
    (tmp_path / "drafter/generation_config.json").write_text(text)
    trainer.train(options(folder, tmp_path / "out", mode=mode, drafter=str(tmp_path / "drafter")))
    assert (tmp_path / "out/generation_config.json").read_text() == text
    require_loadable(tmp_path / "out")


def test_a_drafter_without_a_generation_config_gets_none(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(folder / "drafter", tmp_path / "drafter")
    (tmp_path / "drafter/generation_config.json").unlink()
    trainer.train(options(folder, tmp_path / "out", mode="distill", drafter=str(tmp_path / "drafter")))
    assert not (tmp_path / "out/generation_config.json").exists()


def test_what_cannot_be_saved_is_found_first(folder: Path, tmp_path: Path, monkeypatch, no_step) -> None:  # noqa: F811
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not this tokenizer")

    monkeypatch.setattr(type(make_tokenizer(["a"])), "save_pretrained", refuse)
    with pytest.raises(SteeringError, match=r"could not be written to .*out \(ValueError: not this tokenizer\): mend"):
        trainer.train(options(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("free", "refused"), [(10_000, True), (10**12, False)])
def test_a_small_disk_is_found_first(folder: Path, tmp_path: Path, monkeypatch, free: int, refused: bool) -> None:  # noqa: F811
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage(free, 0, free))
    if refused:
        with pytest.raises(SteeringError, match="GB free, one checkpoint and the result take .* make room"):
            trainer.train(options(folder, tmp_path / "out"))
    else:
        trainer.train(options(folder, tmp_path / "out"))


def test_distilling_a_steered_drafter_makes_a_plain_one(folder: Path, tmp_path: Path, caplog) -> None:  # noqa: F811
    trainer.train(options(folder, tmp_path / "steered"))
    assert checkpoint.MARKER in json.loads((tmp_path / "steered/config.json").read_text())
    steered = dict(drafter=str(tmp_path / "steered"))
    trainer.train(options(folder, tmp_path / "plain", mode="distill", **steered))
    assert "its steering is left out: the result is a plain drafter" in caplog.text
    assert checkpoint.MARKER not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not checkpoint.has_steering(tmp_path / "plain")
    trainer.train(options(folder, tmp_path / "joint", **steered))
    assert "its steering is not trained further, a new one is" in caplog.text
    assert checkpoint.MARKER in json.loads((tmp_path / "joint/config.json").read_text())
    with pytest.raises(SteeringError, match="is a steered checkpoint, and --mode steer makes an adapter"):
        trainer.train(options(folder, tmp_path / "adapter", mode="steer", **steered))


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_tokenizer_larger_than_the_embeddings(folder: Path, tmp_path: Path, role: str) -> None:  # noqa: F811
    small = dict(target="target", drafter="drafter")
    for name in small:
        shutil.copytree(folder / name, tmp_path / name)
        make_tokenizer([f"w{i}" for i in range(1, VOCAB)] + ["more"]).save_pretrained(tmp_path / name)
        if name != role:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            model.resize_token_embeddings(VOCAB + 1)
            model.save_pretrained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in small}
    with pytest.raises(
        SteeringError, match=f"token 'more' of the tokenizer is id 40, and .*{role} has embeddings .* 39"
    ):
        trainer.train(options(folder, tmp_path / "out", **paths))


# --- check -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("whole") / "out"
    trainer.train(options(folder, path))
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path, max_shard_size="20KB")
    (path / "model.safetensors").unlink()
    checkpoint.mark(path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def without_a_tensor(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    index = directory / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    lost = next(name for name in names if "down_proj" in name)
    shard = directory / names[lost]
    save_file({key: value for key, value in load_file(shard).items() if key != lost}, shard, {"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: v for key, v in names.items() if key != lost}}))


def another_width(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


FAULTS = {
    "no weights": (lambda d: [p.unlink() for p in d.glob("model*")], "has a config.json and no weights"),
    "a shard gone": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "names model-00002.*, which is not there"),
    "a shard cut": (lambda d: cut(sorted(d.glob("*.safetensors"))[0]), "model-00001.* is damaged"),
    "a shard empty": (lambda d: sorted(d.glob("*.safetensors"))[0].write_bytes(b""), "model-00001.* is damaged"),
    "the index damaged": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "index.json is damaged"),
    "a tensor gone": (without_a_tensor, "lacks 1 of its model's tensors, .*down_proj"),
    "other shapes": (another_width, "do not load|drafter has intermediate_size=64"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_refuses_what_cannot_be_served(whole: Path, tmp_path: Path, name: str, capsys) -> None:
    damage, sentence = FAULTS[name]
    shutil.copytree(whole, tmp_path / "copy")
    assert cli.main(["check", str(tmp_path / "copy")]) == 0
    damage(tmp_path / "copy")
    capsys.readouterr()
    assert cli.main(["check", str(tmp_path / "copy")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vllm-steer: error: ")
    with pytest.raises(SteeringError, match=sentence):
        raise SteeringError(error)
