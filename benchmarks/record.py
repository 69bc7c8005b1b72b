"""What the benchmarks share: the environment of an in-process V1 engine, and how a result is written down."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def write_report(path: Path, **results: Any) -> None:
    """Write `results` as JSON under the date, the command, the machine and the versions they come from."""
    import torch

    report = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"vllm": _version("vllm"), "torch": torch.__version__, "python": platform.python_version()},
    }
    path.write_text(json.dumps(report | results, indent=2) + "\n")


def interval(pairs: Sequence[tuple[float, float]], of: Callable[[Any], float], digits: int) -> list[float]:
    """95 % bootstrap interval of a statistic `of` the pairs, rounded; the same draws at every call."""
    rng = random.Random(0)
    draws = sorted(of(rng.choices(pairs, k=len(pairs))) for _ in range(2000))
    return [round(draws[50], digits), round(draws[-51], digits)]


def length(pairs: Sequence[tuple[int, int]]) -> float:
    """Acceptance length of (tokens, blocks) pairs: tokens over blocks."""
    return sum(tokens for tokens, _ in pairs) / sum(blocks for _, blocks in pairs)


def _version(package: str) -> str | None:
    """None where it is not installed: a GPU machine may have torch alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
