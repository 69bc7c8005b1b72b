"""V1 model runner: vLLM's DFlash and Medusa proposers, whose drafts depend on each other where a plan says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_steer.decoding.block_tree import branches
from vllm_steer.serving.block_plan import block_plan
from vllm_steer.serving.plan import tree_of
from vllm_steer.serving.spec_decode.counting_v1 import CountsBlocks
from vllm_steer.serving.spec_decode.repair import Repair
from vllm_steer.serving.spec_decode.tree_v1 import TreeRounds
from vllm_steer.serving.trees.drafting import weighed
from vllm_steer.serving.trees.layout import flat


class BlockProposer(CountsBlocks, DFlashProposer):
    """Stands in for DFlashProposer by name; without a plan nothing of it is changed."""

    repair: Repair | None = None
    _newest: Tensor | None = None  # [>= B], the newest token of each request

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None):
        super().__init__(vllm_config, device, runner)
        plan = block_plan(vllm_config)
        self.repair = Repair(plan, device) if plan is not None and plan.repairs else None
        if (shape := tree_of(vllm_config)) is not None:
            self.tree = BlockRounds(self, runner, shape)
        self.runner = runner
        self.count_unsteered()

    def set_inputs_first_pass(self, **given: Any) -> Any:  # type: ignore[override]  # vLLM gives all by name
        """As vLLM's, noting the newest tokens."""
        self._newest = given["next_token_ids"]
        return super().set_inputs_first_pass(**given)

    def _sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        if self.repair is None:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        if self.tree is not None:
            return self.tree.after_first_pass(hidden_states), None
        assert self._newest is not None
        k, drafts, dists = self.num_speculative_tokens, list[Tensor](), list[Tensor]()
        logits = self.repair.logits(self.model, hidden_states, k, _temperature(sampling_metadata))
        previous = self._newest[: len(hidden_states) // k].long()
        for step in range(k):
            previous, dist = self._sample_from_logits(logits(step, previous), sampling_metadata)
            previous = previous.long()
            drafts.append(previous)
            if dist is not None:
                dists.append(dist)
        sampled = torch.stack(dists, 1).flatten(0, 1) if dists else None
        return torch.stack(drafts, 1).flatten(), sampled


class BlockRounds(TreeRounds):
    """Trees of a block drafter: one pass of it, then rows by `branches`.

    Sampled drafts take the noise that the target draws with; greedy ones are the most probable tokens. Either way the
    target's own draw decides.
    """

    def propose(self, chain_of_one: Callable[..., Tensor], **given: Any) -> Tensor:
        """Drafts [B, N]; `chain_of_one` is vLLM's `propose`, which makes the pass."""
        given = self._of_winners(given)
        proposer, k, sampling = self._proposer, self.shape.depth, given["sampling_metadata"]
        chain_of_one(**given | {"num_speculative_tokens": k})
        proposer.num_speculative_tokens = self.shape.drafts
        assert self._hidden is not None
        requests = len(self._hidden) // k
        self._verifier.meet(self._runner.input_batch.req_ids, self._runner.requests)
        newest, at = given["next_token_ids"][:requests], proposer.positions[: requests * (k + 1) : k + 1].clone()
        rank = weighed(self._verifier.rank(sampling, at), at, _temperature(sampling))
        logits = proposer.repair.logits(proposer.model, self._hidden, k, _temperature(sampling))
        self.rows = self._hidden = None
        return flat(newest, branches(logits, newest, k, self.shape.leaves, rank))


def medusa(original: Any) -> type:
    """vLLM's MedusaProposer, where it has one, with drafts that depend on each other where a plan says so."""

    class RefinedMedusaProposer(original):
        repair: Repair | None = None
        _newest: list[int] | None = None  # the newest token of each request

        def __init__(self, vllm_config: Any, device: torch.device):
            super().__init__(vllm_config, device)
            plan = block_plan(vllm_config)
            self.repair = Repair(plan, device) if plan is not None and plan.repairs else None

        def note_newest(self, batch: Any, sampled: Any) -> None:
            """Before `propose`: a list of tokens for each request of the input batch, empty during its prefill."""
            if self.repair is not None:
                self._newest = [
                    tokens[-1] if tokens else int(batch.token_ids_cpu[i, batch.num_tokens_no_spec[i] - 1])
                    for i, tokens in enumerate(sampled)
                ]

        def propose(
            self,
            num_speculative_tokens: int,
            target_hidden_states: Tensor,
            sampling_metadata: Any,
            slot_mappings: Any = None,
        ) -> Tensor:
            """As vLLM's: greedy drafts [B, k]."""
            if self.repair is None:
                return super().propose(num_speculative_tokens, target_hidden_states, sampling_metadata, slot_mappings)
            blind = torch.stack(self.model.compute_logits(self.model(target_hidden_states)), 1)
            logits = self.repair.over(blind, _temperature(sampling_metadata))
            # vLLM's path of Medusa heads has these tokens on the host already.
            previous, drafts = torch.tensor(self._newest, device=blind.device), []
            for step in range(num_speculative_tokens):
                previous = logits(step, previous).argmax(-1)
                drafts.append(previous)
            return torch.stack(drafts, 1)

    return RefinedMedusaProposer


def _temperature(sampling_metadata: Any) -> Tensor | None:
    return None if sampling_metadata.all_greedy else sampling_metadata.temperature
