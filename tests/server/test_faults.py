"""What fails around a steered server: clients get an error or the whole answer, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from pairs import make_pair, random_prompt
from test_serve import OPTIONS, PAIR, serve

pytestmark = pytest.mark.slow

K = 4
CLIENTS = 4  # as many requests as the server takes at once
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
        all_answer, began = threading.Barrier(CLIENTS), time.monotonic()

        def ask(number: int) -> None:
            stream = client.completions.create(prompt=random_prompt(9, number), stream=True, **keys)
            for seen, _ in enumerate(stream):
                if seen == 2 and all_answer.wait(PATIENCE) == 0:
                    os.kill(pid, signal.SIGKILL)

        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [pool.submit(ask, number) for number in range(CLIENTS)]
            for each in asked:
                with pytest.raises(APIError):
                    each.result()
        server.process.wait(PATIENCE - (time.monotonic() - began))  # vLLM ends the server, for whoever starts it again


def test_a_full_disk(tmp_path: Path) -> None:
    """Caches, and the place of our counts, on a file system without a free byte: it steers, metrics come with space."""
    from openai import OpenAI

    counts = tmp_path / f"vllm-steer-{os.getuid()}"
    counts.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(counts)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with suppress(OSError), (counts / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        caches = dict.fromkeys(("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "HF_HOME", "XDG_CACHE_HOME"), str(counts))
        spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
        env = {"TMPDIR": str(tmp_path)} | caches
        with serve(PAIR / "target", tmp_path / "log", *OPTIONS, "--enforce-eager", speculative=spec, env=env) as server:
            assert server.proof_of_life()
            client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=PATIENCE)
            keys = {"model": str(PAIR / "target"), "prompt": "One day", "max_tokens": 20, "temperature": 0}
            assert client.completions.create(**keys).usage.completion_tokens == 20
            assert "no vllm_steer metrics at /metrics for the time being" in server.log.read_text(errors="replace")
            (counts / "filler").unlink()
            deadline = time.monotonic() + PATIENCE
            while not any(sample.name == "vllm_steer:blocks_total" and sample.value for sample in server.metrics()):
                assert time.monotonic() < deadline, "the metrics did not come"
                time.sleep(0.5)
    finally:
        subprocess.run(["umount", str(counts)], check=True)
