"""V2 model runner: draft trees as rows (serving/trees), for steered and for plain draft models.

A round, in vLLM's order, and the seam (patches.py) by which each step comes here:

    prepare_inputs   GPUModelRunner.prepare_inputs      positions of the rows
    find_pages       GPUModelRunner.prepare_attn        pages and slots of the rows, forked
    over_rows        DefaultModelState.prepare_attn     attention over rows in place of requests
    verify           RejectionSampler.__call__          the winner and what it says; its pages kept
    propose          our speculator                     the winner re-fed by vLLM's first pass, then passes of L rows

Shape legend: B requests, L leaves, k depth, V vocabulary, N = L (k + 1) - 1 drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer

from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving.plan import tree_of
from vllm_steer.serving.spec_decode.counting_v2 import verified_drafts
from vllm_steer.serving.spec_decode.verify_v2 import Verifier
from vllm_steer.serving.tree_admission import say_so
from vllm_steer.serving.trees.drafting import Growth, growing
from vllm_steer.serving.trees.layout import Rows, flat
from vllm_steer.serving.trees.pages import Paged, Pages, pages_of
from vllm_steer.serving.trees.requests import looks_back


class TreeRounds(Paged):
    """What a speculator with a tree does in place of drafting chains."""

    def __init__(self, speculator: Any, shape: TreeShape):
        say_so(speculator.vllm_config, shape)
        self.shape = shape
        self._speculator = speculator
        self._alone: set[str] = set()
        self._hidden: Tensor | None = None  # of the first draft pass, [B, H]
        self._verifier = Verifier(speculator, shape)
        speculator.draft_logits = None  # vLLM's buffer for the draft distributions of chains
        most = speculator.max_num_reqs * shape.leaves
        self._begin = torch.arange(most + 1, dtype=torch.int32, device=speculator.device)

    # --- the target pass --------------------------------------------------------------------------------------------

    def lay_out(self, runner: Any, scheduler_output: Any, batch: Any) -> None:
        """Turn the drafts of a batch that is to be verified, if some are trees, into rows: `batch.tree`.

        Coupled drafts are verified here also where all have been cut to chains.
        """
        self._alone.update(new.req_id for new in scheduler_output.scheduled_new_reqs if looks_back(new.sampling_params))
        self._alone.difference_update(scheduler_output.finished_req_ids)
        drafts = batch.num_draft_tokens_per_req
        if drafts is None or drafts.max() <= (0 if self._verifier.coupled else self.shape.depth):
            return
        alone = np.fromiter(map(self._alone.__contains__, batch.req_ids), dtype=bool, count=batch.num_reqs)
        rows = Rows(self.shape, batch.num_scheduled_tokens, drafts, alone, runner.device)
        rows.place(batch.input_ids, batch.positions, runner.block_tables.block_sizes[0], runner.max_model_len)
        batch.tree, batch.tree_rounds = rows, self

    def find_pages(self, batch: Any, tables: tuple[Tensor, ...], slot_mappings: Tensor) -> tuple[Tensor, ...]:
        """Fork the rows' pages, write their slots in place, and return their tables."""
        rows = batch.tree
        rows.find_pages(tables[0][: batch.num_reqs].clone(), slot_mappings[0])  # vLLM's is a buffer
        self._target.copy(*rows.forks())
        return (rows.pages,)

    def verify(self, sampler: Any, logits: Tensor, batch: Any, invalid: Tensor | None) -> Any:
        """vLLM's SamplerOutput for a batch with trees, see `Verifier.verify`; the winners' pages are kept."""
        found = self._verifier.verify(sampler, logits, batch, batch.tree, invalid)
        self._target.copy(*batch.tree.commits())
        return found

    # --- the draft round --------------------------------------------------------------------------------------------

    def shown(
        self, batch: Any, aux: list[Tensor] | None, num_rejected: Tensor
    ) -> tuple[Any, list[Tensor] | None, Tensor]:
        """What vLLM would have handed to its drafter if the winners had been verified alone, as chains."""
        rows = getattr(batch, "tree", None)
        if rows is None:
            return batch, aux, num_rejected
        index, n = rows.shown(), batch.num_reqs
        bound = batch.seq_lens_cpu_upper_bound[:n] - torch.from_numpy(rows.cut).to(batch.seq_lens_cpu_upper_bound.dtype)
        chains = replace(
            batch,
            input_ids=batch.input_ids[index],
            positions=batch.positions[index],
            num_tokens=len(index),
            num_tokens_after_padding=len(index),
            num_scheduled_tokens=rows.shown_length.astype(np.int32),
            num_draft_tokens_per_req=rows.shown_drafts.astype(np.int32),
            query_start_loc=rows.on.shown_begin.int(),
            query_start_loc_np=rows.shown_begin,
            seq_lens=rows.without_others(batch.seq_lens[:n]),
            seq_lens_cpu_upper_bound=bound,
        )
        rejected = num_rejected[:n]
        fewer = torch.where(rejected > 0, rows.without_others(rejected), rejected)
        return chains, None if aux is None else [each[index] for each in aux], fewer

    def after_first_pass(self, hidden: Tensor) -> Tensor:
        """Keep its hidden states [B, H]; returns a draft for vLLM that nobody reads."""
        self._hidden = hidden.clone()
        return hidden.new_zeros(len(hidden), dtype=torch.int64)

    def grow(self, batch: Any) -> Tensor:
        """The later passes: paths [B, L, k]."""
        speculator, n = self._speculator, batch.num_reqs
        assert self._hidden is not None
        newest = speculator.expanded_positions[speculator.last_token_indices[:n]].clone()
        table = speculator.block_tables.input_block_tables[0][:n]
        heat = speculator.temperature[speculator.idx_mapping[:n]] if self.shape.adaptive else None
        growth = growing(
            self.shape, table, newest, speculator.block_tables.block_sizes[0], speculator.max_model_len,
            self._verifier.rank(batch.req_ids, newest), heat,
        )  # fmt: skip
        self._drafter.copy(*growth.forks)
        growth.grow(speculator.compute_draft_logits(self._hidden, 0))
        for depth in range(1, self.shape.depth):
            hidden = self._pass(growth, batch)
            growth.grow(speculator.compute_draft_logits(growth.nodes(hidden), depth))
        self._hidden = None
        return growth.paths

    def _pass(self, growth: Growth, batch: Any) -> Tensor:
        """Feed the newest token of every row; hidden states [B L, H]."""
        speculator, (positions, slot, length) = self._speculator, growth.step()
        n = len(positions)
        bound = batch.seq_lens_cpu_upper_bound[: batch.num_reqs] + 1 + self.shape.depth
        bound = bound.clamp(max=speculator.max_model_len)
        slot_mappings = slot[None]
        metadata = build_attn_metadata(
            attn_groups=speculator.attn_groups,
            num_reqs=n,
            num_tokens=n,
            query_start_loc_gpu=self._begin[: n + 1],
            query_start_loc_cpu=torch.arange(n + 1, dtype=torch.int32),
            max_query_len=1,
            seq_lens=length,
            max_seq_len=speculator.max_model_len,
            block_tables=[growth.table],
            slot_mappings=slot_mappings,
            kv_cache_config=speculator.kv_cache_config,
            seq_lens_cpu_upper_bound=bound.repeat_interleave(self.shape.leaves),
            positions=positions,
            is_prefilling=torch.zeros(n, dtype=torch.bool),
        )
        by_layer = build_slot_mappings_by_layer(slot_mappings, speculator.kv_cache_config)
        return speculator._run_model(growth.tokens.int(), positions, metadata, by_layer, None)[:n]

    def _pages(self, target: bool) -> Pages:
        drafts = self._speculator.draft_attn_layer_names
        layers = self._speculator.vllm_config.compilation_config.static_forward_context
        return pages_of(layers, self._speculator.kv_cache_config, lambda name: (name in drafts) != target)


class OverRows:
    """Put before a speculator class that makes `_paths`: its rounds go on from the winners, and its drafts are rows."""

    tree: TreeRounds
    blocks: Any  # where blocks are counted, None in ranks that do not count
    _dummy = True  # a dummy run, which has no pages
    _paths: Tensor | None = None  # [B, L, k], of this round
    _requests: Sequence[str] = ()

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As vLLM's: drafts [B, N]."""
        self._dummy, self._requests = dummy_run, input_batch.req_ids
        if not dummy_run:
            rows = getattr(input_batch, "tree", None)
            if self.blocks is not None and rows is not None and verified_drafts(input_batch) is not None:
                rows.count_winners(self.blocks, input_batch.req_ids[: rows.requests])
            input_batch, aux_hidden_states, num_rejected = self.tree.shown(input_batch, aux_hidden_states, num_rejected)
        rest = (last_hidden_states, aux_hidden_states, num_sampled, num_rejected, last_sampled, *args)
        drafts = super().propose(  # type: ignore[misc]
            input_batch, attn_metadata, slot_mappings, *rest, dummy_run=dummy_run, **kwargs
        )
        if dummy_run:
            return drafts
        assert self._paths is not None
        return flat(last_sampled.view(-1)[input_batch.idx_mapping], self._paths)


class Treed(OverRows):
    """Put before a speculator class of ours for draft models: it then drafts trees. Dummy runs draft a chain."""

    def __init__(self, vllm_config: Any, device: torch.device):
        super().__init__(vllm_config, device)  # type: ignore[call-arg]  # the speculator's
        shape = tree_of(vllm_config)
        assert shape is not None
        self.tree = TreeRounds(self, shape)

    def sample_draft(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """As vLLM's, which samples after the first pass."""
        if self._dummy:
            return super().sample_draft(hidden_states, *args)  # type: ignore[misc]
        return self.tree.after_first_pass(hidden_states)

    def _multi_step_decode(self, batch: Any, num_rejected: Tensor, num_reqs: int, *args: Any) -> None:
        if self._dummy:
            super()._multi_step_decode(batch, num_rejected, num_reqs, *args)  # type: ignore[misc]
            return
        self._decoding_steered = True
        if (injection := getattr(self, "injection", None)) is not None:
            injection.steer_drafts(num_reqs, self.tree.shape.leaves)
        self._paths = self.tree.grow(batch)


# --- what patches.py puts into vLLM -----------------------------------------------------------------------------------


def rounds_of(runner: Any) -> TreeRounds | None:
    """The trees of a V2 model runner; None: it drafts chains, or nothing."""
    return getattr(getattr(runner, "speculator", None), "tree", None)


def prepare_inputs(original: Callable[..., Any], runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """GPUModelRunner.prepare_inputs."""
    batch = original(runner, scheduler_output, *args, **kwargs)
    if (tree := rounds_of(runner)) is not None:
        tree.lay_out(runner, scheduler_output, batch)
    return batch


def prepare_attn(original: Callable[..., Any], runner: Any, batch: Any) -> Any:
    """GPUModelRunner.prepare_attn."""
    tables, slot_mappings = original(runner, batch)
    if getattr(batch, "tree", None) is not None:
        tables = rounds_of(runner).find_pages(batch, tables, slot_mappings)  # type: ignore[union-attr]  # it laid them out
    return tables, slot_mappings


def over_rows(original: Callable[..., Any], state: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """DefaultModelState.prepare_attn: metadata by rows in place of requests."""
    if (rows := getattr(batch, "tree", None)) is not None:
        of = torch.from_numpy(rows.request)
        batch = replace(
            batch,
            num_reqs=len(rows.request),
            num_reqs_after_padding=len(rows.request),
            query_start_loc=rows.on.begin.int(),
            query_start_loc_np=rows.begin,
            seq_lens=rows.seq_lens,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound[of],
            num_scheduled_tokens=rows.length.astype(np.int32),
            is_prefilling_np=batch.is_prefilling_np[rows.request],
        )
    return original(state, batch, *args, **kwargs)


def reject(
    original: Callable[..., Any],
    sampler: Any,
    logits: Tensor,
    batch: Any,
    draft_logits: Tensor | None = None,
    invalid_drafts: Tensor | None = None,
) -> Any:
    """RejectionSampler.__call__."""
    if getattr(batch, "tree", None) is None:
        return original(sampler, logits, batch, draft_logits, invalid_drafts)
    return batch.tree_rounds.verify(sampler, logits, batch, invalid_drafts)
