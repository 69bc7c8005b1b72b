"""What both model runners do: build the injection of a loaded draft model, and steer the first pass of a round."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.telemetry.block_counter import Blocks
from vllm_steer.serving.telemetry.reporter import Reporter

logger = logging.getLogger("vllm.steer")


def attach(vllm_config: Any, plan: Plan, model: nn.Module, device: torch.device) -> Injection:
    """Build the injection for this rank and wrap the freshly loaded draft model; the first rank counts blocks."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank = get_tensor_model_parallel_rank()
    injection = Injection(plan, device, vllm_config.model_config.dtype, rank, get_tensor_model_parallel_world_size())
    injection.attach(model)
    _warn_of_lost_fusion(vllm_config)
    if rank == 0:
        injection.blocks = Blocks.of(vllm_config, device)
        Reporter(injection, vllm_config.parallel_config.data_parallel_index).start()
    return injection


def _warn_of_lost_fusion(vllm_config: Any) -> None:
    """Log where vLLM would have computed activation and quantisation in one kernel: it looks for its own activation."""
    quantization = vllm_config.speculative_config.draft_model_config.quantization
    if quantization is not None and vllm_config.compilation_config.pass_config.fuse_act_quant:
        logger.info(
            "the drafter is quantised (%s): in its steered layers vLLM's fusion of activation and quantisation "
            "(fuse_act_quant) does not apply; both run in kernels of their own or in inductor's",
            quantization,
        )


def steer_first_pass(
    injection: Injection,
    states: Sequence[Tensor],
    start: Tensor,
    rejected: Tensor | None,
    seq_lens: Tensor,
    ids: Sequence[str],
    prompt_lens: np.ndarray,
    drafts: Sequence[int] | None,
) -> None:
    """Begin a draft round: make its guides, name the rows of its first pass, count the blocks the target has verified.

    What the device needs of the host goes there in one copy, from memory that nobody writes to afterwards.

    Args:
        states: the target's three states, low to high, each [rows, H].
        start: [B + 1] integer, on the device: first row of each request in the target's pass, and the end.
        rejected: [>= B] integer, on the device: rows at a request's end that the target rejected; None: none.
        seq_lens: [>= B] integer, on the device: length of each request up to its last row in the target's pass.
        ids: the B requests.
        prompt_lens: [B] integer.
        drafts: how many drafts the target has verified of each request; None: of none.
    """
    if rejected is None:
        rejected = injection.none_rejected
    injection.set_guides(states, start, rejected)
    blocks, device = injection.blocks, injection.entry.device
    rows = 1 if blocks is None else 3
    host = torch.empty(rows, len(ids), dtype=torch.int32, pin_memory=device.type == "cuda")
    table = host.numpy()
    table[0] = prompt_lens
    verified = None if blocks is None else blocks.begin(ids, drafts, table[1:], injection.scale != 0)
    injection.steer_window(start, rejected, seq_lens, host.to(device, non_blocking=True), verified)
