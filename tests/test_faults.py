"""What dies while a steered server answers: clients get an error or the whole answer, and nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from pairs import make_pair, random_prompt
from test_serve import OPTIONS, serve

pytestmark = pytest.mark.slow

K = 4
PATIENCE = 60  # seconds in which vLLM notices


def processes(session: int) -> dict[str, int]:
    """Names vLLM gave to the processes of a session (setproctitle), and their ids."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    found[(entry / "cmdline").read_text().split("\0")[0]] = int(entry.name)
            except (OSError, ProcessLookupError):  # it ended meanwhile
                continue
    return found


@pytest.mark.parametrize("victim", ["Worker_TP1", "EngineCore"])
def test_a_process_of_the_server_is_killed(victim: str, tmp_path: Path) -> None:
    from openai import APIError, OpenAI

    target, _, steered = make_pair(tmp_path / "pair", "llama")
    spec = {"model": str(steered), "num_speculative_tokens": K}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    options = (*OPTIONS, "--enforce-eager", "--tensor-parallel-size", "2", "--num-gpu-blocks-override", "64")
    with serve(target, tmp_path / "log", *options, speculative=spec, env=env, timeout=400) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=PATIENCE, max_retries=0)
        keys = {"model": str(target), "max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}
        (pid,) = [pid for name, pid in processes(server.process.pid).items() if victim in name]
        began = time.monotonic()
        with pytest.raises(APIError):
            for seen, _ in enumerate(client.completions.create(prompt=random_prompt(9, 9), stream=True, **keys)):
                if seen == 2:
                    os.kill(pid, signal.SIGKILL)
        server.process.wait(PATIENCE - (time.monotonic() - began))  # vLLM ends the server, for whoever starts it again
