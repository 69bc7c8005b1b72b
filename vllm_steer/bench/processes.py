"""Work of a benchmark in a fresh Python: an engine is opened there, and its memory is gone when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError


def run(module: str, name: str, job: list[Any]) -> Any:
    """What `work` of a module's `main` makes of the job, under this process's environment; both are JSON.

    Raises SteeringError, which begins with `name`, when it fails.
    """
    # The engine lives in that very process: its workers can then be asked for times and memory (serving/probe.py).
    env = {"VLLM_LOGGING_LEVEL": "WARNING"} | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with tempfile.TemporaryDirectory() as folder:
        asked, result = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-P", "-m", module, str(asked), str(result)]
        ended = subprocess.run(command, env=env, stdout=2, check=False)  # vLLM logs to stdout; that is for the table
        if not result.is_file():
            raise SteeringError(
                f"{name}: the engine's process ended with exit code {ended.returncode} (-9: out of memory); "
                "its messages are above; --resume goes on from here"
            )
        found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise SteeringError(f"{name}: {found['error']}")
    return found


def main(work: Callable[..., Any]) -> None:
    """For the module that `run` names: read the job's file, write what `work` finds or {"error": sentence}."""
    asked, result = map(Path, sys.argv[1:])
    try:
        found = work(*json.loads(asked.read_text(encoding="utf-8")))
    except Exception as error:  # whatever vLLM raises is reported by the process that waits for this one
        if not isinstance(error, SteeringError):
            traceback.print_exc()
        found = {"error": str(error) or type(error).__name__}
    result.write_text(json.dumps(found), encoding="utf-8")
