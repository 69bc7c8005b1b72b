"""top_k without top_p, at a temperature, under speculation on V1's CPU sampler: it ended the engine of stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_pair, random_prompt
from transformers import AutoModelForCausalLM

VOCAB = 64
NEW = 16
SAMPLING: dict[str, dict[str, Any]] = {  # of one batch; each alone in a batch of its own too
    "top_k": {"top_k": 3},
    "no top_k": {},
    "seeded": {"top_k": 5, "seed": 7},
    "logprobs": {"top_k": 8, "logprobs": 2},
    "greedy by top_k": {"top_k": 1},
    "greedy": {"top_k": 4, "temperature": 0.0},
    "all": {"top_k": VOCAB},
    "one token": {"top_k": 3, "max_tokens": 1},
    "penalties": {"top_k": 6, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    "temperature": {"top_k": 2, "temperature": 1.7},
}
NAMES = list(SAMPLING)
BOTH = {"top_k and top_p": {"top_k": 4, "top_p": 0.9}, "top_p": {"top_p": 0.5}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("top_k"), "llama", vocab_size=VOCAB, distance=0.2)


def prompts(n: int) -> list[list[int]]:
    return [random_prompt(6 + i, seed=i, vocab_size=VOCAB) for i in range(n)]


@torch.no_grad()
def ranks(target: Path, prompt: list[int], answer: list[int]) -> list[int]:
    """How many tokens the target holds for likelier than the one that was sampled, for each token of an answer."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    rows = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return (rows > rows.gather(-1, torch.tensor(answer)[:, None])).sum(-1).tolist()


def answers(engine: Any, target: Path, drafter: Path | None, calls: list[dict[str, Any]], **keys: Any) -> list[Any]:
    spec = {"model": str(drafter), "num_speculative_tokens": 3, **keys} if drafter else None
    out = engine.run(target, spec, calls)
    assert out["error"] is None, f"{out['error']}\n{out['log'][-3000:]}"
    return [call["tokens"] for call in out["calls"]]


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("drafter", [1, 2], ids=["plain", "steered"])
def test_top_k_without_top_p(drafter: int, method: str, pair: tuple[Path, Path, Path], runners: Any) -> None:
    options = [{"temperature": 1.0, "max_tokens": NEW} | s for s in SAMPLING.values()]
    batches = [{"prompts": prompts(len(NAMES)), "sampling": options}]
    batches += [{"prompts": prompts(2), "sampling": s} for s in options]
    batches += [{"prompts": prompts(2), "sampling": [options[0], options[0] | s]} for s in BOTH.values()]
    found = answers(runners("v1"), pair.target, pair[drafter], batches, draft_sample_method=method)
    greedy = answers(
        runners("v1"), pair.target, None, [{"prompts": prompts(len(NAMES)), "sampling": {"max_tokens": NEW}}]
    )[0]
    for i, name in enumerate(NAMES):
        for prompt, answer in ((prompts(len(NAMES))[i], found[0][i]), (prompts(2)[0], found[1 + i][0])):
            assert len(answer) == options[i]["max_tokens"]
            if name not in ("no top_k", "penalties", "greedy"):  # the second changes the order of tokens
                assert max(ranks(pair.target, prompt, answer)) < options[i]["top_k"], name
    for name in ("greedy", "greedy by top_k"):
        assert found[0][NAMES.index(name)] == greedy[NAMES.index(name)]
    free = ranks(pair.target, prompts(len(NAMES))[1], found[0][1])
    assert max(free) >= 3, "no top_k must show in its neighbour of the batch, or the mask was everybody's"


def test_seeds_repeat(pair: tuple[Path, Path, Path], runners: Any) -> None:
    call = {"prompts": prompts(2), "sampling": {"temperature": 1.0, "top_k": 8, "seed": 3, "max_tokens": NEW}}
    first, again = answers(runners("v1"), pair.target, pair.steered, [call, dict(call)])
    assert first == again
