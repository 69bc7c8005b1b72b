"""What an engine of ours counted, at /metrics beside vLLM's: what its worker wrote (reporter.py), published.

vLLM makes a stat logger for every engine in each API server process, and calls it after every step. Several API servers
share their engines: the first one reports, so that nothing is counted twice.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_steer.common.errors import SteeringError
from vllm_steer.serving.block_plan import counts_unsteered
from vllm_steer.serving.plan import Plan, lenience_of
from vllm_steer.serving.telemetry import reporter

logger = logging.getLogger("vllm.steer")

REFRESH = 1.0  # seconds between two looks at the file, at least
COUNTERS = {  # name in the worker's report: name of the metric without _total, help
    "blocks": ("vllm_steer:blocks", "Blocks verified that this drafter drafted; placeholders of vLLM's are none."),
    "accepted": ("vllm_steer:accepted_tokens", "Draft tokens accepted in those blocks."),
}
STEERED = {"steered_blocks": ("vllm_steer:steered_blocks", "Of those, blocks drafted with steering on.")}
GAUGES = {  # of steered engines too
    "steering_on": ("vllm_steer:steering_on", "1 while drafts are steered, 0 at scale 0."),
    "guide_norm": ("vllm_steer:guide_norm", "Mean norm of the guides made in the last seconds."),
}
LABELS = ["model_name", "engine"]


@functools.cache
def counters() -> dict[str, Any]:
    """The Prometheus counters of this process, by name in the worker's report; made when the first engine counts."""
    from prometheus_client import Counter

    made: dict[str, Any] = {key: Counter(*about, LABELS) for key, about in COUNTERS.items()}
    about = "vllm_steer:accepted_tokens_per_pos", "Accepted draft tokens by their position in the block."
    made["accepted_at"] = Counter(*about, [*LABELS, "position"])
    about = "vllm_steer:blocks_per_row", "Blocks of draft trees by the row that the target agreed with longest."
    return made | {"rows": Counter(*about, [*LABELS, "row"])}


@functools.cache
def metrics() -> dict[str, Any]:
    """The counters, and what steered engines have besides; made when the first engine is steered."""
    from prometheus_client import Counter, Gauge

    # Only one process reports (see above): where several are merged, its values are the newest.
    gauge = functools.partial(Gauge, multiprocess_mode="mostrecent")
    made = counters() | {key: Counter(*about, LABELS) for key, about in STEERED.items()}
    made |= {key: gauge(*about, LABELS) for key, about in GAUGES.items()}
    about = "vllm_steer:adapter", "1 for the steering in use, by its name; 0 for those before it."
    made["adapter"] = gauge(*about, [*LABELS, "adapter"])
    about = "vllm_steer:recorded_accepted_tokens", "Accepted tokens per block predicted when the steering was trained."
    return made | {"recorded": gauge(*about, [*LABELS, "sampling"])}


@functools.cache
def epsilon() -> Any:
    """The gauge of engines whose output is not the target's, steered or not; made when the first of them starts."""
    from prometheus_client import Gauge

    about = "vllm_steer:lenience_epsilon", "Drafts are accepted leniently: the output is not the target's."
    return Gauge(*about, [*LABELS, "form"], multiprocess_mode="mostrecent")


class Gauges(StatLoggerBase):
    """Entry point of group `vllm.stat_logger_plugins`; does nothing for an engine that counts nothing.

    An exception here ends the server. That is right for a steered drafter which nobody has looked at, because this vLLM
    calls none of our seams or the plugin could not start: SteeringError. Anything else that goes wrong is logged once,
    and the metrics stay as they are.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        self._on = False
        self._file: Path | None = None
        self._next = 0.0
        self._lost = False
        self._last: dict[tuple[str, str], float] = {}
        self._adapter: str | None = None
        try:
            parallel = vllm_config.parallel_config
            several = getattr(parallel, "_api_process_count", 1) > 1
            steered, lenience = Plan.of(vllm_config) is not None, lenience_of(vllm_config)
            counting = steered or counts_unsteered(vllm_config)
            if not (counting or lenience) or (several and parallel._api_process_rank != 0):
                return
            self._labels = [vllm_config.model_config.served_model_name, str(engine_index)]
            if lenience is not None:
                epsilon().labels(*self._labels, lenience.form).set(lenience.epsilon)
            if not counting:
                return
            self._engine = engine_index
            self._top = os.getppid() if several else os.getpid()
            self._metrics = metrics() if steered else counters()
            self._on = True
        except SteeringError:
            raise
        except Exception:
            logger.exception("there will be no vllm_steer metrics at /metrics")

    def record(self, *args: Any, **kwargs: Any) -> None:
        """After every engine step, with vLLM's own numbers."""
        if self._on and (now := time.monotonic()) >= self._next:
            self._next = now + REFRESH
            self.log()

    def log_engine_initialized(self) -> None:
        """Once, when the engine is ready."""
        self.log()

    def log(self) -> None:
        """Every few seconds, also when nothing is asked."""
        if not self._on:
            return
        try:
            self._refresh()
        except Exception:
            self._on = False
            logger.exception("the vllm_steer metrics at /metrics have stopped")

    def _refresh(self) -> None:
        report = reporter.read(self._file) if self._file is not None else None
        if report is None and (found := reporter.find(self._top, self._engine)) is not None:
            report = reporter.read(found)
            if found != self._file:  # a new worker counts from 0
                self._file, self._last = found, {}
                Finalize(None, reporter.remove, (found,), exitpriority=0)  # vLLM kills its workers when it ends
        if report is not None:
            self._lost = False
            self._publish(report)
        elif not self._lost:
            self._lost = True
            if self._file is None:
                logger.warning(
                    "engine %d counts its blocks, but its worker leaves no counts on this machine: there are no "
                    "vllm_steer metrics for it at /metrics (a worker of Ray's or on another machine, or one that "
                    "cannot write to the same directory for temporary files)",
                    self._engine,
                )
                return
            for key in self._metrics.keys() & GAUGES:  # counters stay; these would tell what is no longer known
                self._metrics[key].labels(*self._labels).set(float("nan"))
            logger.warning("the worker of engine %d reports no counts any more: vllm_steer metrics stop", self._engine)

    def _publish(self, report: dict[str, Any]) -> None:
        made = self._metrics
        for key in made.keys() & (COUNTERS | STEERED):
            self._count(key, "", report[key])
        for key in ("accepted_at", "rows"):
            for place, value in enumerate(report[key]):
                self._count(key, str(place), value)
        if "adapter" not in made:  # not steered
            return
        for key in GAUGES:
            made[key].labels(*self._labels).set(float(report[key]))
        if self._adapter not in (None, report["adapter"]):
            made["adapter"].labels(*self._labels, self._adapter).set(0)
        self._adapter = report["adapter"]
        made["adapter"].labels(*self._labels, self._adapter).set(1)
        for sampling, value in report["recorded"].items():
            made["recorded"].labels(*self._labels, sampling).set(value)

    def _count(self, key: str, place: str, value: float) -> None:
        """Raise a counter, of one position or row if it has them, by what the worker counted since the last look."""
        labels = [*self._labels, place] if place else self._labels
        self._metrics[key].labels(*labels).inc(value - self._last.get((key, place), 0.0))
        self._last[key, place] = value


# A method that a later vLLM adds is nothing to end its servers for, steered or not: vLLM builds this class unguarded.
Gauges.__abstractmethods__ = frozenset()
