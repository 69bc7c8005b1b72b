"""Reading safetensors files that somebody else wrote: every name, shape and type is compared before a value is used."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_steer.common.errors import SteeringError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def read_tensors(
    path: Path, wanted: dict[str, tuple[int, ...]], types: dict[str, tuple[torch.dtype, ...]] | None = None
) -> dict[str, Tensor]:
    """Exactly the tensors `wanted`, by name and shape, as they are stored; floating ones must be finite.

    `types` says which dtypes a tensor may have where that is not FLOATS. Raises SteeringError naming the first thing
    that is not so.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(set(wanted) - names):
                raise SteeringError(f"{path}: tensor {name!r} is missing; needed are {', '.join(sorted(wanted))}")
            for name in sorted(names - set(wanted)):
                raise SteeringError(f"{path}: unknown tensor {name!r}; allowed are {', '.join(sorted(wanted))}")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except FileNotFoundError:
        raise SteeringError(f"{path} is missing: copy the whole {path.parent.name}/ folder again") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # torch's: too large to be mapped
        if isinstance(error, SteeringError):
            raise
        raise SteeringError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from None
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name]:
            raise SteeringError(
                f"{path}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {list(wanted[name])}: "
                "the two files belong to different checkpoints"
            )
        if tensor.dtype not in (allowed := (types or {}).get(name, FLOATS)):
            kinds = ", ".join(str(each).removeprefix("torch.") for each in allowed)
            raise SteeringError(f"{path}: tensor {name!r} is {tensor.dtype}, allowed are {kinds}")
        if not torch.isfinite(tensor).all():
            raise SteeringError(
                f"{path}: tensor {name!r} has NaN or infinite values: the checkpoint is damaged, copy it again"
            )
    return tensors
