"""Code, links and paths in files of others: nothing is run, and nothing outside is read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import GOLDEN, copy_of, engine_config

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.provenance import fingerprint
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.import_sd2 import import_published
from vllm_steer.serving.plan import PLAN, Plan


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
    spoiled = copy_of(pair.steered, tmp_path / "spoiled")
    plant(spoiled / "steering" / name)
    with pytest.raises(SteeringError, match=f"{spoiled}/steering/{name}"):
        checkpoint.load(spoiled)
    with pytest.raises(ValueError, match=f"{spoiled}/steering/{name}"):
        engine_config(pair.target, spoiled)


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

    for base, steering in ((pair.steered, None), (pair.drafter, adapter)):
        spoiled = copy_of(base, tmp_path / f"spoiled-{base.name}")
        (spoiled / "model.safetensors").unlink()
        plant(spoiled / "pytorch_model.bin")
        assert Plan.of(engine_config(pair.target, spoiled, steering)) is not None
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
    base, proof = copy_of(pair.drafter, tmp_path / "base"), tmp_path / "executed"
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

    config = engine_config(pair.target, pair.steered)
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
    spoiled = copy_of(pair.drafter, tmp_path / "spoiled")
    shutil.copy(spoiled / "model.safetensors", tmp_path / "outside.safetensors")
    (spoiled / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SteeringError, match=f"index.json names {name!r}, which is no file beside it"):
        fingerprint(spoiled)


@pytest.mark.parametrize("name", ["steering", *(f"steering/{name}" for name in checkpoint.FILES)])
def test_links_out_of_a_checkpoint(pair, tmp_path: Path, name: str) -> None:
    spoiled = copy_of(pair.steered, tmp_path / "spoiled")
    outside = tmp_path / "outside"
    shutil.move(spoiled / name, outside)
    (spoiled / name).symlink_to(outside)
    with pytest.raises(SteeringError, match=f"steering/.* is a link out of {spoiled}, to {outside}.*copy the file"):
        checkpoint.load(spoiled)
    with pytest.raises(ValueError, match="is a link out of"):
        engine_config(pair.target, spoiled)


def test_links_within_a_checkpoint_and_to_one(pair, tmp_path: Path) -> None:
    spoiled = copy_of(pair.steered, tmp_path / "spoiled")
    shutil.move(spoiled / "steering/config.json", spoiled / "moved.json")
    (spoiled / "steering/config.json").symlink_to("../moved.json")
    (tmp_path / "latest").symlink_to("spoiled")
    checkpoint.load(tmp_path / "latest")


@pytest.mark.parametrize("blobs", ["models--o--n/blobs", "blobs"])
def test_links_of_the_hubs_cache(pair, adapter: Path, tmp_path: Path, blobs: str) -> None:
    """There every file is a link into the repository's blobs, or into those of all repositories."""
    snapshot = copy_of(pair.drafter, tmp_path / "models--o--n/snapshots/0123")
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
    base, golden = copy_of(pair.drafter, tmp_path / "base"), copy_of(GOLDEN / "base_drafter", tmp_path / "golden")
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
    spoiled = copy_of(pair.steered, tmp_path / "spoiled")
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
