"""What `vllm-steer doctor` asks of vLLM. No engine is started, no weight is read, no device is touched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_steer.common.errors import SteeringError
from vllm_steer.serving import admission, patches, patching, plan
from vllm_steer.serving.block_plan import block_plan

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

T = TypeVar("T")


def version() -> str:
    """vLLM's version. Raises ImportError where there is none."""
    import vllm

    return vllm.__version__


def runners() -> set[str]:
    """Which of vLLM's model runners, "v1" and "v2", could run here: without Triton, or told so, one only."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    if chosen is None:
        return {"v1", "v2"} if HAS_TRITON else {"v1"}
    return {"v2"} if chosen else {"v1"}


def seam_ways() -> list[tuple[patching.Seam, str]]:
    """Every seam, and how it is taken as `patching.ways` tells it, after importing the modules they are in."""
    patches.install()
    for seam in patches.SEAMS:
        patching.reach(seam)
    return list(zip(patches.SEAMS, patching.ways().values(), strict=True))


def device_memory() -> int | None:
    """Bytes of the first accelerator, or None. It may be full: nothing is made on it."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    try:
        return current_platform.get_device_total_memory()
    except Exception:  # a platform that cannot tell, a driver that does not answer
        return None


@functools.cache
def model_config(model: str) -> ModelConfig:
    """vLLM's view of a model directory or hub id. Raises SteeringError with vLLM's sentence for what it refuses."""
    from vllm.engine.arg_utils import EngineArgs

    return _told(lambda: EngineArgs(model=model).create_model_config())


def require_states(model: str) -> str:
    """The name of vLLM's class for this target. Raises SteeringError if it hands out no hidden states of its layers."""
    from vllm.model_executor.model_loader.utils import get_model_cls

    config = model_config(model)
    admission.require_target_states(config)
    return get_model_cls(config).__name__


def rehearse(target: str, speculative: dict[str, Any], ours: dict[str, Any], **engine: Any) -> VllmConfig:
    """The configuration `vllm serve` would build in its front end; `engine` are EngineArgs that are not None, `ours` is
    this plugin's part of additional_config.

    Raises SteeringError with the sentence of whatever refuses it, vLLM or this plugin.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    additional = {plan.OPTIONS: ours} if ours else {}
    asked = {key: value for key, value in engine.items() if value is not None}

    def build() -> VllmConfig:
        args = EngineArgs(model=target, speculative_config=speculative, additional_config=additional, **asked)
        return args.create_engine_config(UsageContext.OPENAI_API_SERVER)

    return _told(build)


def steered(config: VllmConfig) -> bool:
    """Whether the plugin would steer the drafter of this configuration."""
    return plan.Plan.of(config) is not None


def repairs(config: VllmConfig) -> str:
    """How the drafts of a block drafter would depend on each other, in words."""
    found = block_plan(config)
    if found is None or not found.repairs:
        return "its drafts do not depend on each other"
    return "each draft knows the one before, by " + ("the approximator" if found.ngram is None else "a bigram")


def max_rows(config: VllmConfig) -> int:
    """The most rows a forward of the drafter can have."""
    return admission.max_rows(config)


def _told(build: Callable[[], T]) -> T:
    """The result of `build`. Raises SteeringError with its refusal's sentence, out of pydantic's wrapping."""
    from pydantic import ValidationError

    try:
        return build()
    except ValidationError as error:
        raise SteeringError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    except (ValueError, NotImplementedError, RuntimeError) as error:  # the last: no device
        raise SteeringError(str(error)) from None
