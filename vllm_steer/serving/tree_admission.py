"""Decide in the front end whether an engine can draft trees, and refuse by name what cannot.

The user gives the depth k as num_speculative_tokens. vLLM is told the number of draft tokens of all rows, before it
derives any size from it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving import patching
from vllm_steer.serving.kill_switch import KILL_SWITCH
from vllm_steer.serving.plan import TREE, Options, Written, on_v2, tree_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.steer")

MOST_DRAFTS = 128  # vllm/v1/sample/rejection_sampler.py: MAX_SPEC_LEN


def admit(vllm_config: VllmConfig, shape: TreeShape) -> None:
    """Write the tree into the draft model's config, and the number of its draft tokens into vLLM's; repeatable.

    Raises SteeringError for a tree that cannot be served as asked.
    """
    if tree_of(vllm_config) is not None:
        return  # a copy
    spec: Any = vllm_config.speculative_config
    k = spec.num_speculative_tokens
    if shape.depth != k:
        raise SteeringError(
            f"the tree {shape} is {shape.depth} deep and num_speculative_tokens is {k}: give both the same length"
        )
    patching.require(v2=on_v2(vllm_config), part="trees")
    _refuse_unsupported(vllm_config)
    _require_room(vllm_config, shape)
    setattr(spec.draft_model_config.hf_config, TREE, Written(widths=list(shape.widths), adaptive=shape.adaptive))
    spec.num_speculative_tokens = shape.drafts
    _without_full_graphs(vllm_config)


def say_so(vllm_config: Any, shape: TreeShape) -> None:
    """Log, in a worker, which tree is drafted and what it reserves.

    Raises SteeringError where that is the whole context: vLLM may have chosen the block size after `admit`.
    """
    block = vllm_config.cache_config.block_size
    _require_context(shape, block, vllm_config.model_config.max_model_len)
    logger.info(
        "draft trees are on: %s, %d rows of %d tokens to verify for each request, which reserve %d slots of its KV "
        "cache beyond its tokens",
        f"a tree {shape}, parting where the drafter is unsure" if shape.adaptive else shape,
        shape.leaves,
        shape.depth + 1,
        shape.lookahead(block),
    )


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel, spec, model = vllm_config.parallel_config, vllm_config.speculative_config, vllm_config.model_config
    draft = spec.draft_model_config
    models = [model, draft]
    refused = {
        "pipeline parallelism (pipeline_parallel_size > 1)": parallel.pipeline_parallel_size > 1,
        "data parallelism (data_parallel_size > 1)": parallel.data_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "ubatching (enable_dbo)": bool(getattr(parallel, "use_ubatching", False)),
        "batch-sharded sampling": getattr(parallel, "enable_batch_sharded_sampling", False),
        "KV connectors (kv_transfer_config)": vllm_config.kv_transfer_config is not None,
        "parallel drafting": spec.parallel_drafting and spec.method != "dflash",
        "a draft length that varies (num_speculative_tokens_per_batch_size)": bool(
            getattr(spec, "num_speculative_tokens_per_batch_size", None)
        ),
        "adaptive verification": getattr(spec, "enable_adaptive_verification", False),
        f"rejection_sample_method {spec.rejection_sample_method!r}": spec.rejection_sample_method != "standard",
        "watermarking": getattr(vllm_config, "watermark_config", None) is not None,
        "use_local_argmax_reduction": spec.use_local_argmax_reduction,
        "heterogeneous vocabularies": getattr(spec, "use_heterogeneous_vocab", False),
        "multimodal targets": bool(model.is_multimodal_model),
        "models with M-RoPE positions": any(each.uses_mrope for each in models),
        "MLA attention": any(each.use_mla for each in models),
        "hybrid or state-space models": any(each.is_hybrid or each.is_attention_free for each in models),
        "sliding windows": any(each.get_sliding_window() is not None for each in models),
        "custom logits processors": bool(getattr(model, "logits_processors", None)),
        "draft graphs (vllm_steer: draft_graphs)": Options.read(vllm_config.additional_config).draft_graphs,
    }
    for name, asked in refused.items():
        if asked:
            raise SteeringError(
                f"draft trees do not work with {name} yet: turn that off, drop the tree (then a chain is drafted), or "
                f"set {KILL_SWITCH}=1"
            )


def _require_room(vllm_config: Any, shape: TreeShape) -> None:
    scheduler = vllm_config.scheduler_config
    if shape.drafts > MOST_DRAFTS:
        raise SteeringError(
            f"the tree {shape} has {shape.leaves} rows of {shape.depth + 1} tokens, {shape.drafts} draft "
            f"tokens for vLLM, which verifies {MOST_DRAFTS} at most: give a smaller tree"
        )
    rows = scheduler.max_num_seqs * shape.leaves
    if rows >= scheduler.max_num_batched_tokens:
        raise SteeringError(
            f"a full batch of max_num_seqs {scheduler.max_num_seqs} requests drafts {rows} rows at a time, allowed are "
            f"less than max_num_batched_tokens {scheduler.max_num_batched_tokens}: lower --max-num-seqs to "
            f"{(scheduler.max_num_batched_tokens - 1) // shape.leaves}, raise --max-num-batched-tokens, or give a "
            "smaller tree"
        )
    _require_context(shape, vllm_config.cache_config.block_size, vllm_config.model_config.max_model_len)


def _require_context(shape: TreeShape, block: int | None, length: int) -> None:
    if block is not None and shape.lookahead(block) >= length:
        raise SteeringError(
            f"the rows of the tree {shape} need {shape.lookahead(block)} slots of a request's KV cache at "
            f"a block size of {block}, the context is {length}: give --block-size 16 or 32, or a smaller tree"
        )


def _without_full_graphs(vllm_config: Any) -> None:
    """Full CUDA graphs hold the shapes of requests; rows are as many as the batch has."""
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or mode.has_full_cudagraphs():
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        logger.info("draft trees: cudagraph_mode is PIECEWISE")
