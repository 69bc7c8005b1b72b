"""Turn steering up, down or off while the server runs, to compare both on the same traffic.

It is vLLM's own way of adding calls to its workers, and off unless asked for twice: the class must be named at start,
and the route that reaches it exists in vLLM's development mode only.

    VLLM_SERVER_DEV_MODE=1 vllm serve TARGET --spec-model DRAFTER --spec-tokens 5 --host 127.0.0.1 \\
        --worker-extension-cls vllm_steer.serving.scale.Switch
    curl 127.0.0.1:8000/collective_rpc -d '{"method": "steer", "kwargs": {"scale": 0}}'

{"method": "steer", "kwargs": {"adapter": "NAME"}} loads another steering from below the directory that the server was
told at start (adapters.py), "initial" the first one again; all workers change, or none.
{"method": "refine", "kwargs": {"on": false}} does the same for a block drafter's approximator or bigram.

That mode's routes reach every method of a worker, and vLLM's --api-key does not guard them: keep them from the network.

vLLM's workers take calls between steps, so a batch is drafted with one scale, and all workers change at the same step.
What was drafted before is verified as ever: the output does not depend on the switch.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_steer.serving import adapters
from vllm_steer.serving.plan import MAX_SCALE

logger = logging.getLogger("vllm.steer")


class Switch:
    """Mixed into vLLM's worker by `--worker-extension-cls`."""

    model_runner: Any  # the worker's
    vllm_config: Any
    rank: int

    def refine(self, on: bool | None = None) -> dict[str, Any]:
        """Let the drafts of a block depend on each other from the next draft round on, or not; without `on` nothing
        changes. Returns {"rank", "on"}, or {"rank", "error"} for an engine that has nothing to switch."""
        repair = getattr(self._drafter, "repair", None)
        if repair is None:
            return {"rank": self.rank, "error": "this engine's drafts do not depend on each other"}
        if on is not None:
            if not isinstance(on, bool):
                return {"rank": self.rank, "error": f"on is {on!r}, allowed are true and false"}
            if on != repair.on:
                logger.warning("drafts of a block %s each other from now on, on request", "see" if on else "do not see")
            repair.switch(on)
        return {"rank": self.rank, "on": repair.on}

    @property
    def _drafter(self) -> Any:
        runner = self.model_runner
        return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)

    def steer(self, scale: float | None = None, adapter: str | None = None) -> dict[str, Any]:
        """Multiply every delta by `scale`, and take them from `adapter`, from the next draft round on; at 0 the drafts
        are the plain drafter's.

        What is left out does not change. Returns {"rank", "scale", "adapter"}, or {"rank", "error"}, and then nothing
        has changed, for an engine that is not steered, a scale that is no number, or an adapter that cannot be loaded:
        what a worker raises would end its engine on some executors.
        """
        injection = getattr(self._drafter, "injection", None)
        if injection is None:
            return {"rank": self.rank, "error": "this engine is not steered"}
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if scale is not None and not (number and abs(scale) <= MAX_SCALE):
            allowed = f"a number from -{MAX_SCALE} to {MAX_SCALE}"
            return {"rank": self.rank, "error": f"scale is {scale!r}, allowed is {allowed}"}
        if adapter is not None and (error := adapters.swap(injection, self.vllm_config, adapter)) is not None:
            return {"rank": self.rank, "error": error}
        if scale is not None:
            if scale != injection.scale:
                logger.warning("steering scale changes from %g to %g, on request", injection.scale, scale)
            injection.scale = float(scale)
        return {"rank": self.rank, "scale": injection.scale, "adapter": injection.adapter}
