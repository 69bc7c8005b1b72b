"""Import of the layout in which the authors of SD² publish their checkpoints: config.json + pytorch_model.bin.

The state dict holds the fine-tuned drafter under `d_base.` (each steered decoder layer is wrapped, hence
`layers.N.l.*`) and the steering under two names of its own. Every source key must have a place here.
"""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import refuse_used
from vllm_steer.drafters.models import drafter_shape, read_model_config, target_shape
from vllm_steer.drafters.safe_tensors import FLOATS
from vllm_steer.drafters.steered.checkpoint import copy_files, filling, has_drafter, mark, save
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering

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
    from transformers import AutoModelForCausalLM

    source, drafter, output = Path(source), Path(drafter), Path(output)
    refuse_used(output)
    if not has_drafter(drafter):
        raise SteeringError(f"{drafter} has no config.json: give the base drafter's local directory")
    drafter_config = read_model_config(drafter)
    config = _convert_config(source, drafter, drafter_config, target)
    base, own = _split_published(_read_pickle(source / "pytorch_model.bin"), config.steered_layers)
    steering = Steering(config)
    _load_exact(steering, own, source)
    dtypes = (tensor.dtype for tensor in base.values() if tensor.dtype in FLOATS)  # others are refused below
    dtype = reduce(torch.promote_types, dtypes, torch.float16)
    model = AutoModelForCausalLM.from_config(drafter_config, dtype=dtype)  # not config.dtype: it may be narrower
    _load_exact(model, base, source)
    with filling(output):
        save(output, steering)  # first, so that the drafter never exists without it
        model.save_pretrained(output)
        copy_files(drafter, output, _beside_weights)
        mark(output)
    return output


def _beside_weights(item: Path) -> bool:
    """Whether a file of the base drafter is still right: tokenizer, chat template, generation config."""
    weights = item.suffix in {".safetensors", ".bin", ".gguf"} or item.name.endswith(".index.json")
    return item.name != "config.json" and not weights


def _convert_config(source: Path, drafter: Path, drafter_config: Any, target: str | Path) -> SteeringConfig:
    """Layer ids keep their order, which is that of the weights; SteeringConfig rejects any other than ascending."""
    path = source / "config.json"
    published = _read_published_config(path)
    shape = drafter_shape(str(published.get("drafter", drafter)), drafter_config)
    d_layer = published.get("d_layer", "all")
    steered = list(range(shape.num_hidden_layers)) if d_layer == "all" else d_layer
    for key, value in (("v_layer", published["v_layer"]), ("d_layer", steered)):
        if not isinstance(value, list):
            raise SteeringError(f"{path}: {key} is {value!r}, allowed is a list of layer ids")
    try:
        return SteeringConfig(
            target=target_shape(str(published.get("verifier", target)), read_model_config(target)),
            drafter=shape,
            target_layer_ids=tuple(published["v_layer"]),
            steered_layers=tuple(steered),
            draft_length=published.get("ngram"),
            provenance={"imported_from": source.resolve().name, "published_config": published},
        )
    except SteeringError as error:
        raise SteeringError(f"{path}, with target {target} and drafter {drafter}: {error}") from None


def _read_published_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
    except Exception as error:  # torch raises pickle, zip and runtime errors alike, and advises weights_only=False
        raise SteeringError(
            f"{path} is not a plain state dict of tensors ({type(error).__name__}): it is damaged, or holds code, "
            "which was not run; copy it again from its source"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        raise SteeringError(
            f"{path} is not a plain state dict of tensors: give the published checkpoint, not a training one"
        )
    return state


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with its values at hand: a pickle may hold sparse, quantised and empty (meta) ones."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


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
        if tensor.dtype not in FLOATS:
            raise SteeringError(f"{source}: {name!r} is {tensor.dtype}, allowed are float32, bfloat16, float16")
        if not torch.isfinite(tensor).all():
            raise SteeringError(f"{source}: {name!r} has NaN or infinite values: the checkpoint is damaged")
    if tied and "lm_head.weight" in weights:
        embed = weights.get("model.embed_tokens.weight")
        if embed is None or not torch.equal(embed, weights["lm_head.weight"]):
            raise SteeringError(f"{source}: lm_head.weight differs from the embedding its config ties it to")
    module.load_state_dict(weights, strict=False)
