"""V1 model runner: vLLM's draft-model proposer with the guides set and the rows named in each round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan, filters_drafts, tree_of
from vllm_steer.serving.sampling.draft_filters import cut, say_so
from vllm_steer.serving.spec_decode.attach import attach, steer_first_pass
from vllm_steer.serving.spec_decode.counting_v1 import CountsBlocks
from vllm_steer.serving.spec_decode.tree_v1 import TreeRounds


class SteeredDraftModelProposer(CountsBlocks, DraftModelProposer):
    """Stands in for DraftModelProposer by name; an unsteered drafter's sampled drafts follow the request's filters, and
    nothing else of it is changed."""

    injection: Injection | None = None

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None):
        super().__init__(vllm_config=vllm_config, device=device, runner=runner)
        self.runner = runner
        self.plan = Plan.of(vllm_config)
        self._filters_drafts = filters_drafts(vllm_config)
        if self._filters_drafts:
            say_so()
        shape = tree_of(vllm_config)
        self.tree = None if shape is None else TreeRounds(self, runner, shape, self._filters_drafts)
        if self.plan is not None:
            runner.use_aux_hidden_state_outputs = True
        else:
            self.count_unsteered()

    def _get_model(self) -> nn.Module:
        model = super()._get_model()
        if self.plan is not None:
            self.injection = attach(self.vllm_config, self.plan, model, self.device)
        return model

    def propose(self, *args: Any, **kwargs: Any) -> Tensor:
        """As its bases'. What steered this round is dropped afterwards, whatever happens."""
        try:
            return super().propose(*args, **kwargs)
        finally:
            if self.injection is not None:
                self.injection.off()

    def set_inputs_first_pass(self, **given: Any) -> Any:  # type: ignore[override]  # vLLM gives all by name
        """As vLLM's, after the guides of this round are taken from target_hidden_states [tokens, states x H]."""
        if self.injection is not None:
            self._steer_first_pass(given["target_hidden_states"], given["cad"], given["num_rejected_tokens_gpu"])
        found = super().set_inputs_first_pass(**given)
        if self.tree is not None:
            self.tree.before_first_pass(found[1])
        return found

    def _sample_draft_tokens(self, hidden_states: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        if self.tree is not None:
            return self.tree.after_first_pass(hidden_states), None
        return super()._sample_draft_tokens(hidden_states, sampling_metadata)

    def _steer_first_pass(self, states: Tensor, cad: Any, rejected: Tensor | None) -> None:
        batch, n = self.runner.input_batch, cad.batch_size()
        assert self.injection is not None
        steer_first_pass(
            self.injection,
            states.chunk(3, -1),
            cad.query_start_loc[: n + 1],
            rejected,
            cad.seq_lens,
            batch.req_ids[:n],
            batch.num_prompt_tokens[:n],
            self.verified,
        )

    def _sample_from_logits(self, logits: Tensor, sampling_metadata: Any) -> tuple[Tensor, Tensor | None]:
        # vLLM calls this for sampled drafts and for greedy ones alike.
        found = sampling_metadata
        if self._filters_drafts and not found.all_greedy and (found.top_k is not None or found.top_p is not None):
            logits = cut(logits, found.temperature, found.top_k, found.top_p)
        return super()._sample_from_logits(logits, sampling_metadata)

    def _update_positions_dependent_metadata(
        self, positions: Tensor, common_attn_metadata: Any, batch_size: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        # vLLM calls this once before every pass after the first.
        if self.injection is not None:
            self.injection.steer_drafts(batch_size)
        return super()._update_positions_dependent_metadata(
            positions, common_attn_metadata, batch_size, *args, **kwargs
        )


def proposer(vllm_config: Any, device: torch.device, runner: Any) -> Any:
    """The proposer for an engine's kind of drafter; None: it is vLLM's own."""
    ours = Plan.of(vllm_config) is not None or filters_drafts(vllm_config) or tree_of(vllm_config) is not None
    return SteeredDraftModelProposer(vllm_config, device, runner) if ours else None
