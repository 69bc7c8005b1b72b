"""The checkpoint format: save, load and validate `steering/`, attach an adapter, import the published layout.

DIR/config.json, model.safetensors, ...   the drafter (absent in an adapter)
DIR/steering/config.json                  SteeringConfig
DIR/steering/model.safetensors            fuse.*, norm.*, project.*
DIR/steering/golden.safetensors           states [4, 3H] and the deltas [4, L, F] they must give
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_steer.config import SteeringConfig, SteeringError, check_pair
from vllm_steer.steering import Steering

FOLDER = "steering"
FILES = ("config.json", "model.safetensors", "golden.safetensors")
MARKER = "vllm_steer"  # key in the drafter's config.json: "this directory has a steering folder"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GOLDEN_ROWS = 4
GOLDEN_TOLERANCE = 1e-4  # relative to the largest delta; float32 on any machine is far inside it


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """Local directory of a checkpoint: itself when it is one, else the hub repository's `steering/` files.

    Raises SteeringError when it is neither a directory nor a repository that can be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    looks_local = (
        path.exists() or path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1
    )
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


def golden_states(config: SteeringConfig) -> Tensor:
    """The fixed random states [4, 3H] float32 whose deltas a checkpoint records."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(GOLDEN_ROWS, 3 * config.target.hidden_size, generator=generator)


@torch.no_grad()
def save(directory: str | Path, steering: Steering) -> Path:
    """Write `directory/steering/` so that a kill at any moment leaves either the old folder or the new one.

    Weights keep their dtype; the golden deltas are computed in float32 from the weights as stored.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in steering.state_dict().items()}
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise SteeringError(f"tensor {bad[0]} has values that are not finite: not saved")
    check = Steering(steering.config)
    check.load_state_dict(weights)
    states = golden_states(steering.config)
    temporary = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=directory))
    try:
        (temporary / "config.json").write_text(json.dumps(steering.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(weights, temporary / "model.safetensors")
        save_file({"states": states, "deltas": check(states).contiguous()}, temporary / "golden.safetensors")
        os.chmod(temporary, 0o755)
        final = directory / FOLDER
        old = directory / f".{FOLDER}-old"
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


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
    folder = Path(directory) / FOLDER
    if not folder.is_dir():
        raise SteeringError(f"{directory} has no {FOLDER}/ folder: it is not a steered checkpoint or adapter")
    _refuse_pickles(folder)
    config = SteeringConfig.read(folder / "config.json")
    steering = Steering(config, device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in steering.state_dict().items()}
    weights = _read_tensors(folder / "model.safetensors", wanted)
    steering.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
    _check_golden(folder / "golden.safetensors", steering)
    return steering.requires_grad_(False)


def load_for(directory: str | Path, target: Any, drafter: Any) -> Steering:
    """`load`, then check it against the transformers configs of the target and the drafter it will run with."""
    steering = load(directory)
    check_pair(steering.config, target, drafter)
    return steering


def merge_adapter(adapter: str | Path, drafter: str | Path, output: str | Path) -> Path:
    """Write the full directory: the base drafter's files and the adapter's `steering/`.

    Raises SteeringError if the drafter is not the shape the adapter was made for, or the output exists.
    """
    from transformers import AutoConfig

    adapter, output = resolve(adapter), Path(output)
    if output.exists() and any(output.iterdir()):
        raise SteeringError(f"{output} exists and is not empty: give a new directory")
    steering = load(adapter)
    drafter = Path(drafter)
    if not (drafter / "config.json").is_file():
        raise SteeringError(f"{drafter} has no config.json: give the base drafter's local directory")
    from vllm_steer.config import drafter_shape

    hf_config = AutoConfig.from_pretrained(drafter)
    have, want = drafter_shape(steering.config.drafter.name, hf_config), steering.config.drafter
    if have != want:
        raise SteeringError(f"{drafter} is {have}, the adapter is for {want}: give the drafter it was trained with")
    output.mkdir(parents=True, exist_ok=True)
    for item in sorted(drafter.iterdir()):
        if item.is_file():
            shutil.copy2(item, output / item.name)
    save(output, steering)
    mark(output)
    return output


def _refuse_pickles(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}:
            raise SteeringError(
                f"{path} is a pickle; only safetensors are loaded. Convert a published SD² checkpoint with "
                "`vllm-steer import`, or delete the file"
            )
        if path.name not in FILES:
            raise SteeringError(f"{path}: unknown file; {FOLDER}/ holds {', '.join(FILES)} and nothing else")


def _read_tensors(path: Path, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(set(wanted) - names):
                raise SteeringError(f"{path}: tensor {name!r} is missing; needed are {', '.join(sorted(wanted))}")
            for name in sorted(names - set(wanted)):
                raise SteeringError(f"{path}: unknown tensor {name!r}; allowed are {', '.join(sorted(wanted))}")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except FileNotFoundError:
        raise SteeringError(f"{path} is missing: copy the whole {FOLDER}/ folder again") from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, SteeringError):
            raise
        raise SteeringError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from None
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name]:
            raise SteeringError(
                f"{path}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {list(wanted[name])}: "
                "the two files belong to different checkpoints"
            )
        if tensor.dtype not in FLOATS:
            raise SteeringError(f"{path}: tensor {name!r} is {tensor.dtype}, allowed are float32, bfloat16, float16")
        if not torch.isfinite(tensor).all():
            raise SteeringError(f"{path}: tensor {name!r} has NaN or infinite values: the checkpoint is damaged")
    return tensors


@torch.no_grad()
def _check_golden(path: Path, steering: Steering) -> None:
    config = steering.config
    shape = (GOLDEN_ROWS, config.num_steered, config.drafter.intermediate_size)
    golden = _read_tensors(path, {"states": (GOLDEN_ROWS, 3 * config.target.hidden_size), "deltas": shape})
    found = steering(golden["states"].float())
    error = (found - golden["deltas"].float()).abs().max().item()
    scale = max(1.0, golden["deltas"].abs().max().item())
    if not error <= GOLDEN_TOLERANCE * scale:
        raise SteeringError(
            f"{path}: the weights give deltas that differ from the recorded ones by {error:.3g} "
            f"(allowed {GOLDEN_TOLERANCE * scale:.1g}): weights and golden file belong to different checkpoints"
        )


# --- the layout the authors publish -------------------------------------------------------------------------

_SOURCE_STEERING = {
    "guidance_embd_layer.orig.weight": "fuse.weight",
    "guidance_embd_layer.orig.bias": "fuse.bias",
    "latent_mod_prep.norm.weight": "norm.weight",
    "latent_mod_prep.norm.bias": "norm.bias",
    "latent_mod_prep.w_guide.weight": "project.weight",
}


def import_published(source: str | Path, drafter: str | Path, target: str | Path, output: str | Path) -> Path:
    """Convert a published SD² checkpoint (config.json + pytorch_model.bin) to a steered directory.

    Args:
        source: the published directory. The pickle is read with `weights_only=True`, here and nowhere else.
        drafter: base drafter directory: its config and tokenizer are taken, its weights are not.
        target: target directory, for its shape.
        output: new directory; a steered drafter, its fine-tuned weights in model.safetensors.
    Raises:
        SteeringError: a key has no place, a shape does not fit, or the method is not the merged injection.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_steer.config import drafter_shape, target_shape

    source, drafter, target, output = Path(source), Path(drafter), Path(target), Path(output)
    if output.exists() and any(output.iterdir()):
        raise SteeringError(f"{output} exists and is not empty: give a new directory")
    published = _read_published_config(source / "config.json")
    state = _read_pickle(source / "pytorch_model.bin")
    drafter_config = AutoConfig.from_pretrained(drafter)
    shape = drafter_shape(published.get("drafter", str(drafter)), drafter_config)
    d_layer = published.get("d_layer", "all")
    steered = tuple(range(shape.num_hidden_layers)) if d_layer == "all" else tuple(sorted(d_layer))
    config = SteeringConfig(
        target=target_shape(published.get("verifier", str(target)), AutoConfig.from_pretrained(target)),
        drafter=shape,
        target_layer_ids=tuple(sorted(published["v_layer"])),
        steered_layers=steered,
        draft_length=published.get("ngram"),
        provenance={"imported_from": source.name, "published_config": published},
    )
    base, own = _split_published(state, steered)
    steering = Steering(config)
    _load_exact(steering, own, source)
    model = AutoModelForCausalLM.from_config(drafter_config)
    _load_exact(model, base, source)
    output.mkdir(parents=True, exist_ok=True)
    model.to(next(iter(base.values())).dtype).save_pretrained(output)
    for item in sorted(drafter.iterdir()):  # tokenizer, chat template, generation config
        if (
            item.is_file()
            and item.suffix not in {".safetensors", ".bin", ".gguf"}
            and not (output / item.name).exists()
        ):
            if not item.name.endswith(".index.json"):
                shutil.copy2(item, output / item.name)
    save(output, steering)
    mark(output)
    return output


def _read_published_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SteeringError(f"cannot read {path} ({error}): give the published checkpoint's directory") from None
    if not isinstance(raw, dict) or "v_layer" not in raw:
        raise SteeringError(f"{path} has no 'v_layer': it is not a published SD² checkpoint")
    if raw.get("method") != "guided-drafter" or raw.get("guide_method") != "merged":
        raise SteeringError(
            f"{path}: method {raw.get('method')!r} with guide_method {raw.get('guide_method')!r}; only "
            "'guided-drafter' with 'merged' adds deltas inside the MLPs and can be served"
        )
    return raw


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SteeringError(f"{path} is missing: give the published checkpoint's directory") from None
    except Exception as error:  # torch raises pickle, zip and runtime errors alike
        raise SteeringError(f"{path} is not a plain state dict ({error}): refused") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SteeringError(f"{path} is not a plain state dict of tensors: refused")
    return state


def _split_published(state: dict[str, Tensor], steered: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Drafter weights under their own names, and steering weights under ours; every source key has a place."""
    wrapped = {f"model.layers.{i}.l.": f"model.layers.{i}." for i in steered}
    base: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in _SOURCE_STEERING:
            own[_SOURCE_STEERING[key]] = tensor
        elif key.startswith("d_base."):
            name = key.removeprefix("d_base.")
            for old, new in wrapped.items():
                name = name.replace(old, new) if name.startswith(old) else name
            base[name] = tensor
        else:
            raise SteeringError(f"source key {key!r} has no place in a steered drafter: nothing was written")
    return base, own


def _load_exact(module: torch.nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    wanted = module.state_dict()
    tied = {"lm_head.weight"} if getattr(getattr(module, "config", None), "tie_word_embeddings", False) else set()
    missing = sorted(set(wanted) - set(weights) - tied)
    extra = sorted(set(weights) - set(wanted))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which fits nowhere"
        raise SteeringError(f"{source} {what}: wrong base drafter, or not a complete checkpoint")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise SteeringError(
                f"{source}: {name!r} has shape {list(tensor.shape)}, this pair needs {list(wanted[name].shape)}: "
                "give the target and base drafter it was trained with"
            )
        if not torch.isfinite(tensor).all():
            raise SteeringError(f"{source}: {name!r} has NaN or infinite values")
    if tied and "lm_head.weight" in weights:
        embed = weights.get("model.embed_tokens.weight")
        if embed is None or not torch.equal(embed, weights["lm_head.weight"]):
            raise SteeringError(f"{source}: lm_head.weight differs from the embedding its config ties it to")
    module.load_state_dict(weights, strict=False)
