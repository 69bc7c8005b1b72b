"""Decide in the front end whether an engine is steered, and refuse what cannot be served.

The decision is written into the draft model's Hugging Face config. That travels to every worker and is part of
vLLM's compile-cache key for the target and for the drafter, so no compiled artifact of an unsteered run is reused.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.steer")

KILL_SWITCH = "STEER_DISABLE"  # without the VLLM_ prefix: vLLM warns about, or refuses, names it does not know
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"  # where both model runners look for the target's layer ids
PLAN = "vllm_steer_plan"
OP_VERSION = 1  # raise when the injected computation changes: it salts the compile caches
MAX_SCALE = 100
OPTIONS = "vllm_steer"  # key in vLLM's --additional-config


@dataclass(frozen=True)
class Options:
    """`--additional-config '{"vllm_steer": {...}}'`."""

    adapter: str | None = None  # directory or hub id with a steering/ folder; the draft model is its base drafter
    revision: str | None = None  # of the adapter, on the hub
    scale: float = 1.0  # multiplies every delta; 0 drafts like the plain drafter

    @classmethod
    def read(cls, additional: Any) -> Options:
        """Parse our key of vLLM's additional config. Raises SteeringError on unknown keys or wrong types."""
        raw = additional.get(OPTIONS, {}) if isinstance(additional, dict) else {}
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(raw, dict):
            raise SteeringError(f"additional-config key {OPTIONS!r} is {raw!r}, allowed is an object with {known}")
        for key in raw:
            if key not in known:
                raise SteeringError(f"additional-config {OPTIONS}: unknown key {key!r}; allowed are {', '.join(known)}")
        options = cls(**raw)
        if isinstance(options.scale, bool) or not isinstance(options.scale, int | float):
            raise SteeringError(f"additional-config {OPTIONS}: scale is {options.scale!r}, allowed is a number")
        if not abs(options.scale) <= MAX_SCALE:
            allowed = f"-{MAX_SCALE} to {MAX_SCALE}"
            raise SteeringError(f"additional-config {OPTIONS}: scale is {options.scale}, allowed is {allowed}")
        for key in ("adapter", "revision"):
            if not isinstance(getattr(options, key), str | None):
                raise SteeringError(f"additional-config {OPTIONS}: {key} must be a string")
        return options


class Written(dict):
    """A plan in a Hugging Face config, empty where the kill switch decided against steering.

    Its type says that `prepare` wrote it: a file can give a plain dict only.
    """


@dataclass(frozen=True)
class Plan:
    """What a worker needs to steer, and what the compiled drafter depends on."""

    source: str  # directory or hub id whose steering/ is loaded
    revision: str | None
    scale: float
    steered_layers: tuple[int, ...]
    projection_size: int
    max_num_seqs: int
    draft_length: int
    op_version: int = OP_VERSION

    @staticmethod
    def of(vllm_config: VllmConfig) -> Plan | None:
        """The plan of an engine, or None when it is not steered.

        Raises SteeringError for a steered drafter that the front end did not look at, and for a plan that `prepare` did
        not write: both would go on unsteered.
        """
        written = _written(vllm_config)
        if written is None:
            _refuse_overlooked(vllm_config)
        return Plan(**{**written, "steered_layers": tuple(written["steered_layers"])}) if written else None


def _written(vllm_config: VllmConfig) -> Written | None:
    """What `prepare` decided for a drafter, None if it has not.

    Raises SteeringError for a forged config.json, or a plan that lost its type on the way to a worker.
    """
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    raw = getattr(getattr(draft, "hf_config", None), PLAN, None)
    if raw is None or (disabled() and not isinstance(raw, Written)):
        return None
    if not isinstance(raw, Written):
        raise SteeringError(
            f"{draft.model}/config.json has the key {PLAN!r}, which only the running plugin may set: remove it"
        )
    return raw


def _refuse_overlooked(vllm_config: VllmConfig) -> None:
    """Raise SteeringError for a steered drafter without a decision: in this vLLM `prepare` is never called."""
    import vllm

    draft = _draft_model(vllm_config)
    if draft is None or disabled():
        return
    source, _ = _source(draft, Options.read(vllm_config.additional_config))
    if source is not None:
        raise SteeringError(
            f"{source} is a steered drafter, and vllm-steer was not called to check it in the front end: this vLLM "
            f"({vllm.__version__}) has no place for that, or the plugin could not start (then the log says why): "
            f"install a vLLM that the README names, or set {KILL_SWITCH}=1 to serve the drafter unsteered"
        )


def _draft_model(vllm_config: VllmConfig) -> Any:
    """vLLM's ModelConfig of a drafter that is a whole language model, or None."""
    spec = vllm_config.speculative_config
    return spec.draft_model_config if spec is not None and spec.method == "draft_model" else None


def disabled() -> bool:
    """Whether the kill switch is on. The spellings of SWITCH count in any case; an empty value is as good as none.

    Raises SteeringError for any other spelling.
    """
    value = os.environ.get(KILL_SWITCH, "").strip()
    if value and value.lower() not in SWITCH:
        on, off = (", ".join(word for word, means in SWITCH.items() if means is side) for side in (True, False))
        raise SteeringError(
            f"the environment variable {KILL_SWITCH} is {value!r}, allowed are {on} to serve steered drafters "
            f"unsteered, and {off} or nothing to steer them: set one of these, or unset it"
        )
    return SWITCH.get(value.lower(), False)


def prepare(vllm_config: VllmConfig) -> None:
    """Look at a new engine configuration; if it names a steered drafter, check everything and write the plan.

    Raises SteeringError for a steered drafter that cannot be served as asked, for any drafter with prompt embeddings,
    and for a kill switch that is neither on nor off. Leaves all others untouched.
    """
    off = disabled()
    options = Options.read(vllm_config.additional_config)
    _refuse_prompt_embeds(vllm_config)
    draft = _draft_model(vllm_config)
    if draft is None:
        if options.adapter is not None and not off:
            raise SteeringError(
                f"additional-config names the steering adapter {options.adapter!r}, but no draft model is configured: "
                "give --speculative-config with the adapter's base drafter as model"
            )
        return
    if _written(vllm_config) is not None:
        return  # vLLM copies configurations, and every copy passes here again
    source, revision = _source(draft, options)
    if source is None:
        return
    if off:
        logger.warning("%s is set: the steered drafter %s runs unsteered", KILL_SWITCH, source)
        setattr(draft.hf_config, PLAN, Written())  # not every worker is given this process's environment
        return
    _require_seams(vllm_config)
    _refuse_unsupported(vllm_config)
    directory = checkpoint.resolve(source, revision)
    steering = checkpoint.load(directory)
    config, draft_length = steering.config, vllm_config.speculative_config.num_speculative_tokens
    check_pair(config, vllm_config.model_config.hf_config, draft.hf_config)
    _require_shares(vllm_config, config.drafter.intermediate_size)
    require_target_states(vllm_config.model_config)
    _warn_draft_length(config, draft_length)
    plan = Plan(
        source=str(source),
        revision=revision,
        scale=float(options.scale),
        steered_layers=config.steered_layers,
        projection_size=config.projection_size,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        draft_length=draft_length,
    )
    setattr(draft.hf_config, LAYER_IDS, list(config.target_layer_ids))
    setattr(draft.hf_config, PLAN, Written(dataclasses.asdict(plan)))


def _refuse_prompt_embeds(vllm_config: VllmConfig) -> None:
    """Refuse a drafter, steered or plain, whose prompts may have no token ids: the first one ends vLLM's V1 engine, and
    V2 drafts from other ids than the prompt's. N-grams do without them."""
    spec = vllm_config.speculative_config
    if spec is None or not getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        return
    v1 = not getattr(vllm_config, "use_v2_model_runner", False)
    if spec.uses_draft_model() or (v1 and spec.use_eagle()):
        raise SteeringError(
            f"prompt embeddings (--enable-prompt-embeds) do not work with the drafter of this server ({spec.method}), "
            "which needs the token ids of every prompt: drop --enable-prompt-embeds, or serve without "
            "--speculative-config"
        )


def _source(draft: Any, options: Options) -> tuple[str | None, str | None]:
    """Where the steering comes from: the adapter, the draft model itself, or nowhere."""
    marked = getattr(draft.hf_config, checkpoint.MARKER, None) is not None
    local = Path(draft.model).is_dir()
    carries = checkpoint.has_steering(draft.model) if local else marked
    if options.adapter is not None:
        if marked or carries:
            raise SteeringError(
                f"the draft model {draft.model!r} carries its own steering and additional-config names the adapter "
                f"{options.adapter!r}: give the adapter's base drafter as draft model, or drop the adapter"
            )
        return options.adapter, options.revision
    if marked and not carries:
        raise SteeringError(
            f"{draft.model}/config.json says that it is a steered drafter, but its {checkpoint.FOLDER}/ folder is "
            f"missing: copy the folder from the checkpoint's source, or set {KILL_SWITCH}=1 to serve it unsteered"
        )
    return (draft.model, draft.revision) if carries else (None, None)


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel, spec = vllm_config.parallel_config, vllm_config.speculative_config
    refused = {
        "pipeline parallelism (pipeline_parallel_size > 1)": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "parallel drafting": spec.parallel_drafting,
        "sleep mode, which loses the steering's weights,": vllm_config.model_config.enable_sleep_mode,
        "adaptive verification": getattr(spec, "enable_adaptive_verification", False),
        "heterogeneous vocabularies": getattr(spec, "use_heterogeneous_vocab", False),
    }
    for name, asked in refused.items():
        if asked:
            raise SteeringError(
                f"a steered drafter does not work with {name} yet: turn that off, or set {KILL_SWITCH}=1 to serve "
                "the drafter unsteered"
            )
    v2 = getattr(vllm_config, "use_v2_model_runner", False)
    draft, length = spec.draft_model_config, vllm_config.model_config.max_model_len
    if v2 and draft.max_model_len < length:
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


def _require_seams(vllm_config: VllmConfig) -> None:
    from vllm_steer.serving import patches

    patches.require(v2=getattr(vllm_config, "use_v2_model_runner", False))


def _warn_draft_length(config: SteeringConfig, asked: int) -> None:
    if config.draft_length is not None and asked > config.draft_length:
        logger.warning(
            "num_speculative_tokens=%d is more than the draft length %d this steering was trained for; "
            "later positions will be accepted less",
            asked,
            config.draft_length,
        )
