"""V2 model runner: vLLM's stand-alone autoregressive speculator, steered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.serving.injection import Injection
from vllm_steer.serving.kill_switch import KILL_SWITCH, disabled
from vllm_steer.serving.plan import Options, Plan, draft_model, filters_drafts, tree_of
from vllm_steer.serving.sampling.draft_filters import Filters, say_so
from vllm_steer.serving.spec_decode.attach import attach, steer_first_pass
from vllm_steer.serving.spec_decode.counting_v2 import CountsBlocks, Rounds, verified_drafts
from vllm_steer.serving.spec_decode.draft_graphs import GraphedSpeculator
from vllm_steer.serving.spec_decode.tree_v2 import Treed
from vllm_steer.serving.telemetry.block_counter import Blocks


class DraftModelSpeculator(GraphedSpeculator):
    """vLLM's, whose sampled drafts follow the request's top-k and top-p, with graphs of the decode passes if asked."""

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

    def capture(self) -> None:
        """As its base's, without the filters of the requests that vLLM warmed its kernels with."""
        if self._filters is not None:
            self._filters.active = False
        super().capture()

    def _may_replay(self) -> bool:
        return self._filters is None or not self._filters.active  # which the graph does not hold

    def compute_draft_logits(self, *args: Any) -> Tensor:
        """As vLLM's: logits [B, V], a row for each request of the batch in its order, cut by the request's filters."""
        logits = super().compute_draft_logits(*args)
        return logits if self._filters is None else self._filters(logits)


class SteeredSpeculator(Rounds, DraftModelSpeculator):
    """Built only for steered drafters."""

    injection: Injection
    _decoding_steered = False  # this round's passes after the first
    needs_aux_hidden_states = True  # for a vLLM that asks (see patches.py)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """As vLLM's, with the steering attached to the model."""
        model = super().load_draft_model(target_model, target_attn_layer_names)
        plan = Plan.of(self.vllm_config)
        assert plan is not None
        self.injection = attach(self.vllm_config, plan, model, self.device)
        return model

    @property
    def blocks(self) -> Blocks | None:
        """Where blocks are counted."""
        return self.injection.blocks

    def propose(self, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Tensor:
        """As vLLM's: drafts [requests, k], made under the guides taken from the target's auxiliary states."""
        self._decoding_steered = self.num_speculative_steps == 1 or dummy_run
        try:
            drafts = super().propose(*args, dummy_run=dummy_run, **kwargs)
        finally:
            self.injection.off()
        if not self._decoding_steered:  # a vLLM with graphs of its own may take another way
            raise SteeringError(
                "vLLM made a drafter's decode passes without telling vllm-steer, so they were not steered: this is a "
                f"fault of vllm-steer on this release, report it; {KILL_SWITCH}=1 serves the drafter unsteered"
            )
        return drafts

    def begin_round(self, batch: Any, states: list[Tensor] | None, num_rejected: Tensor) -> None:
        """Steer the first pass by the target's states."""
        assert states is not None  # vLLM hands them out: `init_speculator` asked for them
        n = batch.num_reqs
        steer_first_pass(
            self.injection,
            states,
            batch.query_start_loc[: n + 1],
            num_rejected,
            batch.seq_lens,
            batch.req_ids,
            batch.prefill_len_np[:n],
            verified_drafts(batch),
        )

    def _multi_step_decode(self, input_batch: Any, num_rejected: Tensor, num_reqs: int, skip_attn: bool, *args: Any):
        self._decoding_steered = True
        if not skip_attn:
            self.injection.steer_drafts(num_reqs)
        return super()._multi_step_decode(input_batch, num_rejected, num_reqs, skip_attn, *args)


class SteeredTreeSpeculator(Treed, SteeredSpeculator):  # type: ignore[misc]  # the others are passed on
    """Draft trees of a steered drafter."""


class TreeSpeculator(Treed, CountsBlocks, DraftModelSpeculator):  # type: ignore[misc]  # the others are passed on
    """Draft trees of a plain draft model."""


def speculator(vllm_config: Any, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """The speculator for an engine's kind of drafter; None: it is vLLM's own."""
    trees = tree_of(vllm_config) is not None
    if Plan.of(vllm_config) is not None:
        return (SteeredTreeSpeculator if trees else SteeredSpeculator)(vllm_config, device)
    if trees:
        return TreeSpeculator(vllm_config, device)
    return DraftModelSpeculator(vllm_config, device) if _changes_a_plain_one(vllm_config) else None


def _changes_a_plain_one(vllm_config: Any) -> bool:
    """Whether a plain draft model has anything of ours."""
    if draft_model(vllm_config) is None or disabled():
        return False
    return filters_drafts(vllm_config) or Options.read(vllm_config.additional_config).draft_graphs
