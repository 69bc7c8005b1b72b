"""What both model runners do once a draft model is loaded: build its injection, count its blocks, watch them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.telemetry.block_counter import Blocks
from vllm_steer.serving.telemetry.reporter import Reporter


def attach(vllm_config: Any, plan: Plan, model: nn.Module, device: torch.device) -> Injection:
    """Build the injection for this rank and wrap the freshly loaded draft model; the first rank counts blocks."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank = get_tensor_model_parallel_rank()
    injection = Injection(plan, device, vllm_config.model_config.dtype, rank, get_tensor_model_parallel_world_size())
    injection.attach(model)
    if rank == 0:
        injection.blocks = Blocks(plan.max_num_seqs, plan.draft_length, device)
        Reporter(injection, injection.config.acceptance, vllm_config.parallel_config.data_parallel_index).start()
    return injection


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of host integers on the device, without waiting for it.

    The copy is made from memory of its own: vLLM may change the array before an asynchronous one has read it.
    """
    return torch.tensor(array, pin_memory=device.type == "cuda").to(device, non_blocking=True)
