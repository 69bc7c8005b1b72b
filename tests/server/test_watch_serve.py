"""What real servers say of themselves: a good one, a damaged one, several engines, none steered; through Prometheus."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from test_serve import OPTIONS, PAIR, serve

from vllm_steer.drafters.steered import checkpoint

pytestmark = pytest.mark.slow

ORDINARY = 500  # requests
WARNING = "acceptance has collapsed"


def ask(server: Any, number: int) -> int:
    """`number` requests of 16 to 32 tokens, eight at a time, every other one sampled; the tokens they gave."""
    from openai import OpenAI

    prompts = [json.loads(line)["prompt"] for line in (PAIR / "heldout.jsonl").read_text().splitlines()]
    client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300)

    def one(i: int) -> int:
        keys = {"prompt": prompts[i % len(prompts)], "max_tokens": 16 + i % 17, "temperature": i % 2, "seed": i}
        return client.completions.create(model=str(PAIR / "target"), **keys).usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(one, range(number)))


def ours(server: Any) -> dict[str, float]:
    return {
        sample.name.removeprefix("vllm_steer:")
        + "".join(value for label, value in sample.labels.items() if label in ("position", "sampling")): sample.value
        for sample in server.metrics()
        if sample.name.startswith("vllm_steer:") and not sample.name.endswith("_created")
    }


def left_over(server: Any) -> list[Path]:
    """Files of a server that has ended."""
    folder = Path(tempfile.gettempdir()) / f"vllm-steer-{os.getuid()}"
    return [path for path in folder.glob("*.json") if server.process.pid in json.loads(path.read_text())["ancestors"]]


def settled(server: Any, seconds: float = 40) -> dict[str, float]:
    """Our metrics when they have stopped to change: worker and front end look every few seconds."""
    before, since, deadline = ours(server), time.monotonic(), time.monotonic() + seconds
    while time.monotonic() < deadline and time.monotonic() - since < 16:
        time.sleep(1)
        if (now := ours(server)) != before:
            before, since = now, time.monotonic()
    return before


def test_a_good_server_is_silent(tmp_path: Path) -> None:
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": 5}
    options = (*OPTIONS, "--enforce-eager", "--no-enable-prefix-caching")
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, timeout=400) as server:
        start = settled(server, 2)
        assert start["steering_on"] == 1 and start["blocks_total"] == 0
        tokens = ask(server, ORDINARY)
        found, vllm = settled(server), server.counters()
    print(f"{ORDINARY} requests, {tokens} tokens: {found}; vLLM counted {vllm}")
    assert WARNING not in server.log.read_text(errors="replace")
    assert found["blocks_total"] == found["steered_blocks_total"] > 3000
    # No preemption and no full hit of the prefix cache: every block vLLM counted is one of ours.
    assert (found["blocks_total"], found["accepted_tokens_total"]) == (vllm["drafts"], vllm["accepted"])
    assert [found[f"accepted_tokens_per_pos_total{i}"] for i in range(5)] == vllm["per_position"]
    assert 0 < found["guide_norm"] < 1e4
    recorded = found["recorded_accepted_tokensgreedy"], found["recorded_accepted_tokenssampled"]
    assert recorded == pytest.approx((1.207, 1.518), abs=1e-3)
    assert not left_over(server)


def test_a_damaged_server_warns_once(tmp_path: Path) -> None:
    """Weights drawn anew, far too large, and saved as a checkpoint that is intact by every check at its start."""
    damaged = tmp_path / "steered"
    shutil.copytree(PAIR / "steered", damaged)
    steering = checkpoint.load(damaged)
    torch.manual_seed(0)
    torch.nn.init.normal_(steering.output.weight, std=3.0)
    checkpoint.save(damaged, steering)
    spec = {"model": str(damaged), "num_speculative_tokens": 5}
    options = (*OPTIONS, "--enforce-eager")
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, timeout=400) as server:
        ask(server, 80)
        found = settled(server)
        ask(server, 80)
        settled(server)
    lines = [line for line in server.log.read_text(errors="replace").splitlines() if WARNING in line]
    print(f"{found}\n" + "\n".join(lines))
    assert len(lines) == 1, "once per episode"
    assert "WARNING" in lines[0] and "1.21 recorded at training" in lines[0] and "STEER_DISABLE=1" in lines[0]
    assert found["accepted_tokens_total"] / found["blocks_total"] < 0.6
    assert not left_over(server)


def test_several_engines_and_api_servers(tmp_path: Path) -> None:
    """Data parallelism has an API server for each engine; each engine's numbers are there once."""
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": 5}
    options = (*OPTIONS, "--enforce-eager", "--data-parallel-size", "2", "--api-server-count", "2",
               "--no-enable-prefix-caching")  # fmt: skip
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, timeout=500) as server:
        ask(server, 40)
        settled(server)
        samples = server.metrics()
        vllm = server.counters()
    blocks = {sample.labels["engine"]: sample.value for sample in samples if sample.name == "vllm_steer:blocks_total"}
    print(blocks, vllm)
    assert sum(sample.name == "vllm_steer:steering_on" for sample in samples) == 2
    assert blocks.keys() == {"0", "1"} and min(blocks.values()) > 0 and sum(blocks.values()) == vllm["drafts"]


def test_an_unsteered_server_has_no_metrics_of_ours(tmp_path: Path) -> None:
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": 5}
    options = (*OPTIONS, "--enforce-eager")
    env = {"STEER_DISABLE": "1"}
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, env=env, timeout=400) as server:
        ask(server, 4)
        assert server.counters()["drafts"] > 0 and not ours(server)


def test_every_query_of_the_dashboard_has_an_answer(tmp_path: Path) -> None:
    """A short run of the script that made benchmarks/results/dashboard_v1.json."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on PATH (apt-get install prometheus)")
    script = ROOT / "benchmarks" / "dashboard.py"
    paths = PAIR / "target", PAIR / "steered", PAIR / "heldout.jsonl"
    options = ("--seconds", "30", "15", "15", "--json", tmp_path / "out.json")
    done = subprocess.run([sys.executable, script, *paths, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["empty"] and not found["errors"] and len(found["queries"]) > 15
