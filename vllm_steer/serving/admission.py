"""Decide in the front end whether an engine is steered, and refuse what cannot be served.

The decision is written into the draft model's Hugging Face config (plan.py). That travels to every worker and is part
of vLLM's compile-cache key for the target and for the drafter, so no compiled artifact of an unsteered run is reused.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair
from vllm_steer.serving import block_admission, lenience_admission, patching, tree_admission
from vllm_steer.serving.block_plan import block_plan
from vllm_steer.serving.kill_switch import KILL_SWITCH, disabled
from vllm_steer.serving.plan import LAYER_IDS, PLAN, Options, Plan, Written, draft_model, on_v2, source_of, written

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.steer")


def prepare(vllm_config: VllmConfig) -> None:
    """Look at a new engine configuration; if it names a steered drafter, check everything and write the plan.

    Raises SteeringError for a steered drafter that cannot be served as asked, for any drafter with prompt embeddings or
    (V2) beside data-parallel experts, and for a kill switch that is neither on nor off. Leaves all others untouched.
    """
    off = disabled()
    options = Options.read(vllm_config.additional_config)
    _refuse_prompt_embeds(vllm_config)
    lenience_admission.admit(vllm_config, options)
    block_admission.admit(vllm_config, options, off)
    draft = draft_model(vllm_config)
    if draft is None:
        if options.adapter is not None and not off:
            raise SteeringError(
                f"additional-config names the steering adapter {options.adapter!r}, but no draft model is configured: "
                "give --speculative-config with the adapter's base drafter as model"
            )
        if (tree := options.shape(1)) is not None and not off and block_plan(vllm_config) is None:
            raise SteeringError(
                f"additional-config names the tree {tree}, but no draft model is configured: give "
                "--speculative-config with a draft model, steered or plain"
            )
        return
    _refuse_parallel_experts(vllm_config)
    if options.draft_graphs and not on_v2(vllm_config):
        raise SteeringError(
            "additional-config vllm_steer: draft_graphs is for vLLM's V2 runner, this engine has V1, which captures "
            "draft models itself: drop draft_graphs, or set VLLM_USE_V2_MODEL_RUNNER=1"
        )
    if written(vllm_config) is None:
        _prepare_steered(vllm_config, draft, options, off)
    spec: Any = vllm_config.speculative_config
    tree = options.shape(spec.num_speculative_tokens)
    if tree is not None and not off:
        tree_admission.admit(vllm_config, tree)


def _prepare_steered(vllm_config: VllmConfig, draft: Any, options: Options, off: bool) -> None:
    """Write the plan of a steered drafter. vLLM copies configurations, and every copy passes `prepare` again."""
    source, revision = source_of(draft, options)
    if source is None:
        return  # a plain draft model is vLLM's own business; a further kind of drafter is recognised here
    if off:
        logger.warning("%s is set: the steered drafter %s runs unsteered", KILL_SWITCH, source)
        setattr(draft.hf_config, PLAN, Written())  # not every worker is given this process's environment
        return
    patching.require(v2=on_v2(vllm_config))
    plan = _admit_steered(vllm_config, draft, options, source, revision)
    setattr(draft.hf_config, PLAN, Written(dataclasses.asdict(plan)))


def _admit_steered(vllm_config: VllmConfig, draft: Any, options: Options, source: str, revision: str | None) -> Plan:
    """Check a steered draft model against this engine. Raises SteeringError when it cannot be served as asked."""
    _refuse_unsupported(vllm_config)
    if options.adapters is not None and not Path(options.adapters).is_dir():
        raise SteeringError(
            f"additional-config vllm_steer: adapters is {options.adapters!r}, which is no directory: make it, or name "
            "the one below which the live switch may load others"
        )
    config = checkpoint.load_steering(source, revision).config
    spec = vllm_config.speculative_config
    assert spec is not None and spec.num_speculative_tokens is not None  # there is a draft model
    draft_length = spec.num_speculative_tokens
    check_pair(config, vllm_config.model_config.hf_config, draft.hf_config)
    _require_shares(vllm_config, config.drafter.intermediate_size)
    require_target_states(vllm_config.model_config)
    _warn_draft_length(config, draft_length)
    setattr(draft.hf_config, LAYER_IDS, list(config.target_layer_ids))
    return Plan(
        source=str(source),
        revision=revision,
        scale=float(options.scale),
        steered_layers=config.steered_layers,
        projection_size=config.projection_size,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_rows=max_rows(vllm_config),
        draft_length=draft_length,
    )


def max_rows(vllm_config: VllmConfig) -> int:
    """The most rows a forward of the drafter can have: a full batch with its newest tokens, or a padded graph."""
    scheduler = vllm_config.scheduler_config
    graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(scheduler.max_num_batched_tokens + scheduler.max_num_seqs, graph)


def _refuse_prompt_embeds(vllm_config: VllmConfig) -> None:
    """Refuse a drafter, steered or plain, whose prompts may have no token ids: the first one ends vLLM's V1 engine, and
    V2 drafts from other ids than the prompt's. N-grams do without them."""
    spec = vllm_config.speculative_config
    if spec is None or not getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        return
    v1 = not on_v2(vllm_config)
    if spec.uses_draft_model() or (v1 and spec.use_eagle()):
        raise SteeringError(
            f"prompt embeddings (--enable-prompt-embeds) do not work with the drafter of this server ({spec.method}), "
            "which needs the token ids of every prompt: drop --enable-prompt-embeds, or serve without "
            "--speculative-config"
        )


def _refuse_parallel_experts(vllm_config: VllmConfig) -> None:
    """Refuse a draft model, steered or plain, where vLLM's V2 runner ends with a bare assertion at the first batch."""
    size = vllm_config.parallel_config.data_parallel_size
    v2 = on_v2(vllm_config)
    if v2 and size > 1 and vllm_config.model_config.is_moe:
        raise SteeringError(
            f"data_parallel_size is {size} and the target is a mixture of experts: vLLM's V2 runner cannot draft with "
            "a draft model then. Serve with data_parallel_size 1 (several servers behind a load balancer do the same), "
            "or without --speculative-config"
        )


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel, spec = vllm_config.parallel_config, vllm_config.speculative_config
    assert spec is not None
    refused = {
        "pipeline parallelism (pipeline_parallel_size > 1)": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "parallel drafting": spec.parallel_drafting,
        "sleep mode, which loses the steering's weights,": vllm_config.model_config.enable_sleep_mode,
        "weight transfer, which can give the drafter new weights but not its steering,": getattr(
            vllm_config, "weight_transfer_config", None
        )
        is not None,
        "adaptive verification": getattr(spec, "enable_adaptive_verification", False),
        "heterogeneous vocabularies": getattr(spec, "use_heterogeneous_vocab", False),
        "lossy verification (rejection_sample_method 'fly')": spec.rejection_sample_method == "fly",
    }
    for name, asked in refused.items():
        if asked:
            raise SteeringError(
                f"a steered drafter does not work with {name} yet: turn that off, or set {KILL_SWITCH}=1 to serve "
                "the drafter unsteered"
            )
    v2 = on_v2(vllm_config)
    draft, length = spec.draft_model_config, vllm_config.model_config.max_model_len
    limits = hasattr(vllm_config, "_limit_max_model_len_to_draft")  # vLLM 0.33: lowers the server's context instead
    if v2 and draft.max_model_len < length and not limits:
        raise SteeringError(
            f"the drafter {draft.model!r} has a context of {draft.max_model_len} tokens, the server one of {length}; "
            f"vLLM's V2 runner drafts past the drafter's end and crashes: give --max-model-len {draft.max_model_len} "
            "or less, or use the V1 runner (VLLM_USE_V2_MODEL_RUNNER=0), which stops drafting there"
        )
    if not v2 and getattr(spec, "rejection_sample_method", "standard") == "block":
        raise SteeringError(
            "rejection_sample_method is 'block', which vLLM's V1 runner ignores: drop it, or use the V2 runner "
            "(VLLM_USE_V2_MODEL_RUNNER=1)"
        )


def _require_shares(vllm_config: VllmConfig, width: int) -> None:
    """Refuse here what vLLM would find in its workers, where the sentence is lost or there is none."""
    size, spec = vllm_config.parallel_config.tensor_parallel_size, vllm_config.speculative_config
    assert spec is not None
    if (asked := spec.draft_parallel_config.tensor_parallel_size) != size:
        raise SteeringError(
            f"draft_tensor_parallel_size is {asked}, tensor_parallel_size {size}: vLLM shards a draft model like its "
            f"target, so drop draft_tensor_parallel_size, or give {size}"
        )
    if width % size:
        raise SteeringError(
            f"tensor_parallel_size is {size}, which does not divide the drafter's FFN width (intermediate_size) "
            f"{width}: choose a size that does, or another drafter"
        )


def require_target_states(model_config: ModelConfig) -> None:
    """Raise SteeringError unless vLLM's class for this target can hand out the input of any layer."""
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.interfaces import supports_eagle3

    target = get_model_cls(model_config)
    if not supports_eagle3(target):
        raise SteeringError(
            f"vLLM's {target.__name__} cannot emit hidden states of its layers (SupportsEagle3), so "
            f"{model_config.model!r} cannot steer a drafter: choose a target of another family "
            f"(Llama, Qwen2, Qwen3, Mistral, ...), or set {KILL_SWITCH}=1"
        )


def _warn_draft_length(config: SteeringConfig, asked: int) -> None:
    if config.draft_length is not None and asked > config.draft_length:
        logger.warning(
            "num_speculative_tokens=%d is more than the draft length %d this steering was trained for; "
            "later positions will be accepted less",
            asked,
            config.draft_length,
        )
