"""Clients that come, read a little and go, at a real `vllm serve` with a steered drafter on both model runners."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import server_env
from pairs import make_pair, random_prompt
from test_serve import OPTIONS, serve
from transformers import AutoModelForCausalLM

from vllm_steer.decoding.chain import Generation, generate
from vllm_steer.drafters.steered import checkpoint

pytestmark = pytest.mark.slow

K, NEW = 4, 40
LONG = 400  # tokens that a client asks for who will not stay
LENGTHS = (5, 9, 17, 40)


def reference(pair: tuple[Path, Path, Path], steered: bool) -> list[Generation]:
    """The answers to prompts of LENGTHS by the Hugging Face loop."""
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
    target, drafter = load(pair.target), load(pair.steered)
    steering = checkpoint.load(pair.steered) if steered else None
    prompts = [random_prompt(n, seed=n) for n in LENGTHS]
    return [generate(target, drafter, p, steering, k=K, max_new_tokens=NEW) for p in prompts]


def metric(server: Any, pattern: str) -> float:
    """Sum over the samples of the server's metrics whose name matches."""
    return sum(sample.value for sample in server.metrics() if re.fullmatch(pattern, sample.name))


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_streaming_with_disconnects(runner: str, tmp_path: Path) -> None:
    """Eight streams, half of them left in the middle of an answer; then a client alone, whose blocks are counted."""
    from openai import OpenAI

    pair = make_pair(tmp_path / "pair", "llama")
    on, off = reference(pair, steered=True), reference(pair, steered=False)
    answers = [g.tokens for g in on]
    spec = {"model": str(pair.steered), "num_speculative_tokens": K}
    env = server_env(runner, tmp_path)
    options = (*OPTIONS, "--enforce-eager")
    with serve(pair.target, tmp_path / "log", *options, speculative=spec, env=env, timeout=500) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300)

        def ask(i: int, chunks: int | None = None) -> list[int]:
            """Token ids of the answer to prompt i, or of its first few chunks."""
            tokens = NEW if chunks is None else LONG
            keys = {"model": str(pair.target), "max_tokens": tokens, "temperature": 0, "stream": True}
            extra = {"ignore_eos": True, "return_token_ids": True}
            prompt = random_prompt(LENGTHS[i], seed=LENGTHS[i])
            stream, ids = client.completions.create(prompt=prompt, **keys, extra_body=extra), []
            for seen, chunk in enumerate(stream):
                if seen == chunks:
                    stream.close()
                    break
                ids += [token for choice in chunk.choices for token in choice.token_ids or []]
            return ids

        with ThreadPoolExecutor(8) as pool:
            whole = [pool.submit(ask, i) for i in range(4)]
            left = [pool.submit(ask, i, 2 + i) for i in range(4)]
            assert [f.result() for f in whole] == answers
            cut = [f.result() for f in left]
        assert all(part and part == answer[: len(part)] != answer for part, answer in zip(cut, answers, strict=True))
        deadline = time.monotonic() + 60
        unfinished = "vllm:num_requests_(running|waiting)"
        while metric(server, unfinished) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert metric(server, unfinished) == 0, "requests of clients that went away are still there"
        generated = metric(server, "vllm:generation_tokens_total")
        assert 4 * NEW < generated < 4 * NEW + 2 * LONG, "answers were written to the end for clients that had gone"
        blocks = []
        for i, answer in enumerate(answers):
            before = server.counters()["drafts"]
            assert ask(i) == answer
            blocks.append(server.counters()["drafts"] - before)
    expected, unsteered = ([len(g.blocks) for g in generations] for generations in (on, off))
    assert blocks != pytest.approx(unsteered, abs=1)
    assert blocks == pytest.approx(expected, abs=1), "the last block of an answer may not count"
