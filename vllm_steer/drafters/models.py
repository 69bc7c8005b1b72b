"""Target and draft models: their sizes from a transformers config, and loading them with transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TargetShape:
    """The target (verifier) the steering reads its hidden states from."""

    name: str  # model id or directory it was trained against; information, not checked
    hidden_size: int  # H
    num_hidden_layers: int
    vocab_size: int


@dataclass(frozen=True)
class DrafterShape:
    """The drafter the steering writes its deltas into."""

    name: str  # for an adapter: the base drafter to attach it to
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int  # F
    vocab_size: int


def text_config(hf_config: Any) -> Any:
    """The language-model part of a transformers config: multimodal ones nest it."""
    getter = getattr(hf_config, "get_text_config", None)
    return getter() if getter is not None else hf_config


def read_model_config(source: str | Path) -> Any:
    """The transformers config of a model directory or hub id. Raises SteeringError if there is none to read.

    Code that comes with a model is never run, and transformers is not let ask whether to.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # a wrong value in the file surfaces there as whatever it breaks first
        reason = " ".join(line.strip() for line in str(error).strip().split("\n")[:2])
        raise SteeringError(
            f"cannot read the model config of {source} ({reason}): give a model directory or a hub id"
        ) from None


def target_shape(name: str, hf_config: Any) -> TargetShape:
    """Sizes of a target from its transformers config. Raises SteeringError if it does not state one of them."""
    cfg = text_config(hf_config)
    return TargetShape(name, *(_size(cfg, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")))


def drafter_shape(name: str, hf_config: Any) -> DrafterShape:
    """Sizes of a drafter from its transformers config. Raises SteeringError if it does not state one of them."""
    cfg = text_config(hf_config)
    keys = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    return DrafterShape(name, *(_size(cfg, key) for key in keys))


def _size(hf_config: Any, key: str) -> int:
    value = getattr(hf_config, key, None)
    if not isinstance(value, int):
        raise SteeringError(
            f"a model of type {getattr(hf_config, 'model_type', '?')!r} has {key} {value!r}, needed is one number: "
            "choose a decoder-only model whose layers are all of one size, with gated MLPs if it is the drafter"
        )
    return value


def load_model(name: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """A causal language model. Raises SteeringError when it cannot be read."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise SteeringError(f"cannot load {name}: {error}") from error


def load_models(
    target: str, drafter: str, precision: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel, torch.dtype]:
    """The target (frozen, in `precision`), the drafter (float32), and the dtype the drafter is stored in."""
    big, small = load_model(target, precision), load_model(drafter, "auto")
    stored = small.dtype  # before the next line changes it
    return big.requires_grad_(False).eval(), small.float(), stored


def require_loadable(directory: Path) -> None:
    """Raises SteeringError unless a model directory holds all weights of its config, readable and of the right shapes.

    Quantised weights have shapes and readers of their own: of them only the files are checked.
    """
    files = weight_files(directory)
    for path in files:
        require_readable(path)
    config = read_model_config(directory)
    if getattr(text_config(config), "quantization_config", None) or getattr(config, "quantization_config", None):
        return
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises whatever the first wrong value breaks
        raise SteeringError(f"the weights of {directory} do not load ({' '.join(str(error).split())[:300]})") from None
    if missing := sorted(loaded[1]["missing_keys"]):
        raise SteeringError(
            f"{directory} lacks {len(missing)} of its model's tensors, {missing[0]} for one: copy or save it again"
        )


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory. Raises SteeringError when there are none, or one is missing."""
    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "*.bin"),
    ):
        path = directory / index
        if path.is_file():
            try:
                names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
                found = [directory / name for name in names]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise SteeringError(f"{path} is damaged ({error}): copy the checkpoint again") from None
            for file in found:
                if not file.is_file():
                    raise SteeringError(f"{path} names {file.name}, which is not there: copy the checkpoint again")
            return found
        if files := sorted(directory.glob(pattern)):
            return files
    raise SteeringError(
        f"{directory} has a config.json and no weights (*.safetensors or *.bin): it cannot be served; copy or save the "
        "whole model again"
    )


def require_readable(path: Path) -> None:
    """Raise SteeringError for a weight file that is cut or empty."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):  # checks that the header fits the file
                pass
        elif not path.stat().st_size:
            raise ValueError("it is empty")
    except (OSError, ValueError, SafetensorError) as error:
        raise SteeringError(f"{path} is damaged ({error}): copy the checkpoint again") from None
