"""The real `vllm serve` as a user runs it: OpenAI client in front, steered drafter behind, damage refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from repository import ROOT
from server import ServerError, serve

PAIR = ROOT / "examples" / "tiny_pair"
K, MAX_TOKENS = 5, 48
OPTIONS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.3")
ENV = {"VLLM_CPU_CI_ENV": "1"}  # traced by Dynamo as in any server, but run without compiling C++: saves minutes


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:3]]


def greedy_texts(prompts: list[str]) -> list[str]:
    """What the target alone says, by Hugging Face in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    model = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_serves_steered_and_lossless(prompts: list[str], tmp_path: Path) -> None:
    from openai import OpenAI

    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
    with serve(PAIR / "target", tmp_path / "log", *OPTIONS, speculative=spec, env=ENV, timeout=240) as server:
        assert "of 1 drafter layers" in (server.proof_of_life() or "")
        client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=60)
        common = {"model": str(PAIR / "target"), "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
        texts, chunks = [], 0
        for prompt in prompts:
            pieces = [c.choices[0].text for c in client.completions.create(prompt=prompt, **common) if c.choices]
            texts.append("".join(pieces))
            chunks += len(pieces)
        chat = client.chat.completions.create(messages=[{"role": "user", "content": prompts[0]}], **common)
        chat_text = "".join(c.choices[0].delta.content or "" for c in chat if c.choices)
        counters = server.counters()
    assert texts == greedy_texts(prompts)
    assert chat_text  # the template ends the message with a newline, so the text may differ from the completion's
    assert chunks < len(prompts) * MAX_TOKENS, "accepted drafts arrive several tokens to a chunk"
    assert counters["drafts"] > 0 and counters["drafted"] == K * counters["drafts"]
    assert len(counters["per_position"]) == K and sum(counters["per_position"]) == counters["accepted"] > 0
    assert counters["per_position"] == sorted(counters["per_position"], reverse=True)


def test_serves_a_block_drafter_with_compiled_layers(prompts: list[str], tmp_path: Path) -> None:
    from openai import OpenAI

    spec = {"method": "dflash", "model": str(PAIR / "treeflash"), "num_speculative_tokens": K}
    with serve(PAIR / "target", tmp_path / "log", *OPTIONS, speculative=spec, env=ENV, timeout=240) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=60)
        common = {"model": str(PAIR / "target"), "max_tokens": MAX_TOKENS, "temperature": 0}
        texts = [client.completions.create(prompt=prompt, **common).choices[0].text for prompt in prompts]
        counters = server.counters()
    assert texts == greedy_texts(prompts)
    assert "each draft of a block knows the one before, by its approximator" in (tmp_path / "log").read_text()
    assert counters["accepted"] > 0.6 * counters["drafts"], counters


def test_damaged_checkpoint_starts_no_server(tmp_path: Path) -> None:
    shutil.copytree(PAIR / "steered", tmp_path / "steered")
    weights = tmp_path / "steered" / "steering" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spec = {"model": str(tmp_path / "steered"), "num_speculative_tokens": K}
    log = tmp_path / "log"
    with pytest.raises(ServerError, match=r"ended with exit code [1-9]") as refusal:
        with serve(PAIR / "target", log, *OPTIONS, speculative=spec, env=ENV, timeout=240):
            pass
    assert f"{weights} is truncated or not a safetensors file" in str(refusal.value)
    assert "EngineCore" not in log.read_text(), "the front end refuses: no engine process was started"


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["steered", "drafter"])
def test_a_plugin_that_cannot_start(drafter: str, tmp_path: Path) -> None:
    """Nothing of ours is called in the engine then; what vLLM asks of its stat loggers is left, and refuses."""
    (tmp_path / "sitecustomize.py").write_text("import sys\n\nsys.modules['wrapt'] = None  # importing it fails\n")
    spec, log = {"model": str(PAIR / drafter), "num_speculative_tokens": K}, tmp_path / "log"
    env = ENV | {"PYTHONPATH": str(tmp_path)}
    refused = pytest.raises(ServerError, match=r"ended with exit code [1-9]") if drafter == "steered" else nullcontext()
    with refused as refusal, serve(PAIR / "target", log, *OPTIONS, speculative=spec, env=env, timeout=240):
        pass
    assert "vllm-steer is installed but could not start" in log.read_text()
    if refusal is not None:
        assert f"{PAIR / drafter} is a steered drafter, and vllm-steer was not called to check it" in str(refusal.value)
