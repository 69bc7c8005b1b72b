"""The reference loop of block drafters: exact, and drafts that depend on the one before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from blocks import DFLASH, TARGET, TREEFLASH, make_block, make_ngram
from pairs import make_pair, random_prompt
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from vllm_steer.common.errors import SteeringError
from vllm_steer.decoding import block
from vllm_steer.decoding.block import NeuralRefinement, Refinement, generate
from vllm_steer.decoding.rescoring import rescored
from vllm_steer.drafters.block import checkpoint, ngram

PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def target() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def small() -> AutoModelForCausalLM:
    """A language model of the target's tokens."""
    return AutoModelForCausalLM.from_pretrained(TARGET.parent / "drafter", dtype=torch.float32).eval()


@pytest.mark.parametrize("which", ["blind", "bigram", "language model", "approximator", "medusa"])
def test_greedy_output_is_the_targets(
    which: str, target: AutoModelForCausalLM, small: AutoModelForCausalLM, tmp_path: Path
) -> None:
    directory = {"approximator": TREEFLASH, "medusa": tmp_path / "m"}.get(which, DFLASH)
    if which == "medusa":
        make_block(directory, TARGET, "medusa", k=3)
    own = {"bigram": Refinement(ngram.load(DFLASH), 0.4), "language model": NeuralRefinement(small, 0.5)}
    refinement = own.get(which)
    found = generate(target, checkpoint.load(directory), PROMPT, refinement=refinement, max_new_tokens=40)
    alone = target.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )
    assert found.tokens == alone[0, len(PROMPT) :].tolist()
    assert found.acceptance_length >= 1
    assert sum(b.kept for b in found.blocks) == 39  # the first token is the prefill's


def test_the_chain_is_realised(target: AutoModelForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draft is asked for with the draft before it, not with what the first pass would have said."""
    seen: list[tuple[int, int]] = []
    honest = block._Reader.logits

    def watched(self: block._Reader, hidden: torch.Tensor, text: list[int], step: int) -> torch.Tensor:
        logits = honest(self, hidden, text, step)
        seen.append((text[-1], int(logits.argmax())))
        return logits

    monkeypatch.setattr(block._Reader, "logits", watched)
    found = generate(target, checkpoint.load(TREEFLASH), PROMPT, max_new_tokens=12)
    walked = iter(seen)
    for each in found.blocks:
        steps = [next(walked) for _ in each.drafts]
        assert [draft for _, draft in steps] == list(each.drafts)
        assert [previous for previous, _ in steps[1:]] == list(each.drafts[:-1])


def test_rescoring_by_hand() -> None:
    table = ngram.count([[0, 1, 0, 2, 0, 1]], ngram.NgramConfig(4, 2, 1, 1))
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    found = rescored(logits, torch.tensor([0, 3]), table, 0.5)
    wanted = logits + 0.5 * table.dense()[[0, 3]]
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))


def test_a_language_model_reads_the_whole_text(target: AutoModelForCausalLM, small: AutoModelForCausalLM) -> None:
    """With nothing but its weight, drafts are what it would write; at weight 0 they are the block's."""
    drafter = checkpoint.load(DFLASH)
    alone = generate(target, drafter, PROMPT, max_new_tokens=16)
    assert generate(target, drafter, PROMPT, refinement=NeuralRefinement(small, 0.0), max_new_tokens=16) == alone
    found = generate(target, drafter, PROMPT, refinement=NeuralRefinement(small, 1e6), max_new_tokens=16)
    for each in found.blocks:
        text = [*PROMPT, *found.tokens][: each.position + 1]
        wrote = small.generate(
            torch.tensor([text]), do_sample=False, max_new_tokens=len(each.drafts), eos_token_id=None
        )
        assert list(each.drafts) == wrote[0, len(text) :].tolist()
    with pytest.raises(SteeringError, match="rows is 2: .* not trees"):
        generate(target, drafter, PROMPT, refinement=NeuralRefinement(small, 1.0), rows=2)


@pytest.mark.parametrize("kind", ["dflash", "treeflash", "language model"])
def test_sampled_tokens_have_the_targets_distribution(kind: str, tmp_path: Path) -> None:
    """Three tokens on a vocabulary of 4, against exact probabilities."""
    vocab, count = 4, 600
    path = make_pair(tmp_path / "pair", "qwen3", vocab_size=vocab, distance=0.2).target
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    drafter = checkpoint.load(make_block(tmp_path / kind, path, "treeflash" if kind == "treeflash" else "dflash", k=2))
    small = AutoModelForCausalLM.from_pretrained(path.parent / "drafter", dtype=torch.float32).eval()
    own = {
        "dflash": Refinement(ngram.load(make_ngram(tmp_path, vocab)), 0.5),
        "language model": NeuralRefinement(small, 0.5),
    }
    refinement = own.get(kind)
    prompt = random_prompt(5, seed=0, vocab_size=vocab)
    with torch.no_grad():
        logits = lambda ids: model(torch.tensor([ids])).logits[0, -1].double()  # noqa: E731
        first = torch.softmax(logits(prompt), -1)
        second = torch.stack([torch.softmax(logits([*prompt, t]), -1) for t in range(vocab)])
        third = {(a, b): torch.softmax(logits([*prompt, a, b]), -1) for a in range(vocab) for b in range(vocab)}
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(count):
        found = generate(
            model, drafter, prompt, k=2, refinement=refinement, max_new_tokens=3, temperature=1.0,
            draft_sample="probabilistic", seed=seed,
        )  # fmt: skip
        counts[tuple(found.tokens[:3])] += 1
        accepted += sum(b.accepted for b in found.blocks)
    wanted = {
        (a, b, c): float(first[a] * second[a, b] * third[a, b][c]) * count
        for a in range(vocab) for b in range(vocab) for c in range(vocab)
    }  # fmt: skip
    often = [key for key, value in wanted.items() if value >= 5]
    seen = [counts[key] for key in often] + [count - sum(counts[key] for key in often)]
    expected = [wanted[key] for key in often] + [count - sum(wanted[key] for key in often)]
    assert accepted > count / 10
    assert chisquare(seen, expected).pvalue > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"draft_sample": "other"}, "draft_sample is 'other'"),
    ],
)
def test_options_out_of_range(options: dict, words: str, target: AutoModelForCausalLM) -> None:
    with pytest.raises(SteeringError, match=words):
        generate(target, checkpoint.load(DFLASH), PROMPT, **options)
