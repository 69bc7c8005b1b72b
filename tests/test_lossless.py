"""Sampled output of a steered engine has the target's own distribution (Pearson chi-square, vocabulary of 32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_pair, random_prompt
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCAB = 32
TEMPERATURES = (0.6, 1.0, 1.4)
SAMPLES = {"v1": 3000, "v2": 900}  # Triton's interpreter is slow
P_VALUE = 1e-4  # 24 comparisons: a correct sampler fails about once in 400 runs, with fixed seeds never


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("sampled"), "llama", vocab_size=VOCAB, distance=0.2)


@torch.no_grad()
def exact(target: Path, prompt: list[int], temperature: float) -> list[Tensor]:
    """Distributions [VOCAB] of the second and third new token, by enumerating what comes before them."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    probabilities = lambda rows: torch.softmax(model(torch.tensor(rows)).logits[:, -1].double() / temperature, -1)  # noqa: E731
    first = probabilities([prompt])[0]
    second = probabilities([[*prompt, a] for a in range(VOCAB)])
    pairs = [[*prompt, a, b] for a in range(VOCAB) for b in range(VOCAB)]
    third = probabilities(pairs).view(VOCAB, VOCAB, VOCAB)
    return [first @ second, torch.einsum("a,ab,abc->c", first, second, third)]


def p_value(tokens: list[int], expected: Tensor) -> float:
    """Chi-square p-value; tokens expected fewer than 5 times share one bin."""
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    want = expected * len(tokens)
    rare = want < 5
    bins = lambda x: [*x[~rare].tolist(), *([x[rare].sum().item()] if rare.any() else [])]  # noqa: E731
    observed, wanted = bins(counts), bins(want)
    scale = sum(observed) / sum(wanted)
    return float(chisquare(observed, [w * scale for w in wanted]).pvalue)


def test_the_comparison_can_fail() -> None:
    uniform = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    skewed = torch.softmax(torch.linspace(0, 0.6, VOCAB), 0).double()
    draws = torch.multinomial(skewed, 3000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    assert p_value(draws, skewed) > 0.01
    assert p_value(draws, uniform) < P_VALUE


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_sampled_output_is_the_targets(pair: tuple[Path, Path, Path], runner: str, method: str, runners: Any) -> None:
    target, _, steered = pair
    prompt = random_prompt(6, seed=1, vocab_size=VOCAB)
    spec = {"model": str(steered), "num_speculative_tokens": 3, "draft_sample_method": method}
    sampling = [{"temperature": t, "max_tokens": 4, "seed": None} for t in TEMPERATURES]
    calls = [{"prompts": [prompt] * SAMPLES[runner], "sampling": s} for s in sampling]
    out = runners(runner).run(target, spec, calls, max_num_seqs=64, max_num_batched_tokens=512)
    assert out["error"] is None, out["log"][-4000:]
    for temperature, call in zip(TEMPERATURES, out["calls"], strict=True):
        assert any(len(blocks) < 4 for blocks in call["blocks"]), "no draft was ever accepted"
        for place, expected in enumerate(exact(target, prompt, temperature), start=1):
            p = p_value([tokens[place] for tokens in call["tokens"]], expected)
            assert p > P_VALUE, f"T={temperature}, new token {place + 1}: p={p:.2g}"
