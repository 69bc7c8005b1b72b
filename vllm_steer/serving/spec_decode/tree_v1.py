"""V1 model runner: draft trees as rows (serving/trees), for steered and for plain draft models.

A round, in vLLM's order, and the seam (patches.py) by which each step comes here:

    lay_out      GPUModelRunner._prepare_inputs    positions and slots of the rows, their pages forked
    over_rows    AttentionGroup.build_metadata     attention over rows in place of requests
    verify       RejectionSampler.forward          the winner, verified by vLLM as a chain of k; its pages kept
    propose      our proposer                      the winner re-fed by vLLM's first pass, then passes of L rows

Shape legend: B requests, L leaves, k depth, V vocabulary, N = L (k + 1) - 1 drafts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving.plan import rejects_recursively
from vllm_steer.serving.spec_decode.verify_v1 import Verifier
from vllm_steer.serving.tree_admission import say_so
from vllm_steer.serving.trees.drafting import Growth, growing
from vllm_steer.serving.trees.layout import Rows, flat
from vllm_steer.serving.trees.pages import Paged, Pages, pages_of
from vllm_steer.serving.trees.recursive import Recursive

ROWS: ContextVar[Rows | None] = ContextVar(
    "rows of the target pass whose attention metadata is being built", default=None
)


class TreeRounds(Paged):
    """What a proposer with a tree does in place of drafting chains."""

    def __init__(self, proposer: Any, runner: Any, shape: TreeShape, filters_drafts: bool = False):
        say_so(proposer.vllm_config, shape)
        self.shape = shape
        self.rows: Rows | None = None  # of the last target pass, if trees were in it
        self._waiting = False  # it has not been verified yet
        self._proposer, self._runner = proposer, runner
        self._verifier = Verifier(
            runner.device,
            sampled=proposer.speculative_config.draft_sample_method == "probabilistic",
            filtered=filters_drafts,
            recursive=self._recursive(),
        )
        self._hidden: Tensor | None = None  # of the first draft pass, [B, H]
        self._newest: Tensor | None = None  # [B], the position of what it was fed last

    def _recursive(self) -> Recursive | None:
        proposer = self._proposer
        if not rejects_recursively(proposer.vllm_config):
            return None
        vocabulary = proposer.draft_model_config.get_vocab_size()
        return Recursive(self.shape, proposer.max_batch_size, vocabulary, proposer.device)

    # --- the target pass --------------------------------------------------------------------------------------------

    def lay_out(self, metadata: SpecDecodeMetadata | None, scheduled: np.ndarray) -> None:
        """Turn the drafts that are about to be verified, if some are trees, into rows; scheduled [B] tokens."""
        self.rows, runner = None, self._runner
        self._waiting = False
        if metadata is None or max(metadata.num_draft_tokens) <= self.shape.depth:
            return
        drafts, batch = np.array(metadata.num_draft_tokens), runner.input_batch
        alone = self._verifier.meet(batch.req_ids, runner.requests)
        rows = Rows(self.shape, scheduled, drafts, alone, runner.device)
        table = batch.block_table[0]
        rows.place(runner.input_ids.gpu, runner.positions, table.block_size, runner.max_model_len)
        rows.find_pages(table.get_device_tensor(rows.requests), table.slot_mapping.gpu)
        self._target.copy(*rows.forks())
        self.rows, self._waiting = rows, True

    def rows_waiting(self) -> Rows | None:
        """The rows of the target pass that is being prepared."""
        return self.rows if self._waiting else None

    def verify(self, sampler: Any, verdict: Callable[..., Any], metadata: SpecDecodeMetadata, *args: Any) -> Any:
        """vLLM's SamplerOutput for a batch with trees, see `Verifier.verify`; the winners' pages are kept."""
        assert self.rows is not None
        self._waiting = False
        positions = self._runner.positions[metadata.logits_indices.long()]
        found = self._verifier.verify(sampler, verdict, self.rows, positions, metadata, *args)
        self._target.copy(*self.rows.commits())
        return found

    # --- the draft round --------------------------------------------------------------------------------------------

    def propose(self, chain_of_one: Callable[..., Tensor], **given: Any) -> Tensor:
        """Drafts [B, N]; `chain_of_one` is vLLM's `propose`, of which only the first pass is used."""
        given = self._of_winners(given)
        chain_of_one(**given | {"num_speculative_tokens": 1})
        self._proposer.num_speculative_tokens = self.shape.drafts
        metadata = given["common_attn_metadata"]
        assert self._newest is not None and self._hidden is not None
        requests = len(self._hidden)
        self._verifier.meet(self._runner.input_batch.req_ids, self._runner.requests)
        sampling = given["sampling_metadata"]
        growth = growing(
            self.shape, metadata.block_table_tensor[:requests], self._newest, self._proposer.block_size,
            self._proposer.max_model_len, self._verifier.rank(sampling, self._newest),
            None if sampling.all_greedy else sampling.temperature[:requests],
        )  # fmt: skip
        self._drafter.copy(*growth.forks)
        growth.grow(self._proposer.model.compute_logits(self._hidden))
        if self._proposer.injection is not None:
            self._proposer.injection.steer_drafts(requests, self.shape.leaves)
        for _ in range(1, self.shape.depth):
            hidden = self._pass(growth, metadata)
            growth.grow(self._proposer.model.compute_logits(growth.nodes(hidden)))
        self.rows = self._hidden = self._newest = None
        return flat(given["next_token_ids"], growth.paths)

    def after_first_pass(self, hidden: Tensor) -> Tensor:
        """Keep its hidden states [B, H]; returns a draft for vLLM that nobody reads."""
        self._hidden = hidden
        return hidden.new_zeros(len(hidden), dtype=torch.int64)

    def before_first_pass(self, last: Tensor) -> None:
        """Keep the positions of the newest tokens, which are in rows `last` [B] of the pass."""
        self._newest = self._proposer.positions[last.long()].clone()

    def _of_winners(self, given: dict[str, Any]) -> dict[str, Any]:
        """What vLLM gave, or if trees were verified `_shown`; the rows that won are counted, where this rank counts."""
        if self.rows is None:
            return given
        self._proposer.verified = self.rows.shown_drafts
        if (blocks := self._proposer.blocks) is not None:
            self.rows.count_winners(blocks, self._runner.input_batch.req_ids[: self.rows.requests])
        return given | self._shown(self.rows, given)

    def _shown(self, rows: Rows, given: dict[str, Any]) -> dict[str, Any]:
        """What vLLM would have given if the winners had been verified alone, as chains."""
        index, metadata = rows.shown(), given["common_attn_metadata"]
        begin = torch.from_numpy(rows.shown_begin)
        cut_np = torch.from_numpy(rows.cut)
        bound = metadata.seq_lens_cpu_upper_bound
        chains = metadata.replace(
            query_start_loc=rows.on.shown_begin.int(),
            query_start_loc_cpu=begin,
            seq_lens=rows.without_others(metadata.seq_lens[: rows.requests]),
            seq_lens_cpu_upper_bound=None if bound is None else bound[: rows.requests] - cut_np.to(bound.dtype),
            num_actual_tokens=len(index),
            max_query_len=int(rows.shown_length.max()),
            slot_mapping=metadata.slot_mapping[index],
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        rejected = given["num_rejected_tokens_gpu"]
        return {
            "common_attn_metadata": chains,
            "num_rejected_tokens_gpu": rows.without_others(rejected[: rows.requests]),
            **{name: given[name][index] for name in ("target_token_ids", "target_positions", "target_hidden_states")},
        }

    def _pass(self, growth: Growth, first: CommonAttentionMetadata) -> Tensor:
        """Feed the newest token of every row; hidden states [B L, H]."""
        proposer, (positions, slot, length) = self._proposer, growth.step()
        n = len(positions)
        bound = first.seq_lens_cpu_upper_bound
        if bound is not None:
            bound = (bound + 1 + self.shape.depth).clamp(max=proposer.max_model_len)
            bound = bound.repeat_interleave(self.shape.leaves)
        begin = torch.arange(n + 1, dtype=torch.int32)
        metadata = CommonAttentionMetadata(
            query_start_loc=proposer.arange[: n + 1],
            query_start_loc_cpu=begin,
            seq_lens=length,
            seq_lens_cpu_upper_bound=bound,
            num_reqs=n,
            num_actual_tokens=n,
            max_query_len=1,
            max_seq_len=min(first.max_seq_len + 1 + self.shape.depth, proposer.max_model_len),
            block_table_tensor=growth.table,
            slot_mapping=slot,
            causal=True,
        )
        _, per_layer = proposer.build_per_group_and_layer_attn_metadata(metadata, draft_index=1)
        mode, padded, across = proposer._determine_batch_execution_and_padding(n)
        proposer.input_ids[:n] = growth.tokens
        proposer.positions[:n] = positions
        with set_forward_context(
            per_layer,
            proposer.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across,
            cudagraph_runtime_mode=mode,
            slot_mapping=proposer._get_slot_mapping(padded, slot),
        ):
            out = proposer.model(
                input_ids=proposer.input_ids[:padded], positions=proposer.positions[:padded], inputs_embeds=None
            )
        return out[:n]

    def _pages(self, target: bool) -> Pages:
        runner, drafts = self._runner, self._proposer._draft_attn_layer_names
        layers = runner.compilation_config.static_forward_context
        return pages_of(layers, runner.kv_cache_config, lambda name: (name in drafts) != target)


def over_rows(rows: Rows, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """The metadata of a target pass, by rows in place of requests."""
    bound, prefilling = metadata.seq_lens_cpu_upper_bound, metadata.is_prefilling
    of = torch.from_numpy(rows.request)
    return metadata.replace(
        query_start_loc=rows.on.begin.int(),
        query_start_loc_cpu=torch.from_numpy(rows.begin),
        seq_lens=rows.seq_lens.to(metadata.seq_lens.dtype),
        seq_lens_cpu_upper_bound=None if bound is None else bound[of],
        num_reqs=len(rows.request),
        max_query_len=int(rows.length.max()),
        block_table_tensor=rows.pages,
        is_prefilling=None if prefilling is None else prefilling[of],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


# --- what patches.py puts into vLLM -----------------------------------------------------------------------------------


def rounds_of(runner: Any) -> TreeRounds | None:
    """The trees of a V1 model runner; None: it drafts chains, or nothing."""
    return getattr(getattr(runner, "drafter", None), "tree", None)


def prepare_inputs(original: Callable[..., Any], runner: Any, scheduler_output: Any, scheduled: np.ndarray) -> Any:
    """GPUModelRunner._prepare_inputs."""
    found = original(runner, scheduler_output, scheduled)
    if (tree := rounds_of(runner)) is not None:
        tree.lay_out(found[1], scheduled)
        runner.rejection_sampler.tree = tree if tree.rows is not None else None
    return found


def fits_in_drafter(original: Callable[..., Any], runner: Any, metadata: Any) -> bool:
    """GPUModelRunner._input_fits_in_drafter, for the depth of a tree: vLLM adds all drafts of all rows, twice."""
    tree = rounds_of(runner)
    if tree is None or metadata is None:
        return original(runner, metadata)
    others = tree.shape.drafts - tree.shape.depth - runner.speculative_config.use_dflash()
    return metadata.max_seq_len - others + tree.shape.depth <= runner.effective_drafter_max_model_len


def build_attention_metadata(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """GPUModelRunner._build_attention_metadata."""
    tree = rounds_of(runner)
    token = ROWS.set(None if tree is None else tree.rows_waiting())
    try:
        return original(runner, *args, **kwargs)
    finally:
        ROWS.reset(token)


def build_metadata(original: Callable[..., Any], group: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
    """AttentionGroup.build_metadata."""
    rows = ROWS.get()
    return original(group, metadata if rows is None else over_rows(rows, metadata), *args, **kwargs)


def reject(
    original: Callable[..., Any], sampler: Any, metadata: Any, draft_probs: Any, logits: Tensor, sampling: Any
) -> Any:
    """RejectionSampler.forward."""
    tree = vars(sampler).get("tree")
    if tree is None:
        return original(sampler, metadata, draft_probs, logits, sampling)
    sampler.tree = None
    return tree.verify(sampler, functools.partial(original, sampler), metadata, logits, sampling)
