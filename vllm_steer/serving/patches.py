"""Every replacement this plugin makes in vLLM, in one table: what, why, and when it can go.

How one is applied is in patching.py; workers are named as "module:Class", which only a worker imports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pkgutil import resolve_name
from typing import Any

from vllm_steer.serving import admission, block_seams, patching, repairs
from vllm_steer.serving.block_plan import config_of
from vllm_steer.serving.block_seams import has_medusa
from vllm_steer.serving.patching import Seam, late
from vllm_steer.serving.plan import Plan, tree_of

V1 = "vllm_steer.serving.spec_decode.v1"
V2 = "vllm_steer.serving.spec_decode.v2"
BLOCK_V2 = "vllm_steer.serving.spec_decode.block_v2"
TREE_V1 = "vllm_steer.serving.spec_decode.tree_v1"
TREE_V2 = "vllm_steer.serving.spec_decode.tree_v2"
PROPOSER = "vllm.v1.spec_decode.draft_model:DraftModelProposer"  # vLLM's, of V1
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator"  # of V2
DFLASH = "vllm.v1.spec_decode.dflash:DFlashProposer"
_being_checked = ContextVar("whether vLLM is checking a VllmConfig", default=False)


def install() -> None:
    """Apply the table, see `patching.install`."""
    patching.install(SEAMS)


def _checked_post_init(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        token = _being_checked.set(True)
        try:
            admission.prepare(self)
            original(self, *args, **kwargs)
        finally:
            _being_checked.reset(token)

    return __post_init__


def _methods(of: str, *names: str) -> tuple[str, ...]:
    """Methods of a class, as `Seam.needs` has them."""
    return tuple(f"{of}.{name}" for name in names)


def _steered_proposer(original: type) -> type:
    return resolve_name(f"{V1}:SteeredDraftModelProposer")


def _steered_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_speculator(*args: Any, **kwargs: Any) -> Any:
        return _speculator(*args, **kwargs) or original(*args, **kwargs)

    return init_speculator


def _speculator(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    module = V2 if config_of(vllm_config) is None else BLOCK_V2
    return resolve_name(f"{module}:speculator")(vllm_config, *args, **kwargs)


def _block_seam(place: str, make: Callable[[Any], Any], why: str, remove_when: str, **more: Any) -> Seam:
    module, name = place.split(":")
    return Seam(module, name, make, patching.never, why, remove_when, required=False, **({"part": "blocks"} | more))


def _lookahead_of_rows(original: property) -> property:
    def num_lookahead_tokens(self: Any) -> int:
        shape = tree_of(self)
        # While it checks a configuration, vLLM 0.33 compares this with the tokens of a batch, which rows are not.
        if shape is None or _being_checked.get():
            return original.__get__(self)
        return shape.lookahead(self.cache_config.block_size)

    return property(num_lookahead_tokens)


def _tree_seams(runner: str, module: str, places: dict[str, str]) -> list[Seam]:
    """Of draft trees: each place goes through a function of `module`."""
    why = "a draft tree is served as rows, which stand for their request in the target's pass"
    made = {place: patching.through(module, function) for place, function in places.items()}
    return patching.seams_of("trees", runner, made, why, "vLLM serves draft trees")


def _lenience_seams(runner: str, places: dict[str, str]) -> list[Seam]:
    """Of lenience: what of its module is made of each place."""
    made = {place: late(f"vllm_steer.serving.sampling.lenience:{name}") for place, name in places.items()}
    why = "accept drafts that the target would have rejected, where an engine is told to"
    return patching.seams_of("lenience", runner, made, why, "vLLM has lenience, f(p) / q in place of p / q")


def _load_with_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if Plan.of(self.vllm_config) is not None:
            self.use_aux_hidden_state_outputs = True
        return original(self, *args, **kwargs)

    return load_model


def _with_sampling_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.speculator is not None:
            self.speculator.sampling_states = getattr(self.sampler, "sampling_states", None)
        return original(self, *args, **kwargs)

    return initialize_kv_cache


MEDUSA = (
    (
        _block_seam(
            "vllm.v1.worker.gpu_model_runner:MedusaProposer",
            block_seams.refined_medusa,
            "the V1 runner builds its proposer, and checks isinstance, by this name",
            "vLLM asks plugins for the proposer of a block drafter",
            runner="v1",
            part="medusa",
        ),
        _block_seam(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
            block_seams.with_newest_tokens,
            "vLLM does not tell Medusa heads the newest token of a request",
            "vLLM's Medusa proposer is given the sampled tokens",
            runner="v1",
            part="medusa",
        ),
    )
    if has_medusa()
    else ()
)

SEAMS = (
    Seam(
        module="vllm.config.vllm",
        name="VllmConfig.__post_init__",
        make=_checked_post_init,
        upstream=functools.partial(patching.join, "vllm.config.vllm:config_hooks", admission.prepare),
        why="recognise a steered drafter, validate it in the front end, and salt the compile caches",
        remove_when="vLLM lets a plugin look at a new VllmConfig: validate it, extend it",
        alarm="this vLLM cannot be told to refuse a steered drafter, and may serve it unsteered",
    ),
    Seam(
        module="vllm.v1.worker.gpu_model_runner",
        name="DraftModelProposer",
        make=_steered_proposer,
        upstream=functools.partial(
            patching.join, "vllm.v1.spec_decode.draft_model:proposer_factories", late(f"{V1}:proposer")
        ),
        why="the V1 runner builds its proposer, and checks isinstance, by this name",
        remove_when="vLLM asks plugins for the proposer of a draft model",
        needs=_methods(
            PROPOSER,
            *("_get_model", "propose", "prepare_inputs_padded"),
            *("set_inputs_first_pass", "_update_positions_dependent_metadata", "_sample_from_logits"),
        ),
        runner="v1",
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="init_speculator",
        make=_steered_init_speculator,
        upstream=functools.partial(patching.join, "vllm.v1.worker.gpu.spec_decode:speculator_factories", _speculator),
        why="the V2 runner builds its speculator here",
        remove_when="vLLM asks plugins for the speculator of a configuration",
        needs=_methods(
            SPECULATOR,
            *("load_draft_model", "propose", "_multi_step_decode"),
            *("init_cudagraph_manager", "capture"),
        ),
        runner="v2",
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="GPUModelRunner.load_model",
        make=_load_with_states,
        upstream=functools.partial(
            patching.asked, "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.needs_aux_hidden_states"
        ),
        why="V2 switches auxiliary target states on by method name, before the model is loaded",
        remove_when="the V2 runner asks the speculator whether it needs auxiliary states",
        runner="v2",
    ),
    Seam(
        module="vllm.v1.sample.rejection_sampler",
        name="expand_batch_to_tokens",
        make=repairs.expand_that_writes,
        upstream=lambda: patching.sound(repairs.expand_writes),
        why=(
            "a defect of vLLM 0.32 on CPU: per-request temperatures are cast to int64 and expanded into a copy that is "
            "thrown away, so sampled speculation divides by uninitialised memory and does not have the target's "
            "distribution"
        ),
        remove_when="vllm/utils/cpu_triton_utils.py:_expand_kernel_impl writes fractions into the tensor it is given",
        runner="v1",
        required=False,
    ),
    Seam(
        module="vllm.v1.sample.ops.topk_topp_sampler",
        name="apply_top_k_only",
        make=repairs.top_k_of_no_rows,
        upstream=lambda: patching.sound(repairs.top_k_takes_no_rows),
        why=(
            "a defect of vLLM 0.32 on CPU: top_k without top_p takes the maximum of no rows when no drafts are to be "
            "verified, which ends the engine"
        ),
        remove_when="vllm/v1/sample/ops/topk_topp_sampler.py:apply_top_k_only accepts logits without rows",
        runner="v1",
        required=False,
    ),
    Seam(
        module="vllm.v1.spec_decode.draft_model",
        name="DraftModelProposer",
        make=repairs.in_own_kv_cache_groups,
        upstream=functools.partial(
            patching.asked, "vllm.v1.spec_decode.draft_model:DraftModelProposer.common_attn_metadata_of_group"
        ),
        why=(
            "a defect of vLLM 0.32: a draft model is given the block table of KV cache group 0 and overwrites the "
            "target's KV cache where that group is not its own; layers in several groups end the engine"
        ),
        remove_when="the V1 runner gives a draft model the block tables of its own KV cache groups",
        needs=_methods(
            PROPOSER,
            *("initialize_attn_backend", "set_inputs_first_pass"),
            *("_get_slot_mapping", "build_per_group_and_layer_attn_metadata"),
        ),
        runner="v1",
    ),
    Seam(
        module="vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator",
        name="StandaloneARSpeculator.load_draft_model",
        make=repairs.load_with_own_window,
        upstream=functools.partial(
            patching.asked,
            "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator.draft_sliding_window",
        ),
        why=(
            "a defect of vLLM 0.32: a draft model gets the sliding window of a target whose layers are all alike, in "
            "place of its own, and is accepted less beyond it"
        ),
        remove_when="the V2 runner gives a draft model the sliding window of its own config",
        runner="v2",
        required=False,
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="GPUModelRunner.initialize_kv_cache",
        make=_with_sampling_states,
        upstream=functools.partial(
            patching.asked, "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.sampling_states"
        ),
        why="V2 tells a speculator the temperature and the seed of each request, but not its top-k and top-p",
        remove_when="the V2 runner gives its speculator the sampling states of the target's sampler",
        needs=_methods(SPECULATOR, "propose", "compute_draft_logits"),
        runner="v2",
        required=False,
    ),
    Seam(
        module="vllm.config.vllm",
        name="VllmConfig.num_lookahead_tokens",
        make=_lookahead_of_rows,
        upstream=patching.never,
        why="the rows of a draft tree write to pages of their own, which are lookahead to the scheduler",
        remove_when="vLLM asks the drafter how much lookahead it needs",
        required=False,
        part="trees",
    ),
    *_tree_seams(
        "v1",
        TREE_V1,
        {
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": "prepare_inputs",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": "fits_in_drafter",
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": "build_attention_metadata",
            "vllm.v1.worker.utils:AttentionGroup.build_metadata": "build_metadata",
            "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": "reject",
        },
    ),
    *_tree_seams(
        "v2",
        TREE_V2,
        {
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": "prepare_inputs",
            "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn": "prepare_attn",
            "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": "over_rows",
            "vllm.v1.worker.gpu.spec_decode.rejection_sampler:RejectionSampler.__call__": "reject",
        },
    ),
    _block_seam(
        "vllm.model_executor.models.registry:ModelRegistry",
        block_seams.with_treeflash,
        "the architecture of TreeFlash is not among vLLM's models; nothing of the registry is changed, it is added to",
        "vLLM serves TreeFlash",
    ),
    _block_seam(
        "vllm.v1.worker.gpu_model_runner:DFlashProposer",
        block_seams.repaired_dflash,
        "the V1 runner builds its proposer, and checks isinstance, by this name",
        "vLLM asks plugins for the proposer of a block drafter",
        needs=_methods(
            DFLASH, *("prepare_inputs_padded", "set_inputs_first_pass", "_sample_draft_tokens", "_sample_from_logits")
        ),
        runner="v1",
    ),
    *MEDUSA,
    *_lenience_seams(
        "v1",
        {
            "vllm.v1.worker.gpu_model_runner:RejectionSampler": "of_the_engine",
            "vllm.v1.sample.rejection_sampler:rejection_sample": "lenient_rejection_sample",
            "vllm.v1.sample.rejection_sampler:generate_uniform_probs": "shrunk_uniforms",
        },
    ),
    *_lenience_seams(
        "v2",
        {
            "vllm.v1.worker.gpu.model_runner:RejectionSampler": "of_the_engine",
            "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:_rejection_kernel": "LenientKernel",
        },
    ),
)
