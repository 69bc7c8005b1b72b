"""Start a real `vllm serve`, wait until it answers, read its counters, stop it. Used by demo.py and the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.bench import remote

CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else one core is kept free, half of a small machine
}
COMMON_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # models are directories here


class ServerError(RuntimeError):
    """The server did not start, or died; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    process: subprocess.Popen[bytes]
    url: str  # http://127.0.0.1:PORT
    log: Path
    seconds: float  # from start to the first healthy answer

    def metrics(self) -> list[Any]:
        """Every sample at /metrics, with `name`, `labels` and `value`."""
        return list(remote.metrics(self.url))

    def counters(self) -> dict[str, Any]:
        """Speculative decoding so far, see remote.counters. Raises SteeringError if this server does not speculate."""
        return remote.counters(self.url)

    def steer(self, scale: Any = None, adapter: Any = None) -> list[dict[str, Any]]:
        """Each worker's answer to the run-time switch, {"rank", "scale", "adapter"} or {"rank", "error"}; without a
        scale or an adapter it asks.

        The server must have the worker extension and run in vLLM's development mode, else urllib.error.HTTPError.
        """
        asked = {"scale": scale, "adapter": adapter}
        body = {"method": "steer", "kwargs": {name: value for name, value in asked.items() if value is not None}}
        with urllib.request.urlopen(self.url + "/collective_rpc", json.dumps(body).encode(), timeout=30) as answer:
            return json.loads(answer.read())["results"]

    def proof_of_life(self) -> str | None:
        """The line in which the plugin says that the drafter is steered, or None."""
        match = re.search(r"steering is on: .*", self.log.read_text(errors="replace"))
        return match.group(0) if match else None


def vllm_command() -> str:
    """The `vllm` beside this interpreter. Raises ServerError with the remedy when it is missing."""
    found = Path(sys.executable).parent / "vllm"
    if not found.is_file():
        raise ServerError(f"there is no `vllm` beside {sys.executable}: run `make install`, or install the extra gpu")
    return str(found)


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers; this process stays free of CUDA."""
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def can_compile() -> bool:
    """Whether torch.compile has on the CPU what it needs: a C++ compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(
    target: Path,
    log: Path,
    *args: str,
    speculative: dict[str, Any] | None = None,
    additional: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 900,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Run `vllm serve target` until the block ends.

    Args:
        target: model directory or hub id of the target.
        log: file for everything the server prints.
        args: further options of `vllm serve`.
        speculative: `--speculative-config`.
        additional: `--additional-config`.
        env: environment variables on top of this process's.
        timeout: seconds until an unanswered health check is an error.
        waiting: called about once a second with the seconds waited so far.
    """
    port = free_port()
    command = [vllm_command(), "serve", str(target), "--host", "127.0.0.1", "--port", str(port), *args]
    command += ["--speculative-config", json.dumps(speculative)] if speculative else []
    command += ["--additional-config", json.dumps(additional)] if additional else []
    variables = os.environ | COMMON_ENV | ({} if has_gpu() else CPU_ENV) | (env or {})
    with log.open("wb") as out:  # a session of its own: Ctrl-C reaches us, and we stop the server in order
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while not _healthy(url):
            waited = time.monotonic() - began
            if process.poll() is not None:
                raise ServerError(f"`vllm serve` ended with exit code {process.returncode}\n{_tail(log)}")
            if waited > timeout:
                raise ServerError(f"`vllm serve` did not answer within {timeout:.0f} s\n{_tail(log)}")
            waiting(waited)
            time.sleep(0.5)
        yield Server(process, url, log, time.monotonic() - began)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and every process it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with suppress(ProcessLookupError, PermissionError):  # workers that outlived it: the session is ours alone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def _healthy(url: str) -> bool:
    try:
        _get(url + "/health")
    except (urllib.error.URLError, OSError):
        return False
    return True


def _tail(log: Path, lines: int = 30) -> str:
    text = log.read_text(errors="replace").splitlines()
    return "\n".join([f"last lines of {log}:", *("    " + line[:300] for line in text[-lines:])])
