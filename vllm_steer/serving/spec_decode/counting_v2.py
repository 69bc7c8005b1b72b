"""V2 model runner: where a round begins, and the count of verified blocks where the drafter is not steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_steer.serving.telemetry.block_counter import Blocks
from vllm_steer.serving.telemetry.unsteered import Unsteered


def verified_drafts(batch: Any) -> Sequence[int] | None:
    """How many drafts of each request of an input batch the target has verified; None: of none.

    With a grammar and asynchronous scheduling vLLM verifies fewer drafts than it says: those do not count.
    """
    return None if batch.has_structured_output_reqs else batch.num_draft_tokens_per_req


class Rounds:
    """Put before a speculator class of vLLM's, behind what shows it chains for trees: `begin_round` is first."""

    def begin_round(self, batch: Any, states: list[Tensor] | None, num_rejected: Tensor) -> None:
        """A round of drafts begins, for what the target verified in `batch`, whose auxiliary states are `states`."""
        raise NotImplementedError

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As vLLM's: drafts [requests, k]."""
        if not dummy_run:
            self.begin_round(input_batch, aux_hidden_states, num_rejected)
        rest = (attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, num_rejected, *args)
        return super().propose(input_batch, *rest, dummy_run=dummy_run, **kwargs)  # type: ignore[misc]  # the speculator's


class CountsBlocks(Rounds):
    """Rounds of a drafter that is not steered."""

    def __init__(self, vllm_config: Any, device: torch.device):
        super().__init__(vllm_config, device)  # type: ignore[call-arg]  # the speculator's
        self._unsteered = Unsteered.of_first_rank(vllm_config, device)

    @property
    def blocks(self) -> Blocks | None:
        """Where blocks are counted."""
        return None if self._unsteered is None else self._unsteered.blocks

    def begin_round(self, batch: Any, states: list[Tensor] | None, num_rejected: Tensor) -> None:
        """Count the blocks that were verified."""
        if self._unsteered is not None:
            n = batch.num_reqs
            self._unsteered.count(
                batch.query_start_loc[: n + 1], num_rejected, batch.seq_lens, batch.req_ids[:n], verified_drafts(batch)
            )
