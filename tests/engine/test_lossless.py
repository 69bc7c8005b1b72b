"""Sampled output of a steered engine has the target's own distribution: chi-square over every generated token.

For each token the target's exact distribution given what really came before is computed with Hugging Face. Spreading
the token's probability interval uniformly over its cumulative distribution gives numbers that are independent and
uniform if, and only if, every token was drawn from that distribution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_own_guides, assert_steered
from pairs import make_pair, random_prompt
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

VOCAB = 32
NEW = 24
BINS = 16
TEMPERATURES = (0.6, 1.0, 1.4)
SEQUENCES = {"v1": 96, "v2": 24}  # Triton's interpreter is slow
RUNS = [("v1", TEMPERATURES), ("v2", (0.6,)), pytest.param("v2", TEMPERATURES[1:], marks=pytest.mark.slow)]
P_VALUE = 1e-4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("sampled"), "llama", vocab_size=VOCAB, distance=0.2)


def kept(probabilities: Tensor, top_k: int = 0, top_p: float = 1) -> Tensor:
    """Probabilities [N, V] after the filters, in vLLM's order: top-p counts what top-k left."""
    order = probabilities.sort(descending=True)
    rank = order.indices.argsort(-1)
    found = probabilities.masked_fill(rank >= (top_k or rank.shape[-1]), 0)
    found = found / found.sum(-1, keepdim=True)
    before = found.gather(-1, order.indices).cumsum(-1) - found.gather(-1, order.indices)
    found = found.masked_fill(before.gather(-1, rank) >= top_p, 0)
    return found / found.sum(-1, keepdim=True)


@torch.no_grad()
def uniforms(
    target: Path, prompts: list[list[int]], outputs: list[list[int]], temperature: float, **filters: float
) -> Tensor:
    """One number in [0, 1] per sampled token, [N]; the vocabulary is ordered by the target's probability."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        rows = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].double()
        probabilities, order = kept(torch.softmax(rows / temperature, -1), **filters).sort(descending=True)
        place = (order == torch.tensor(output)[:, None]).double().argmax(-1, keepdim=True)
        mass = probabilities.gather(-1, place)
        assert (mass > 0).all(), "a token that the target's filters exclude"
        below = probabilities.cumsum(-1).gather(-1, place) - mass
        found.append((below + mass * torch.rand(mass.shape, generator=generator, dtype=torch.float64))[:, 0])
    return torch.cat(found).clamp(0, 1 - 1e-12)


def p_value(numbers: Tensor) -> float:
    """Chi-square p-value that numbers in [0, 1] are uniform."""
    return float(chisquare(torch.bincount((numbers * BINS).long(), minlength=BINS).tolist()).pvalue)


def sample_plainly(target: Path, prompts: list[list[int]], temperature: float) -> list[list[int]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    batch = torch.tensor(prompts)
    keys = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "max_new_tokens": NEW}
    return model.generate(batch, attention_mask=torch.ones_like(batch), pad_token_id=0, **keys)[:, 6:].tolist()


def test_the_comparison_can_fail(pair: tuple[Path, Path, Path]) -> None:
    prompts = [random_prompt(6, seed=i, vocab_size=VOCAB) for i in range(SEQUENCES["v2"])]
    right = sample_plainly(pair.target, prompts, 1.0)
    assert p_value(uniforms(pair.target, prompts, right, 1.0)) > 0.01
    assert p_value(uniforms(pair.target, prompts, sample_plainly(pair.target, prompts, 0.6), 1.0)) < P_VALUE
    assert p_value(uniforms(pair.target, prompts, sample_plainly(pair.drafter, prompts, 1.0), 1.0)) < P_VALUE


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize(("runner", "temperatures"), RUNS)
def test_sampled_output_is_the_targets(
    pair: tuple[Path, Path, Path], runner: str, temperatures: tuple[float, ...], method: str, runners: Any
) -> None:
    target, _, steered = pair
    prompts = [random_prompt(6, seed=i, vocab_size=VOCAB) for i in range(SEQUENCES[runner])]
    spec = {"model": str(steered), "num_speculative_tokens": 3, "draft_sample_method": method}
    calls = [{"prompts": prompts, "sampling": {"temperature": t, "max_tokens": NEW}} for t in temperatures]
    out = runners(runner).run(target, spec, calls, max_num_seqs=32, max_num_batched_tokens=256)
    assert out["error"] is None, out["log"][-4000:]
    for temperature, call in zip(temperatures, out["calls"], strict=True):
        blocks = sum(len(b) for b in call["blocks"])
        assert_steered(call, {3})
        assert_own_guides(call, target, steered, prompts)
        assert blocks < 0.9 * len(prompts) * NEW, "hardly a draft was accepted: this would prove nothing"
        p = p_value(uniforms(target, prompts, call["tokens"], temperature))
        assert p > P_VALUE, f"T={temperature}: p={p:.2g}"
