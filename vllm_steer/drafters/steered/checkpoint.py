"""The checkpoint format: save, load and validate `steering/`, merge an adapter into its drafter.

DIR/config.json, model.safetensors, ...   the drafter (absent in an adapter)
DIR/steering/config.json                  SteeringConfig
DIR/steering/model.safetensors            fuse.*, norm.*, project.*
DIR/steering/golden.safetensors           states [4, 3H] and the deltas [4, L, F] they must give; metadata: the layers
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer, refuse_used
from vllm_steer.drafters.models import drafter_shape, read_model_config
from vllm_steer.drafters.safe_tensors import read_tensors
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair
from vllm_steer.drafters.steered.module import Steering

FOLDER = "steering"
OLD = ".steering-old"  # the folder being replaced, for the moment it takes
FILES = ("config.json", "model.safetensors", "golden.safetensors")
MARKER = "vllm_steer"  # key in the drafter's config.json: "this directory has a steering folder"
GOLDEN_ROWS = 4
GOLDEN_TOLERANCE = 1e-4  # relative to the largest delta; float32 on any machine is far inside it
GOLDEN_FLOOR = 1e-3  # what counts as the largest delta when all are smaller: an untrained steering has none


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """Local directory of a checkpoint: itself when it is one, else the hub repository's `steering/` files.

    Raises SteeringError when it is neither a directory nor a repository that can be fetched.
    """
    try:
        path = Path(source).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name too long; the home of an unknown user
        raise SteeringError(f"{source}: not a usable path ({error}): give a directory or a hub id OWNER/NAME") from None
    if is_directory:
        return path
    if exists:
        raise SteeringError(f"{source} is a file: give the directory that has the {FOLDER}/ folder")
    looks_local = path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1
    if looks_local:
        raise SteeringError(
            f"{source}: no such directory; give a directory with a {FOLDER}/ folder, or a hub id OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[f"{FOLDER}/*"]))
    except Exception as error:  # huggingface_hub raises a dozen unrelated types; all mean "could not fetch"
        raise SteeringError(
            f"{source}: not a local directory, and its {FOLDER}/ folder could not be fetched from the hub "
            f"({type(error).__name__}: {error}): check the name, the network, or HF_HUB_OFFLINE"
        ) from error


def has_steering(directory: str | Path) -> bool:
    """Whether a local directory carries a `steering/` folder."""
    return (Path(directory) / FOLDER).is_dir()


def has_drafter(directory: str | Path) -> bool:
    """Whether a local directory holds a draft model; a steered checkpoint without one is an adapter."""
    return (Path(directory) / "config.json").is_file()


def golden_states(config: SteeringConfig) -> Tensor:
    """The fixed random states [4, 3H] float32 whose deltas a checkpoint records."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(GOLDEN_ROWS, 3 * config.target.hidden_size, generator=generator)


@torch.no_grad()
def save(directory: str | Path, steering: Steering) -> Path:
    """Write `directory/steering/`, whole or not at all: an error leaves what was there.

    Weights keep their dtype; the golden deltas are computed in float32 from the weights as stored. (A kill between
    the two renames at the end leaves the old folder under the name .steering-old, and nothing half-written.)
    Raises SteeringError for weights that are not finite, OSError naming the folder when it cannot be written.
    """
    directory = Path(directory)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in steering.state_dict().items()}
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise SteeringError(f"tensor {bad[0]} has values that are not finite: not saved")
    check = Steering(steering.config)
    check.load_state_dict(weights)
    states = golden_states(steering.config)
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=directory))
        (temporary / "config.json").write_text(json.dumps(steering.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(weights, temporary / "model.safetensors")
        golden = {"states": states, "deltas": check(states).contiguous()}
        save_file(golden, temporary / "golden.safetensors", metadata={"layers": _layers(steering.config)})
        temporary.chmod(0o755)  # mkdtemp and safetensors write for the owner alone; servers run as somebody else
        for name in FILES:
            (temporary / name).chmod(0o644)
        _swap(temporary, directory / FOLDER, directory / OLD)
    except (OSError, SafetensorError) as error:  # neither says where when the disk is full
        raise OSError(f"cannot write {directory / FOLDER}: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory / FOLDER


def _swap(new: Path, final: Path, old: Path) -> None:
    """Put `new` in the place of `final`, which comes back if that fails."""
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if old.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def mark(directory: str | Path) -> None:
    """Note in the drafter's config.json that a `steering/` folder belongs to it (a hub copy may lose the folder)."""
    path = Path(directory) / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw[MARKER] = {"steering": FOLDER}
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def load(directory: str | Path) -> Steering:
    """Read and check `directory/steering/`: float32 weights on the CPU.

    Raises SteeringError for anything missing, extra, corrupt, of the wrong shape or type, not finite, or
    whose deltas differ from the recorded golden ones.
    """
    directory = Path(directory)
    folder = directory / FOLDER
    if not folder.is_dir():
        raise SteeringError(_no_folder(directory))
    _refuse_pickles(folder)
    for name in FILES:
        own_file(folder / name, directory)
    config = SteeringConfig.read(folder / "config.json")
    try:
        steering = Steering(config, device="meta")
    except (RuntimeError, TypeError):  # torch cannot count so many elements
        sizes = "hidden_size, intermediate_size or rank"  # not their values: thousands of digits, in a fuzzed file
        raise SteeringError(f"{folder / 'config.json'}: {sizes} is beyond any model; copy the file again") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in steering.state_dict().items()}
    weights = read_tensors(folder / "model.safetensors", wanted)
    # Copies: what safetensors hands out is the file itself, and whoever writes to it would change a running server.
    steering.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in weights.items()}, assign=True)
    _check_golden(folder / "golden.safetensors", steering)
    return steering.requires_grad_(False)


def load_steering(source: str | Path, revision: str | None = None) -> Steering:
    """`load` from a directory or, at `revision`, from a hub id."""
    return load(resolve(source, revision))


def load_for(directory: str | Path, target: Any, drafter: Any) -> Steering:
    """`load`, then check it against the transformers configs of the target and the drafter it will run with."""
    steering = load(directory)
    check_pair(steering.config, target, drafter)
    return steering


def merge_adapter(adapter: str | Path, drafter: str | Path, output: str | Path) -> Path:
    """Write the full directory: the base drafter's files and the adapter's `steering/`.

    Raises SteeringError if the drafter's shape is not the one the adapter was trained for, or if the output exists.
    """
    adapter, output = resolve(adapter), Path(output)
    refuse_used(output)
    steering = load(adapter)
    drafter = Path(drafter)
    if not has_drafter(drafter):
        raise SteeringError(f"{drafter} has no config.json: give the base drafter's local directory")
    have, want = drafter_shape(steering.config.drafter.name, read_model_config(drafter)), steering.config.drafter
    if have != want:
        raise SteeringError(f"{drafter} is {have}, the adapter is for {want}: give the drafter it was trained with")
    with filling(output):
        save(output, steering)  # first, so that the drafter never exists without it
        copy_files(drafter, output)
        mark(output)
    return output


@contextmanager
def filling(output: Path) -> Iterator[None]:
    """Make the new directory `output` and let the block fill it; after any error nothing of it is left.

    Raises SteeringError naming the directory when a file cannot be read or written, a full disk for one.
    """
    with only_writer(output.parent / f".{output.name}.lock", str(output)):
        refuse_used(output)  # checked again: another process may have been faster
        try:
            output.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException as error:
            shutil.rmtree(output, ignore_errors=True)
            if isinstance(error, (OSError, SafetensorError)):
                raise SteeringError(f"{output} cannot be written ({error}): nothing of it was kept") from error
            raise


def copy_files(source: Path, output: Path, wanted: Callable[[Path], bool] = lambda item: True) -> None:
    """Copy the files of a model directory, none of which may be a link that leads out of it."""
    for item in sorted(source.iterdir()):
        if item.is_file() and wanted(item):
            shutil.copyfile(own_file(item, source), output / item.name)  # not its mode: the source may be read-only


def own_file(path: Path, directory: Path) -> Path:
    """`path` if it is a plain file inside `directory`, or absent; in the hub's cache files are links to its blobs.

    A directory from elsewhere could otherwise have any file of this machine copied and published, by a link to it.
    Raises SteeringError for a link that leads out, a pipe or a device.
    """
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # REPOSITORY/snapshots/REVISION; blobs of the repository, or of all of them
        allowed += [(place / "blobs").resolve() for place in home.parents[1:3]]
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:
        raise SteeringError(f"{path} is a link that leads nowhere ({error}): copy the file itself there") from None
    if not any(real.is_relative_to(place) for place in allowed):
        raise SteeringError(f"{path} is a link out of {directory}, to {real}: copy the file itself there")
    if real.exists() and not real.is_file():
        raise SteeringError(f"{path} is not a plain file: copy it again")
    return path


def _no_folder(directory: Path) -> str:
    if directory.is_file():
        return f"{directory} is a file: give the directory that has the {FOLDER}/ folder"
    if not directory.is_dir():
        return f"{directory}: no such directory; give one that has a {FOLDER}/ folder"
    if directory.name == FOLDER:
        return f"{directory} is the {FOLDER}/ folder itself: give the directory it is in, {directory.parent}"
    if (directory / OLD).is_dir():
        return f"{directory} has no {FOLDER}/ folder, a save was killed there: rename its {OLD}/ to {FOLDER}/"
    return f"{directory} has no {FOLDER}/ folder: it is not a steered checkpoint or adapter; train one, or import one"


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}:
            raise SteeringError(
                f"{path} is a pickle; only safetensors are loaded. Convert a published SD² checkpoint with "
                "`vllm-steer import`, or delete the file"
            )
        if path.name not in FILES:
            raise SteeringError(f"{path}: unknown file; {FOLDER}/ holds {', '.join(FILES)} and nothing else")


def _layers(config: SteeringConfig) -> str:
    """Which layers are read and steered, which neither shapes nor deltas can tell."""
    return f"target {list(config.target_layer_ids)}, drafter {list(config.steered_layers)}"


@torch.no_grad()
def _check_golden(path: Path, steering: Steering) -> None:
    config = steering.config
    shape = (GOLDEN_ROWS, config.num_steered, config.drafter.intermediate_size)
    golden = read_tensors(path, {"states": (GOLDEN_ROWS, 3 * config.target.hidden_size), "deltas": shape})
    with safe_open(path, framework="pt") as file:
        layers = (file.metadata() or {}).get("layers", _layers(config))  # absent: saved before it was recorded
    if layers != _layers(config):
        raise SteeringError(
            f"{path} was recorded for layers {layers}, config.json names {_layers(config)}: copy both files again"
        )
    found = steering(golden["states"].float())
    error = (found - golden["deltas"].float()).abs().max().item()
    allowed = GOLDEN_TOLERANCE * max(GOLDEN_FLOOR, golden["deltas"].float().abs().max().item())
    if not error <= allowed:
        raise SteeringError(
            f"{path}: the weights give deltas that differ from the recorded ones by {error:.3g} "
            f"(allowed {allowed:.1g}): weights and golden file belong to different checkpoints; copy both again"
        )
