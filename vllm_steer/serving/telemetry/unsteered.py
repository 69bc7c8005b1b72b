"""Counts the blocks of an engine whose drafter is not steered: of draft trees and of block drafters with a repair.

vLLM takes the rows of a tree for one long draft, so its counters cannot say how deep they are accepted. What is counted
is reported as that of a steered engine is (reporter.py, metrics.py); nothing is judged.

Shape legend: B requests in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_steer.serving.telemetry.block_counter import Blocks, count
from vllm_steer.serving.telemetry.reporter import Reporter


class Unsteered:
    """What a Reporter looks at in place of an injection."""

    scale, adapter, config = 0.0, None, SimpleNamespace(acceptance={})

    def __init__(self, vllm_config: Any, device: torch.device):
        self._device = device
        self.blocks = Blocks.of(vllm_config, device)
        Reporter(self, vllm_config.parallel_config.data_parallel_index).start()

    @classmethod
    def of_first_rank(cls, vllm_config: Any, device: torch.device) -> Unsteered | None:
        """The counts of an engine; None in all tensor-parallel ranks but the first."""
        from vllm.distributed import get_tensor_model_parallel_rank

        return None if get_tensor_model_parallel_rank() else cls(vllm_config, device)

    @torch.inference_mode()
    def count(
        self,
        start: Tensor,
        rejected: Tensor | None,
        seq_lens: Tensor,
        ids: Sequence[str],
        drafts: Sequence[int] | None,
    ) -> None:
        """Count the blocks that the target has verified; the arguments are those of `attach.steer_first_pass`."""
        n = len(ids)
        host = torch.empty(2, n, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        verified = self.blocks.begin(ids, drafts, host.numpy(), steered=False)
        previous, made = host.to(self._device, non_blocking=True)
        gone = torch.zeros_like(previous) if rejected is None else rejected[:n]
        count(verified, previous, made, start[1 : n + 1] - start[:n], gone, seq_lens[:n])
