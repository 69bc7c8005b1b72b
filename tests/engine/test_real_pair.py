"""The pretrained Qwen pair (`pytest -m real_pair`): steering that changes nothing drafts what stock vLLM drafts.

Wants the directories of examples/qwen_pair/assemble.py, or STEER_QWEN_PAIR with `target/` and `drafter/` in it.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
from engines import Runner
from transformers import AutoTokenizer

from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering

pytestmark = pytest.mark.real_pair

PAIR = Path(os.environ.get("STEER_QWEN_PAIR", Path.home() / ".cache" / "vllm-steer" / "qwen_pair"))
K = 5
NEW = {"v1": 32, "v2": 8}
TEXTS = ("def merge_sorted(a: list[int], b: list[int]) -> list[int]:\n", "import json\n\n\ndef load(path):\n")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    configs = (read_model_config(PAIR / part) for part in ("target", "drafter"))
    steering = Steering(SteeringConfig.for_models(*configs, rank=64))
    checkpoint.save(path := tmp_path_factory.mktemp("zero"), steering)
    return path


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_zero_steering_drafts_like_stock(adapter: Path, runner: str) -> None:
    with closing(Runner(runner)) as engines:  # of its own: two that hold this pair do not fit into 16 GB
        check(adapter, runner, engines)


def check(adapter: Path, runner: str, engines: Runner) -> None:
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    prompts = [tokenizer.encode(text) for text in TEXTS]
    spec = {"model": str(PAIR / "drafter"), "num_speculative_tokens": K}
    run = lambda **keys: engines.generate(  # noqa: E731
        PAIR / "target", spec, prompts, max_tokens=NEW[runner], gpu_memory_utilization=0.6, **keys
    )
    stock = run()
    options = {"adapter": str(adapter)}
    zero = run(additional_config={"vllm_steer": options})
    assert "steering is on" in zero["log"]
    off = run(additional_config={"vllm_steer": options | {"scale": 0}})
    killed = run(additional_config={"vllm_steer": options}, env={"STEER_DISABLE": "1"})
    assert "steering is on" not in killed["log"]
    for found in (zero, off, killed):
        assert found["blocks"] == stock["blocks"]
        assert found["tokens"] == stock["tokens"]
