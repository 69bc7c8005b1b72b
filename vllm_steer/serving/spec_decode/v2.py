"""V2 model runner: vLLM's stand-alone autoregressive speculator, steered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.spec_decode.attach import attach, steer_first_pass


class SteeredSpeculator(StandaloneARSpeculator):
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

    @torch.inference_mode()
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
        """As vLLM's: drafts [requests, k], made under the guides taken from aux_hidden_states."""
        if not dummy_run:
            assert aux_hidden_states is not None  # vLLM hands them out: `init_speculator` asked for them
            self._steer_first_pass(input_batch, aux_hidden_states, num_rejected)
        try:
            return super().propose(  # type: ignore[misc]  # `args` end before dummy_run
                input_batch,
                attn_metadata,
                slot_mappings,
                last_hidden_states,
                aux_hidden_states,
                num_sampled,
                num_rejected,
                *args,
                dummy_run=dummy_run,
                **kwargs,
            )
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
    plan = Plan.of(vllm_config)
    return None if plan is None else SteeredSpeculator(vllm_config, device)
