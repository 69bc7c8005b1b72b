"""The code that patches.py puts in place of defects of vLLM 0.32, and how each defect is recognised.

None of it depends on steering: plain draft models get these repairs too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PADDING_SLOT = -1  # vLLM's: nothing is written to the KV cache there


def expand_writes() -> bool:
    """Whether vLLM's own expansion of per-request values gives the right result on a CPU."""
    try:
        from vllm.utils.cpu_triton_utils import _expand_kernel_impl

        output = torch.zeros(3)
        _expand_kernel_impl(output, torch.tensor([0.5, 2.0]), torch.tensor([2, 3], dtype=torch.int32), 2, 1)
    except (ImportError, AttributeError, TypeError):  # not a CPU build, or another signature
        return False
    return output.tolist() == [0.5, 0.5, 1.0]


def expand_that_writes(original: Callable[..., Any]) -> Callable[..., Any]:
    """`expand_batch_to_tokens` of vLLM's rejection sampler, in plain torch on a CPU."""

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts)

    return expand_batch_to_tokens


def top_k_takes_no_rows() -> bool:
    """Whether vLLM's own top-k mask, in plain torch, accepts a batch without rows."""
    try:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_only

        apply_top_k_only(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int32))
    except (ImportError, RuntimeError):
        return False
    return True


def top_k_of_no_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_top_k_only` of vLLM's sampler, which also takes a batch without rows."""

    @functools.wraps(original)
    def apply_top_k_only(logits: Tensor, k: Tensor) -> Tensor:
        return original(logits, k) if len(logits) else logits

    return apply_top_k_only


def with_own_window(config: Any, draft: Any) -> Any:
    """A VllmConfig with the window that all layers of the draft model have, or with none.

    The one it comes with is that of the target. Models whose layers differ tell every layer its own.
    """
    from vllm.config.utils import replace

    kinds = getattr(draft.hf_text_config, "layer_types", None)
    alike = kinds is None or set(kinds) == {"sliding_attention"}
    window = draft.get_sliding_window() if alike else None
    if window == config.cache_config.sliding_window:
        return config
    return replace(config, cache_config=replace(config.cache_config, sliding_window=window))


def load_with_own_window(original: Callable[..., Any]) -> Callable[..., Any]:
    """`load_draft_model` of vLLM's V2 speculator for whole models."""

    @functools.wraps(original)
    def load_draft_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = self.vllm_config
        self.vllm_config = with_own_window(whole, self.draft_model_config)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.vllm_config = whole

    return load_draft_model


Proposer: Any = object  # for the type checker: the class that this is mixed into has all that is used here


class OwnKVCacheGroups(Proposer):
    """Mixed into vLLM's V1 DraftModelProposer: every KV cache group that holds layers of the draft model gets the block
    table and the slots of that group.

    vLLM 0.32 hands the proposer the block table of group 0, which is the target's where target and drafter do not share
    one group: the drafter then overwrites the target's KV cache. And it allows the drafter one group only.
    """

    _draft_attn_layer_names: Any  # vLLM's: a set of names
    draft_attn_groups: Any  # vLLM's: a list of its AttentionGroup

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None):
        super().__init__(vllm_config=vllm_config, device=device, runner=runner)
        self.runner = runner
        self._slots: dict[int, Tensor] = {}  # of every group but the first: [max_positions] int64

    def _create_draft_vllm_config(self) -> Any:
        return with_own_window(super()._create_draft_vllm_config(), self.draft_model_config)

    def initialize_attn_backend(self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None) -> None:
        """Build attention groups for the draft layers, group by group of the KV cache."""
        names, groups = self._draft_attn_layer_names, []
        for group in kv_cache_config.kv_cache_groups:
            if here := names & set(group.layer_names):
                self._draft_attn_layer_names = here  # vLLM's method builds those of one KV cache group
                super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
                groups += self.draft_attn_groups
        self._draft_attn_layer_names, self.draft_attn_groups = names, groups
        self.kv_cache_gid, self.block_size = groups[0].kv_cache_group_id, groups[0].kv_cache_spec.block_size
        others = {group.kv_cache_group_id for group in groups} - {self.kv_cache_gid}
        self._slots = {i: torch.full_like(self._slot_mapping_buffer, PADDING_SLOT) for i in others}

    def set_inputs_first_pass(
        self,
        target_token_ids: Tensor,
        next_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        token_indices_to_sample: Tensor | None,
        cad: Any,
        num_rejected_tokens_gpu: Tensor | None,
    ) -> tuple[int, Tensor, Any]:
        """As vLLM's, with the block table of the drafter's first group; all later passes use what this returns."""
        own = self._block_table(self.kv_cache_gid).get_device_tensor(cad.num_reqs)
        return super().set_inputs_first_pass(
            target_token_ids,
            next_token_ids,
            target_positions,
            target_hidden_states,
            token_indices_to_sample,
            cad.replace(block_table_tensor=own),
            num_rejected_tokens_gpu,
        )

    def build_per_group_and_layer_attn_metadata(
        self, common_attn_metadata: Any, draft_index: int = 0
    ) -> tuple[list[object], dict[str, object]]:
        """Attention metadata of one draft pass: for every attention group, and for every layer by name."""
        cads = {self.kv_cache_gid: common_attn_metadata}
        for gid in self._slots:
            cads[gid] = self.common_attn_metadata_of_group(gid, common_attn_metadata)
        per_group: list[object] = []
        per_layer: dict[str, object] = {}
        for group in self.draft_attn_groups:
            metadata = group.build_metadata_for_drafting(
                common_attn_metadata=cads[group.kv_cache_group_id], draft_index=draft_index
            )
            per_group.append(metadata)
            per_layer |= dict.fromkeys(group.layer_names, metadata)
        return per_group, per_layer

    def common_attn_metadata_of_group(self, gid: int, cad: Any) -> Any:
        """Metadata of one more KV cache group: the same rows and positions, its own blocks and slots."""
        table, rows = self._block_table(gid), len(cad.slot_mapping)
        blocks = table.get_device_tensor(cad.num_reqs)
        positions = self.positions[:rows].clamp(max=self.max_model_len - 1)
        requests = torch.repeat_interleave(self.arange[: cad.num_reqs], cad.naive_query_lens(), output_size=rows)
        slots = blocks[requests, positions // table.block_size] * table.block_size + positions % table.block_size
        buffer = self._slots[gid].fill_(PADDING_SLOT)
        buffer[:rows] = slots.masked_fill(cad.slot_mapping == PADDING_SLOT, PADDING_SLOT)
        return cad.replace(block_table_tensor=blocks, slot_mapping=buffer[:rows])

    def _get_slot_mapping(self, num_tokens: int, slot_mapping: Tensor | None = None) -> dict[str, Tensor]:
        slots = super()._get_slot_mapping(num_tokens, slot_mapping)
        for group in self.draft_attn_groups:
            if (own := self._slots.get(group.kv_cache_group_id)) is not None:
                slots |= dict.fromkeys(group.layer_names, own[:num_tokens])
        return slots

    def _block_table(self, gid: int) -> Any:
        return self.runner.input_batch.block_table[gid]


def in_own_kv_cache_groups(original: type) -> type:
    """vLLM's DraftModelProposer with OwnKVCacheGroups mixed in."""
    return type(original.__name__, (OwnKVCacheGroups, original), {"__module__": original.__module__})
