"""Every replacement this plugin makes in vLLM, in one place: what, why, and when it can go.

Where vLLM has a place of its own for the purpose (see patches/), that is used and nothing is replaced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import wrapt

from vllm_steer.common.errors import SteeringError
from vllm_steer.serving import plan, repairs

logger = logging.getLogger("vllm.steer")

WORKS_WITH = "0.32"
Undo = Callable[[], None]


@dataclass(frozen=True)
class Seam:
    """One replacement: attribute `name` (dotted) of `module` becomes `make(original)`, unless `upstream` is there."""

    module: str
    name: str
    make: Callable[[Any], Any]
    upstream: Callable[[], Undo | None]  # takes vLLM's own way, if it has one; returns how to leave it, or None
    why: str
    remove_when: str
    needs: tuple[str, ...] = ()  # of vLLM, as "module:name": what our side relies on, by either way
    runner: str = "both"  # "both", "v1" or "v2"
    required: bool = True  # False: a repair of vLLM's own, nothing steering depends on


# --- what vLLM may offer one day -------------------------------------------------------------------------------------


def _join(place: str, hook: Callable[..., Any]) -> Undo | None:
    """vLLM's own way is a list at `place`, "module:name", of functions that it calls."""
    if (hooks := _find(place)) is None:
        return None
    hooks.append(hook)
    return lambda: hooks.remove(hook)


def _asked(place: str) -> Undo | None:
    """vLLM's own way is to ask a class, ours or its own; that it does is seen by what is at `place`."""
    return None if _find(place) is None else _nothing


def _find(place: str) -> Any:
    try:
        return resolve_name(place)
    except (ImportError, AttributeError):
        return None


def _nothing() -> None:
    pass


def _sound(asked: Callable[[], bool]) -> Undo | None:
    """vLLM's own way is its function as it stands, once that gives the right result."""
    return _nothing if asked() else None


# --- our side ------------------------------------------------------------------------------------------------------


def _checked_post_init(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plan.prepare(self)
        original(self, *args, **kwargs)

    return __post_init__


def _proposer(vllm_config: Any, device: Any, runner: Any) -> Any:
    """The proposer of a steered engine, or None."""
    if plan.Plan.of(vllm_config) is None:
        return None
    from vllm_steer.serving.spec_decode.v1 import SteeredDraftModelProposer

    return SteeredDraftModelProposer(vllm_config, device, runner)


def _steered_proposer(original: type) -> type:
    from vllm_steer.serving.spec_decode.v1 import SteeredDraftModelProposer

    return SteeredDraftModelProposer


def _speculator(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    """The speculator of a steered engine, or None."""
    if plan.Plan.of(vllm_config) is None:
        return None
    from vllm_steer.serving.spec_decode.v2 import SteeredSpeculator

    return SteeredSpeculator(vllm_config, device)


def _steered_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_speculator(*args: Any, **kwargs: Any) -> Any:
        return _speculator(*args, **kwargs) or original(*args, **kwargs)

    return init_speculator


def _load_with_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if plan.Plan.of(self.vllm_config) is not None:
            self.use_aux_hidden_state_outputs = True
        return original(self, *args, **kwargs)

    return load_model


SEAMS = (
    Seam(
        module="vllm.config.vllm",
        name="VllmConfig.__post_init__",
        make=_checked_post_init,
        upstream=functools.partial(_join, "vllm.config.vllm:config_hooks", plan.prepare),
        why="recognise a steered drafter, validate it in the front end, and salt the compile caches",
        remove_when="vLLM lets a plugin look at a new VllmConfig: validate it, extend it",
    ),
    Seam(
        module="vllm.v1.worker.gpu_model_runner",
        name="DraftModelProposer",
        make=_steered_proposer,
        upstream=functools.partial(_join, "vllm.v1.spec_decode.draft_model:proposer_factories", _proposer),
        why="the V1 runner builds its proposer, and checks isinstance, by this name",
        remove_when="vLLM asks plugins for the proposer of a draft model",
        needs=tuple(
            f"vllm.v1.spec_decode.draft_model:DraftModelProposer.{name}"
            for name in (
                *("_get_model", "propose", "prepare_inputs_padded", "set_inputs_first_pass"),
                "_update_positions_dependent_metadata",
            )
        ),
        runner="v1",
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="init_speculator",
        make=_steered_init_speculator,
        upstream=functools.partial(_join, "vllm.v1.worker.gpu.spec_decode:speculator_factories", _speculator),
        why="the V2 runner builds its speculator here",
        remove_when="vLLM asks plugins for the speculator of a configuration",
        needs=tuple(
            f"vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator.{name}"
            for name in ("load_draft_model", "propose", "_multi_step_decode")
        ),
        runner="v2",
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="GPUModelRunner.load_model",
        make=_load_with_states,
        upstream=functools.partial(
            _asked, "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.needs_aux_hidden_states"
        ),
        why="V2 switches auxiliary target states on by method name, before the model is loaded",
        remove_when="the V2 runner asks the speculator whether it needs auxiliary states",
        runner="v2",
    ),
    Seam(
        module="vllm.v1.sample.rejection_sampler",
        name="expand_batch_to_tokens",
        make=repairs.expand_that_writes,
        upstream=lambda: _sound(repairs.expand_writes),
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
        upstream=lambda: _sound(repairs.top_k_takes_no_rows),
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
            _asked, "vllm.v1.spec_decode.draft_model:DraftModelProposer.common_attn_metadata_of_group"
        ),
        why=(
            "a defect of vLLM 0.32: a draft model is given the block table of KV cache group 0 and overwrites the "
            "target's KV cache where that group is not its own; layers in several groups end the engine"
        ),
        remove_when="the V1 runner gives a draft model the block tables of its own KV cache groups",
        needs=tuple(
            f"vllm.v1.spec_decode.draft_model:DraftModelProposer.{name}"
            for name in (
                *("initialize_attn_backend", "set_inputs_first_pass", "_get_slot_mapping"),
                "build_per_group_and_layer_attn_metadata",
            )
        ),
        runner="v1",
    ),
    Seam(
        module="vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator",
        name="StandaloneARSpeculator.load_draft_model",
        make=repairs.load_with_own_window,
        upstream=functools.partial(
            _asked,
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
)

_problems: dict[Seam, str] = {}
_applied: dict[Seam, tuple[str, Undo]] = {}  # which way was taken, and how to go back


def install() -> None:
    """Apply every seam, or take vLLM's own way, now or when its module is imported. Repeatable."""
    for seam in SEAMS:
        wrapt.register_post_import_hook(functools.partial(_apply, seam), seam.module)


def undo() -> None:
    """Put every original back, and leave every place of vLLM's own (tests)."""
    while _applied:
        _applied.popitem()[1][1]()


def ways() -> dict[str, str]:
    """Of every seam, "module:name", how it is taken: "replaced", "upstream" (vLLM has a way of its own, nothing is
    replaced), "not imported", or what is wrong with it."""
    return {
        f"{seam.module}:{seam.name}": _problems.get(seam) or _applied.get(seam, ("not imported",))[0] for seam in SEAMS
    }


def known(version: str) -> bool:
    """Whether the seams were made for this release of vLLM."""
    return f"{version}.".startswith(f"{WORKS_WITH}.")


def reach(seam: Seam) -> None:
    """Import the module of a seam, so that it applies; what is wrong with the module is kept for `ways`."""
    import importlib

    try:
        importlib.import_module(seam.module)
    except ImportError as error:
        _problems[seam] = f"{seam.module} cannot be imported ({error})"


def require(v2: bool) -> None:
    """Raise SteeringError unless vLLM is a known release and every seam the chosen model runner needs is in place."""
    import vllm

    remedy = f"install that, or set {plan.KILL_SWITCH}=1 to serve the drafter unsteered"
    if not known(vllm.__version__):  # names may stay while their meaning moves
        raise SteeringError(f"this is vLLM {vllm.__version__}, vllm-steer works with {WORKS_WITH}: {remedy}")
    for seam in SEAMS:
        if not seam.required or seam.runner not in ("both", "v2" if v2 else "v1"):
            continue
        reach(seam)
        if seam not in _applied or seam in _problems:
            raise SteeringError(
                f"this vLLM ({vllm.__version__}) has no place for steering: "
                f"{_problems.get(seam, f'{seam.module}:{seam.name} was not replaced')}. vllm-steer works with vLLM "
                f"{WORKS_WITH}: {remedy}"
            )


def _apply(seam: Seam, module: ModuleType) -> None:
    if seam in _applied:
        return
    try:
        for name in seam.needs:
            resolve_name(name)
        if (undone := seam.upstream()) is not None:
            _applied[seam] = "upstream", undone
        else:
            _applied[seam] = "replaced", _replace(seam, module)
    except Exception as error:  # an exception in an import hook would break unsteered engines too
        _problems[seam] = f"{seam.module}:{seam.name} is not as expected ({type(error).__name__}: {error})"
        if seam.make is _checked_post_init:  # the others are asked for when a steered drafter is found, by this one
            logger.warning(
                "this vLLM cannot be told to refuse a steered drafter, and may serve it unsteered: %s. "
                "vllm-steer works with vLLM %s",
                _problems[seam],
                WORKS_WITH,
            )
        logger.debug("seam not applied: %s", _problems[seam])
        return
    _problems.pop(seam, None)
    logger.debug("seam %s:%s: %s", seam.module, seam.name, _applied[seam][0])


def _replace(seam: Seam, module: ModuleType) -> Undo:
    owner, _, attribute = seam.name.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = holder.__dict__[attribute]
    setattr(holder, attribute, seam.make(original))
    return functools.partial(setattr, holder, attribute, original)
