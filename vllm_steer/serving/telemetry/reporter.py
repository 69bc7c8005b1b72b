"""A thread beside a steered engine's worker: judges the block counts, and writes them for the front end to read.

One thread per engine, in its first worker. The front end is another process, which knows neither the worker's process
nor, with several API servers, the configuration it was made from. What they share is an ancestor. So the worker writes
who its ancestors are, and the front end looks for a file of its own descendants (metrics.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import tempfile
import threading
import time
import weakref
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from vllm_steer.serving.telemetry.block_counter import Counts
from vllm_steer.serving.telemetry.watchdog import Watchdog, recorded

logger = logging.getLogger("vllm.steer")

INTERVAL = 5.0  # seconds between two looks
KEYS = {"pid", "namespace", "ancestors", "engine", "recorded"}  # of what a worker writes


def directory() -> Path:
    """Where workers leave their counts: this user's own folder among the temporary files, made when missing.

    Raises OSError when it is not ours alone: another user could have made it first.
    """
    path = Path(tempfile.gettempdir()) / f"vllm-steer-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not a private directory of this user: remove it")
    return path


def namespace() -> str:
    """The PID namespace of this process, in which its process ids are valid."""
    return os.readlink("/proc/self/ns/pid")


def ancestors() -> list[int]:
    """Process ids: this process, its parent, and so on. Raises OSError where they may not be seen."""
    import psutil  # comes with vLLM

    try:
        return [os.getpid(), *(parent.pid for parent in psutil.Process().parents())]
    except psutil.Error as error:
        raise PermissionError(f"the processes above this one are hidden ({error})") from None


class Reporter(threading.Thread):
    """Looks at an engine's counts every INTERVAL seconds, until the engine has gone."""

    def __init__(self, injection: Any, engine: int):
        """`injection` has `blocks`, `scale`, `config` and `adapter`, None where nothing is steered; `engine` is the
        data-parallel rank."""
        super().__init__(name="vllm-steer reporter", daemon=True)
        gone = self._gone = threading.Event()
        self._injection = weakref.ref(injection, lambda _: gone.set())
        self._begin(injection)
        self._guides = self._norms = self._norm = 0.0
        self._file: Path | None = None
        self._lost = False  # the file could not be written at the last look
        self._told_broken = False
        try:
            self._who = {"pid": os.getpid(), "namespace": namespace(), "ancestors": ancestors(), "engine": engine}
            self._file = directory() / f"{os.getpid()}-{time.time_ns()}.json"
        except OSError as error:
            self._warn(error)
        self.look()
        Finalize(self, remove, (self._file,), exitpriority=0)  # not atexit: a forked worker ends without it

    def run(self) -> None:
        """The thread: a look every INTERVAL seconds until the engine has gone."""
        while not self._gone.wait(INTERVAL):
            try:
                self.look()
            except Exception:  # requests must not notice
                logger.exception("the watchdog of the steered drafter has stopped")
                break
        remove(self._file)

    def look(self) -> None:
        """Judge the counts and write them."""
        if (injection := self._injection()) is None:
            return
        counts = injection.blocks.read()
        if injection.config is not self._config:
            self._begin(injection, counts.steered)
        if (warning := self._watchdog.judge(counts)) is not None:
            logger.warning(warning)
        if counts.broken and not self._told_broken:
            self._told_broken = True
            logger.warning(
                "the target's hidden states were not finite in %d guides: those blocks are drafted unsteered; the "
                "output is still the target's, but look at the target's dtype and quantisation",
                counts.broken,
            )
        if self._file is None:
            return
        report = self._who | self._report(counts)
        if injection.adapter is not None:
            report |= self._of_steering(counts, injection.scale) | {"adapter": injection.adapter}
        try:
            directory()  # a cleaner of temporary files may have removed it
            draft = self._file.with_suffix(".new")
            draft.write_text(json.dumps(report), encoding="utf-8")
            draft.replace(self._file)
            self._lost = False
        except OSError as error:  # a full disk: the file is out of date
            remove(self._file)
            if not self._lost:
                self._warn(error)
            self._lost = True

    def _begin(self, injection: Any, seen: Any = 0.0) -> None:
        """Judge a steering that has just been taken over, by what was recorded for it, from these blocks on."""
        self._config = injection.config
        self._recorded = recorded(injection.config.acceptance, injection.blocks.draft_length)
        self._watchdog = Watchdog(list(self._recorded.values()), seen)

    def _report(self, counts: Counts) -> dict[str, Any]:
        return {
            "blocks": float(counts.steered.sum() + counts.unsteered.sum()),
            "accepted": counts.accepted,
            "accepted_at": counts.accepted_at,
            "rows": list(counts.rows),
            "recorded": {name: values[-1] for name, values in self._recorded.items()},
        }

    def _of_steering(self, counts: Counts, scale: float) -> dict[str, Any]:
        if counts.guides > self._guides:
            self._norm = (counts.guide_norms - self._norms) / (counts.guides - self._guides)
            self._guides, self._norms = counts.guides, counts.guide_norms
        steered = float(counts.steered.sum())
        return {"steering_on": scale != 0, "steered_blocks": steered, "guide_norm": self._norm}

    def _warn(self, error: Exception) -> None:
        """The watchdog goes on, without a file."""
        logger.warning("no vllm_steer metrics at /metrics for the time being: %s", error)


def remove(path: Path | None) -> None:
    """Delete a worker's file if it exists."""
    if path is not None:
        for each in (path, path.with_suffix(".new")):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)


# --- asked by the front end -----------------------------------------------------------------------------------------


def find(top: int, engine: int) -> Path | None:
    """The newest file of data-parallel rank `engine` below process `top`, or None; those of dead processes are removed.

    Raises OSError when the directory is not ours.
    """
    import psutil

    found: list[Path] = []
    for path in directory().glob("*.json"):
        if (report := read(path)) is None:
            continue
        if report["namespace"] != namespace():  # another container that shares the folder: its process ids are not ours
            continue
        if not psutil.pid_exists(report["pid"]):
            remove(path)
        elif top in report["ancestors"] and report["engine"] == engine:
            found.append(path)
    return max(found, key=lambda path: path.name.partition("-")[2], default=None)  # the name ends with its time


def read(path: Path) -> dict[str, Any] | None:
    """What a worker wrote, or None if it is gone, or not that."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.keys() >= KEYS else None
