"""Every replacement this plugin makes in vLLM, in one place: what, why, and when it can go."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

from vllm_steer.config import SteeringError
from vllm_steer.serving import plan

logger = logging.getLogger("vllm.steer")

WORKS_WITH = "0.32"
ORIGINAL = "__vllm_steer_original__"


@dataclass(frozen=True)
class Seam:
    """One replacement: attribute `name` (dotted) of `module` becomes `make(original)`."""

    module: str
    name: str
    make: Callable[[Any], Any]
    why: str
    remove_when: str
    needs: tuple[str, ...] = ()  # attributes of the original that the replacement relies on
    runner: str = "both"  # "both", "v1" or "v2"
    required: bool = True  # False: a repair of vLLM's own, nothing steering depends on


def _checked_post_init(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plan.prepare(self)
        original(self, *args, **kwargs)

    return __post_init__


def _steered_proposer(original: type) -> type:
    from vllm_steer.serving.proposer import SteeredDraftModelProposer

    return SteeredDraftModelProposer


def _steered_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_speculator(vllm_config: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if plan.Plan.of(vllm_config) is None:
            return original(vllm_config, device, *args, **kwargs)
        from vllm_steer.serving.speculator import SteeredSpeculator

        return SteeredSpeculator(vllm_config, device)

    return init_speculator


def _load_with_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if plan.Plan.of(self.vllm_config) is not None:
            self.use_aux_hidden_state_outputs = True
        return original(self, *args, **kwargs)

    return load_model


def _expand_that_writes(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts)

    return expand_batch_to_tokens


SEAMS = (
    Seam(
        module="vllm.config.vllm",
        name="VllmConfig.__post_init__",
        make=_checked_post_init,
        why="recognise a steered drafter, validate it in the front end, and salt the compile caches",
        remove_when="vLLM lets a plugin validate and extend a speculative configuration",
    ),
    Seam(
        module="vllm.v1.worker.gpu_model_runner",
        name="DraftModelProposer",
        make=_steered_proposer,
        why="the V1 runner builds its proposer, and checks isinstance, by this name",
        remove_when="vLLM dispatches draft-model proposers through a registry that hands over hidden states",
        needs=("_get_model", "propose", "set_inputs_first_pass", "_update_positions_dependent_metadata"),
        runner="v1",
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="init_speculator",
        make=_steered_init_speculator,
        why="the V2 runner builds its speculator here",
        remove_when="vLLM has a registry of speculators",
        runner="v2",
    ),
    Seam(
        module="vllm.v1.worker.gpu.model_runner",
        name="GPUModelRunner.load_model",
        make=_load_with_states,
        why="V2 switches auxiliary target states on by method name, before the model is loaded",
        remove_when="the V2 runner asks the speculator whether it needs auxiliary states",
        runner="v2",
    ),
    Seam(
        module="vllm.v1.sample.rejection_sampler",
        name="expand_batch_to_tokens",
        make=_expand_that_writes,
        why=(
            "a defect of vLLM 0.32 on CPU: per-request temperatures are expanded into a copy that is thrown away, so "
            "sampled speculation divides by uninitialised memory and does not have the target's distribution"
        ),
        remove_when="vllm/utils/cpu_triton_utils.py:_expand_kernel_impl copies its result back",
        runner="v1",
        required=False,
    ),
)

_problems: dict[Seam, str] = {}
_undo: dict[Seam, Callable[[], None]] = {}


def install() -> None:
    """Apply every seam now, or when its module is imported. Calling it again changes nothing."""
    for seam in SEAMS:
        wrapt.register_post_import_hook(functools.partial(_apply, seam), seam.module)


def undo() -> None:
    """Put every original back (tests)."""
    while _undo:
        _undo.popitem()[1]()


def require(v2: bool) -> None:
    """Raise SteeringError unless every seam the chosen model runner needs is in place."""
    import importlib

    import vllm

    for seam in SEAMS:
        if not seam.required or seam.runner not in ("both", "v2" if v2 else "v1"):
            continue
        try:
            importlib.import_module(seam.module)
        except ImportError as error:
            _problems[seam] = f"{seam.module} cannot be imported ({error})"
        if seam not in _undo or seam in _problems:
            raise SteeringError(
                f"this vLLM ({vllm.__version__}) has no place for steering: "
                f"{_problems.get(seam, f'{seam.module}:{seam.name} was not replaced')}. vllm-steer works with vLLM "
                f"{WORKS_WITH}: install that, or set {plan.KILL_SWITCH}=1 to serve the drafter unsteered"
            )


def _apply(seam: Seam, module: ModuleType) -> None:
    if seam in _undo:
        return
    try:
        owner, _, attribute = seam.name.rpartition(".")
        holder = getattr(module, owner) if owner else module
        original = holder.__dict__[attribute]
        missing = [name for name in seam.needs if not hasattr(original, name)]
        if missing:
            raise AttributeError(f"{seam.name} has no {missing[0]}")
        replacement = seam.make(original)
    except Exception as error:  # an exception in an import hook would break unsteered engines too
        _problems[seam] = f"{seam.module}:{seam.name} is not as expected ({type(error).__name__}: {error})"
        logger.debug("seam not applied: %s", _problems[seam])
        return
    setattr(holder, attribute, replacement)
    _problems.pop(seam, None)
    _undo[seam] = lambda: setattr(holder, attribute, original)
