"""V1 model runner: a round of chains or trees, and the count of verified blocks where the drafter is not steered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vllm_steer.serving.block_plan import counts_unsteered
from vllm_steer.serving.spec_decode.tree_v1 import TreeRounds
from vllm_steer.serving.telemetry.block_counter import Blocks
from vllm_steer.serving.telemetry.unsteered import Unsteered


class CountsBlocks:
    """Put before a proposer class of vLLM's."""

    injection: Any = None
    tree: TreeRounds | None = None
    verified: Sequence[int] | None = None  # how many drafts vLLM has just verified for each request
    runner: Any
    _unsteered: Unsteered | None = None

    def count_unsteered(self: Any) -> None:
        """At the end of __init__, where nothing is steered."""
        if counts_unsteered(self.vllm_config):
            self._unsteered = Unsteered.of_first_rank(self.vllm_config, self.device)

    @property
    def blocks(self) -> Blocks | None:
        """Where blocks are counted, steered or not."""
        counting = self.injection or self._unsteered
        return None if counting is None else counting.blocks

    def propose(self, *args: Any, **kwargs: Any) -> Tensor:
        """As vLLM's: drafts [requests, k], or [requests, N] of a tree."""
        propose = super().propose  # type: ignore[misc]  # vLLM's
        try:
            return propose(*args, **kwargs) if self.tree is None else self.tree.propose(propose, *args, **kwargs)
        finally:
            self.verified = None

    def prepare_inputs_padded(self, metadata: Any, spec_decode_metadata: Any, *args: Any) -> Any:
        """As vLLM's, noting how many drafts of each request were verified."""
        self.verified = spec_decode_metadata.num_draft_tokens
        return super().prepare_inputs_padded(metadata, spec_decode_metadata, *args)  # type: ignore[misc]  # vLLM's

    def set_inputs_first_pass(self, **given: Any) -> Any:
        """As vLLM's, which gives all by name, once the blocks are counted that the target has verified."""
        if self._unsteered is not None:
            cad, rejected = given["cad"], given["num_rejected_tokens_gpu"]
            n = cad.batch_size()
            ids = self.runner.input_batch.req_ids[:n]
            self._unsteered.count(cad.query_start_loc[: n + 1], rejected, cad.seq_lens, ids, self.verified)
        return super().set_inputs_first_pass(**given)  # type: ignore[misc]  # vLLM's
