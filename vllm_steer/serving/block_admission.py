"""Decide in the front end how a block drafter's drafts depend on each other, and refuse by name what cannot be served.

A DFlash drafter or Medusa heads without a bigram are vLLM's own business and are left alone.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.drafters.block import checkpoint, ngram
from vllm_steer.drafters.block.config import CANDIDATE_HEADS, KINDS, METHODS, BlockConfig, kind_of
from vllm_steer.drafters.steered.checkpoint import has_steering
from vllm_steer.serving import patching, tree_admission
from vllm_steer.serving.block_plan import BLOCK, BlockPlan, block_plan
from vllm_steer.serving.kill_switch import KILL_SWITCH
from vllm_steer.serving.plan import Options, Written, on_v2

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.steer")


def admit(vllm_config: VllmConfig, options: Options, off: bool) -> None:
    """Write the plan of a block drafter into its config; repeatable. Leaves every other drafter untouched.

    Raises SteeringError for a drafter or a bigram that is damaged or of another target, and for what does not go
    together.
    """
    spec: Any = vllm_config.speculative_config
    if spec is None or spec.method not in METHODS.values():
        if options.refines and not off:
            raise SteeringError(
                "additional-config vllm_steer names ngram or alpha, which are for block drafters: give "
                f"--speculative-config with one ({', '.join(KINDS)})"
            )
        return
    draft = spec.draft_model_config
    if block_plan(vllm_config) is not None or getattr(draft.hf_config, BLOCK, None) is not None:
        return  # a copy
    kind = _kind(vllm_config, draft, options)
    if kind is None:
        return
    if off:
        setattr(draft.hf_config, BLOCK, Written())
        if kind == "treeflash":
            logger.warning("%s is set: %s drafts without its approximator", KILL_SWITCH, draft.model)
        return
    _refuse_steering(draft, options)
    plan = _plan(vllm_config, draft, kind, options)
    if plan.repairs:
        _require_served(vllm_config, plan)
        patching.require(v2=on_v2(vllm_config), part="medusa" if kind == "medusa" else "blocks")
    setattr(draft.hf_config, BLOCK, Written(asdict(plan)))
    if plan.tree_rows is not None:
        tree_admission.admit(vllm_config, TreeShape((plan.tree_rows, *[1] * (spec.num_speculative_tokens - 1))))


def _kind(vllm_config: Any, draft: Any, options: Options) -> str | None:
    names = getattr(draft.hf_config, "architectures", None) or []
    heads = [name for name in names if name in CANDIDATE_HEADS]
    if heads and not on_v2(vllm_config):
        raise SteeringError(
            f"{draft.model} has the candidate head {heads[0]}, which vLLM serves on its V2 runner only: set "
            "VLLM_USE_V2_MODEL_RUNNER=1, or V1 drafts without it"
        )
    kind = kind_of(draft.hf_config)
    if kind is None and options.refines:
        raise SteeringError(
            f"{draft.model} is {', '.join(names) or 'of no known architecture'}, whose drafts cannot be refined: drop "
            "ngram and alpha from additional-config vllm_steer"
        )
    return kind


def _refuse_steering(draft: Any, options: Options) -> None:
    asked = {
        "a steering adapter (adapter)": options.adapter is not None,
        "steering of its own (a steering/ folder)": has_steering(draft.model),
        "a tree with children at every depth (tree; give tree_rows)": options.tree is not None,
        "draft graphs (draft_graphs), vLLM has its own for it": options.draft_graphs,
    }
    for name, there in asked.items():
        if there:
            raise SteeringError(
                f"{draft.model} is a block drafter, and {name} does not go with one: drop that. (DFlash reads the "
                "target's states already; steering it gained nothing over equal training.)"
            )


def _plan(vllm_config: Any, draft: Any, kind: str, options: Options) -> BlockPlan:
    local, k = Path(draft.model).is_dir(), vllm_config.speculative_config.num_speculative_tokens
    target = vllm_config.model_config.hf_config
    where = draft.model if local and ngram.has_ngram(draft.model) else None
    where = options.ngram if options.ngram is not None else where
    if local:
        config = BlockConfig.read(draft.model)
        if kind == "treeflash" or where or checkpoint.read_record(draft.model) is not None:
            config.check_target(target)
            checkpoint.load(draft.model)
            if k > config.draft_length:
                logger.warning(
                    "num_speculative_tokens=%d is more than the %d that %s was trained for: later drafts will be "
                    "accepted less", k, config.draft_length, draft.model,
                )  # fmt: skip
    if not options.refine:
        return BlockPlan("dflash" if kind == "treeflash" else kind, None, 0.0, 0.0, options.tree_rows)
    if where is None:
        if options.alpha is not None:
            raise SteeringError(
                f"alpha is {options.alpha}, and {draft.model} has no ngram/ that it could weigh: give ngram"
            )
        return BlockPlan(kind, None, 0.0, 0.0, options.tree_rows)
    if kind == "treeflash":
        raise SteeringError(
            f"{draft.model} knows the token before by its approximator: a bigram refines a drafter that does not; drop "
            "ngram, or set refine to false"
        )
    found = ngram.load(where).config
    if found.vocab_size != (size := vllm_config.model_config.get_vocab_size()):
        raise SteeringError(
            f"{where}/ngram counts {found.vocab_size} tokens, the target has {size}: it is of another one"
        )
    greedy, sampled = (options.alpha if options.alpha is not None else x for x in (found.alpha, found.alpha_sampled))
    return BlockPlan(kind, str(where), float(greedy), float(sampled), options.tree_rows)


def _require_served(vllm_config: Any, plan: BlockPlan) -> None:
    spec, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    refused = {
        "pipeline parallelism (pipeline_parallel_size > 1)": parallel.pipeline_parallel_size > 1,
        "use_local_argmax_reduction": spec.use_local_argmax_reduction,
        "heterogeneous vocabularies": getattr(spec, "use_heterogeneous_vocab", False),
        "a tree of Medusa heads (tree_rows)": plan.kind == "medusa" and plan.tree_rows is not None,
        "tensor parallelism on Medusa heads": plan.kind == "medusa" and parallel.tensor_parallel_size > 1,
    }
    for name, asked in refused.items():
        if asked:
            raise SteeringError(
                f"drafts that depend on each other do not work with {name} yet: turn that off, set refine to false, or "
                f"set {KILL_SWITCH}=1"
            )
