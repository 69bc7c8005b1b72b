"""V2 model runner: vLLM's DFlash speculator, whose drafts depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from vllm_steer.decoding.block_tree import Logits, branches
from vllm_steer.serving.block_plan import block_plan
from vllm_steer.serving.plan import tree_of
from vllm_steer.serving.spec_decode.counting_v2 import CountsBlocks
from vllm_steer.serving.spec_decode.repair import Repair
from vllm_steer.serving.spec_decode.tree_v2 import OverRows, TreeRounds
from vllm_steer.serving.trees.drafting import weighed


class BlockSpeculator(CountsBlocks, DFlashSpeculator):
    """Built only where a plan repairs the drafts. What it adds to a round is in vLLM's full graph of it."""

    _speculator_name = "repaired DFlash"

    def __init__(self, vllm_config: Any, device: torch.device):
        super().__init__(vllm_config, device)
        plan = block_plan(vllm_config)
        assert plan is not None and plan.repairs
        self.repair = Repair(plan, device)
        self._prepared: Tensor | None = None  # logits [B, V] of the step that is being sampled

    def compute_draft_logits(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        """As vLLM's; while a block is walked, the logits of its step."""
        if self._prepared is not None:
            return self._prepared
        return super().compute_draft_logits(hidden_states, spec_step_idx)

    def _generate_draft(self, num_reqs: int, *args: Any, **kwargs: Any) -> None:
        out, k = self._run_model(*args, **kwargs), self.num_speculative_steps
        count, per = num_reqs * k, self.num_query_per_req
        by_step = lambda x: x[:count].view(num_reqs, k).t().contiguous()  # noqa: E731
        requests, columns = by_step(self.sample_idx_mapping), by_step(self.sample_col)
        before = by_step(self.sample_pos) - 1
        # A padding row has no request, -1; its drafts go nowhere.
        heat = None if self.draft_logits is None else self.temperature[requests[0].clamp(min=0)]
        logits = self.repair.logits(self.model, out[self.sample_indices[:count]], k, heat)
        previous = self.input_buffers.input_ids[: num_reqs * per : per].long()
        try:
            for step in range(k):
                self._prepared = logits(step, previous)
                previous = self.sample_draft(
                    self._prepared,
                    before[step],
                    requests[step],
                    self.temperature,
                    self.seeds,
                    columns[step],
                    self.draft_logits,
                ).long()
                self.draft_tokens[:num_reqs, step] = previous
        finally:
            self._prepared = None


class BlockRounds(TreeRounds):
    """Trees of a block drafter: one pass of it, then rows by `branches`.

    Sampled drafts take the noise that the target draws with; greedy ones are the most probable tokens. Either way the
    target's own draw decides.
    """

    def rows_of(self, logits: Logits, requests: Sequence[str], newest: Tensor, at: Tensor, states: Tensor) -> Tensor:
        """Paths [B, L, k] after the tokens newest [B] at positions `at` [B]; states [B]: how vLLM numbers requests."""
        heat = self._speculator.temperature[states]
        rank = weighed(self._verifier.rank(requests, at, states), at, heat)
        return branches(logits, newest, self.shape.depth, self.shape.leaves, rank)


class BlockTreeSpeculator(OverRows, BlockSpeculator):  # type: ignore[misc]  # the others are passed on
    """Drafts trees."""

    tree: BlockRounds

    def __init__(self, vllm_config: Any, device: torch.device):
        super().__init__(vllm_config, device)
        shape = tree_of(vllm_config)
        assert shape is not None
        self._probabilistic = self.draft_logits is not None
        self.tree = BlockRounds(self, shape)
        # To vLLM a block has all drafts of all rows; its pass has the newest token and k masks.
        self.num_speculative_steps, self.num_query_per_req = shape.depth, 1 + shape.depth

    def _generate_draft(self, num_reqs: int, *args: Any, **kwargs: Any) -> None:
        out, k, per = self._run_model(*args, **kwargs), self.num_speculative_steps, self.num_query_per_req
        states = self.sample_idx_mapping[: num_reqs * k : k].clamp(min=0)  # -1 in dummy runs
        heat = self.temperature[states] if self._probabilistic else None
        logits = self.repair.logits(self.model, out[self.sample_indices[: num_reqs * k]], k, heat)
        buffers = self.input_buffers
        newest, at = (x[: num_reqs * per : per].long() for x in (buffers.input_ids, buffers.positions))
        self._paths = self.tree.rows_of(logits, self._requests[:num_reqs], newest, at, states)


def speculator(vllm_config: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """The speculator of a block drafter; None: it is vLLM's own."""
    plan = block_plan(vllm_config)
    if plan is None or not plan.repairs:
        return None
    return (BlockSpeculator if plan.tree_rows is None else BlockTreeSpeculator)(vllm_config, device)
