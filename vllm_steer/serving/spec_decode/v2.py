"""V2 model runner: vLLM's stand-alone autoregressive speculator, steered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan, filters_drafts
from vllm_steer.serving.sampling.draft_filters import Filters, say_so
from vllm_steer.serving.spec_decode.attach import attach, steer_first_pass


class FilteringSpeculator(StandaloneARSpeculator):
    """vLLM's, whose sampled drafts follow the request's top-k and top-p."""

    sampling_states: Any = None  # of the target's sampler, from whoever builds that; None: drafts are not filtered
    _filters: Filters | None = None

    def init_cudagraph_manager(self, *args: Any) -> None:
        """As vLLM's, which calls it once the target's sampler is there."""
        if self.sampling_states is not None and filters_drafts(self.vllm_config):
            self._filters = Filters(self.sampling_states, self.device)
            say_so()
        super().init_cudagraph_manager(*args)

    @torch.inference_mode()
    def propose(self, input_batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Tensor:
        """As vLLM's: drafts [requests, k]."""
        if self._filters is not None:
            n = 0 if dummy_run else input_batch.num_reqs
            self._filters.begin(input_batch.idx_mapping[:n], input_batch.idx_mapping_np[:n])
        return super().propose(input_batch, *args, dummy_run=dummy_run, **kwargs)  # type: ignore[misc]  # as below

    def compute_draft_logits(self, *args: Any) -> Tensor:
        """As vLLM's: logits [B, V], a row for each request of the batch in its order, cut by the request's filters."""
        logits = super().compute_draft_logits(*args)
        return logits if self._filters is None else self._filters(logits)


class SteeredSpeculator(FilteringSpeculator):
    """Built only for steered drafters."""

    injection: Injection
    needs_aux_hidden_states = True  # for a vLLM that asks (see patches.py)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """As vLLM's, with the steering attached to the model."""
        model = super().load_draft_model(target_model, target_attn_layer_names)
        plan = Plan.of(self.vllm_config)
        assert plan is not None
        self.injection = attach(self.vllm_config, plan, model, self.device)
        return model

    def propose(  # type: ignore[override]  # the others are passed on
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
        """As vLLM's: drafts [requests, k], made under the guides taken from aux_hidden_states."""
        if not dummy_run:
            assert aux_hidden_states is not None  # vLLM hands them out: `init_speculator` asked for them
            self._steer_first_pass(input_batch, aux_hidden_states, num_rejected)
        rest = (attn_metadata, slot_mappings, last_hidden_states, aux_hidden_states, num_sampled, num_rejected, *args)
        try:
            return super().propose(input_batch, *rest, dummy_run=dummy_run, **kwargs)
        finally:
            self.injection.off()

    def _steer_first_pass(self, batch: Any, states: list[Tensor], num_rejected: Tensor) -> None:
        n = batch.num_reqs
        steer_first_pass(
            self.injection,
            states,
            batch.query_start_loc[: n + 1],
            num_rejected,
            batch.seq_lens,
            batch.req_ids,
            batch.prefill_len_np[:n],
            # With a grammar and asynchronous scheduling vLLM verifies fewer drafts than it says: those do not count.
            None if batch.has_structured_output_reqs else batch.num_draft_tokens_per_req,
        )

    def _multi_step_decode(self, input_batch: Any, num_rejected: Tensor, num_reqs: int, skip_attn: bool, *args: Any):
        if not skip_attn:
            self.injection.steer_drafts(num_reqs)
        return super()._multi_step_decode(input_batch, num_rejected, num_reqs, skip_attn, *args)


def speculator(vllm_config: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """The speculator for an engine's kind of drafter; None: it is vLLM's own."""
    if Plan.of(vllm_config) is not None:
        return SteeredSpeculator(vllm_config, device)
    return FilteringSpeculator(vllm_config, device) if filters_drafts(vllm_config) else None
