"""generate.py: lossless, and drafting exactly by the window rule of DESIGN.md."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pairs import PAIR_FAMILIES, Size, random_prompt, random_steering, tiny_pair
from scipy.stats import chi2
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.decoding.chain import Block, _Chooser, _fit, acceptance_length, generate
from vllm_steer.drafters.steered.hf import attach
from vllm_steer.drafters.steered.module import Steering

K = 4
NEW = 48


def alone(target: nn.Module, prompt: list[int], new: int = NEW) -> list[int]:
    """What the target generates greedily, by transformers' own loop."""
    out = target.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, nn.Module, Steering]:
    target, drafter = tiny_pair("llama")
    return target, drafter, random_steering(target.config, drafter.config)


# --- lossless -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        *((family, {}) for family in PAIR_FAMILIES),
        ("mistral", {"sliding_window": 8}),  # windows shorter than the text: caches are still cropped
        ("gemma2", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("glm4", {}),
    ],
)
def test_greedy_is_the_target_alone(family: str, extra: dict) -> None:
    target, drafter = tiny_pair(family, **extra)
    steering = random_steering(target.config, drafter.config, rank=8)
    for length in (1, 30):
        prompt = random_prompt(length, seed=length)
        assert generate(target, drafter, prompt, steering, k=K, max_new_tokens=NEW).tokens == alone(target, prompt)


def test_every_number_of_rejections_occurs(llama: tuple) -> None:
    target, drafter, steering = llama
    for how in (steering, None):
        blocks = [
            b
            for s in range(4)
            for b in generate(target, drafter, random_prompt(6, s), how, k=K, max_new_tokens=NEW).blocks
        ]
        assert {b.accepted for b in blocks} == set(range(K + 1))


def test_steering_changes_the_drafts_and_nothing_else(llama: tuple) -> None:
    target, drafter, steering = llama
    prompt = random_prompt(9)
    plain = generate(target, drafter, prompt, None)
    assert generate(target, drafter, prompt, steering, scale=0.0) == plain
    assert generate(target, drafter, prompt, Steering(steering.config)) == plain  # the zero projection
    steered = generate(target, drafter, prompt, steering)
    assert steered.blocks != plain.blocks and steered.tokens == plain.tokens
    assert generate(target, drafter, prompt, steering, scale=0.5).blocks != steered.blocks
    assert "up_proj.inner" not in str(list(drafter.state_dict()))


def test_a_target_drafting_for_itself_is_always_right(llama: tuple) -> None:
    target = llama[0]
    generation = generate(target, target, random_prompt(5), k=3, max_new_tokens=41)
    assert [b.accepted for b in generation.blocks] == [3] * 10
    assert acceptance_length(generation.blocks) == 4


# --- the window rule, without caches ------------------------------------------------------------------------


class Recomputed:
    """Drafts of every block from full forwards; `rule` says which rows of a block's window get its guide."""

    def __init__(self, target: nn.Module, drafter: nn.Module, steering: Steering, prompt: list[int]):
        self.drafter, self.steering, self.prompt = drafter, steering, prompt
        self.generation = generate(target, drafter, prompt, steering, k=K, max_new_tokens=NEW)
        self.tokens = prompt + self.generation.tokens
        states = target(torch.tensor([self.tokens]), output_hidden_states=True).hidden_states
        self.states = torch.cat([states[i][0] for i in steering.config.target_layer_ids], -1)

    def drafts(self, rule: str) -> list[tuple[int, ...]]:
        config = self.steering.config
        written = torch.zeros(len(self.tokens) + K, config.num_steered, config.drafter.intermediate_size)
        result, window, fed = [], len(self.prompt), 0
        for block in self.generation.blocks:
            n = block.position
            delta = self.steering(self.states[n - 1])
            start = window if rule == "window" else max(window, min(n, window + fed))  # "keep": cached rows stay
            written[start : n + K] = delta
            sequence = self.tokens[: n + 1]
            for _ in range(K):
                injector = attach(self.drafter, config.steered_layers)
                with injector.using(written[None, : len(sequence)]):
                    sequence = [*sequence, int(self.drafter(torch.tensor([sequence])).logits[0, -1].argmax())]
                injector.detach()
            result.append(tuple(sequence[n + 1 :]))
            window, fed = n, K
        return result


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
@torch.no_grad()
def test_drafts_follow_the_window_rule(family: str) -> None:
    target, drafter = tiny_pair(family)
    steering = random_steering(target.config, drafter.config)
    other = 0
    for seed in range(3):
        check = Recomputed(target, drafter, steering, random_prompt(1 + 6 * seed, seed))
        drafted = [block.drafts for block in check.generation.blocks]
        assert check.drafts("window") == drafted
        other += check.drafts("keep") != drafted
    assert other  # the check can tell one rule from another


# --- sampled ------------------------------------------------------------------------------------------------

VOCAB = 7


def p_value(before: Tensor, after: Tensor, p: Tensor) -> float:
    """Chi-square of sampled tokens `after` [N] against p [N, V], the target's own distribution of each.

    Per preceding token a, S_a = sum of (one-hot - p) has covariance C_a = sum of (diag p - p p^T) if every token
    is drawn from its own p; then the sum over a of S_a' C_a^-1 S_a is chi-square. Tokens too rare for the limit
    theorem are left out, and the most frequent one, which the others determine.
    """
    statistic, freedom = 0.0, 0
    for a in before.unique():
        rows = p[before == a].double()
        s = (nn.functional.one_hot(after[before == a], VOCAB) - rows).sum(0)
        covariance = torch.diag(rows.sum(0)) - rows.T @ rows
        use = (covariance.diag() >= 5) & (rows.sum(0) < rows.sum(0).max())
        statistic += float(s[use] @ torch.linalg.solve(covariance[use][:, use], s[use]))
        freedom += int(use.sum())
    assert freedom >= 8, "too few cells"
    return float(chi2.sf(statistic, freedom))


@pytest.fixture(scope="module")
@torch.no_grad()
def small() -> tuple[nn.Module, nn.Module, Steering]:
    """A pair sharp and wrong enough to show a biased verification."""
    pair = tiny_pair("llama", 3, 0.6, target=Size(64, 4, 64), drafter=Size(32, 1, 32), vocab_size=VOCAB)
    for model in pair:
        model.lm_head.weight *= 2
    return *pair, random_steering(pair[0].config, pair[1].config)


@torch.no_grad()
def sampled(small: tuple, temperature: float, count: int = 250, **how) -> tuple[Tensor, Tensor, Tensor]:
    """Preceding tokens, sampled tokens and the target's distributions of them, over three prompts."""
    target, drafter, steering = small
    rows = []
    for seed in range(3):
        prompt = random_prompt(4, seed, VOCAB)
        new = generate(target, drafter, prompt, steering, k=3, max_new_tokens=count, temperature=temperature,
                       seed=seed, **how).tokens  # fmt: skip
        logits = target(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        before = torch.tensor([prompt[-1], *new[:-1]])
        rows.append((before, torch.tensor(new), torch.softmax(logits / temperature, -1)))
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


@pytest.mark.parametrize("draft_sample", ["greedy", "probabilistic"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_output_is_distributed_as_the_target(small: tuple, draft_sample: str, temperature: float) -> None:
    assert p_value(*sampled(small, temperature, draft_sample=draft_sample)) > 1e-3


@pytest.mark.parametrize("draft_sample", ["greedy", "probabilistic"])
def test_the_chi_square_notices_a_biased_verification(
    small: tuple, draft_sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic mistake: after a rejection, draw from the target itself and not from what the drafter left."""
    honest = _Chooser.verify

    def biased(self: _Chooser, logits: Tensor, drafts: list[int], dists: list) -> tuple[int, int]:
        accepted, token = honest(self, logits, drafts, dists)
        return accepted, self.target_token(logits[accepted]) if accepted < len(drafts) else token

    monkeypatch.setattr(_Chooser, "verify", biased)
    assert p_value(*sampled(small, 1.0, count=500, draft_sample=draft_sample)) < 1e-3


@pytest.mark.parametrize("draft_sample", ["greedy", "probabilistic"])
def test_rejection_sampling(draft_sample: str) -> None:
    """One draft, fixed distributions, many draws: the first token of the block has the target's distribution."""
    torch.manual_seed(0)
    target, drafter = torch.randn(2, VOCAB) * 1.5, torch.randn(VOCAB) * 1.5
    chooser, counts, passed, n = _Chooser(0.8, draft_sample, seed=1), Counter(), 0, 4000
    for _ in range(n):
        draft, dist = chooser.draft_token(drafter)
        accepted, token = chooser.verify(target, [draft], [dist])
        counts[draft if accepted else token] += 1
        passed += accepted
    p, q = chooser.probabilities(target[0]), chooser.probabilities(drafter)
    statistic = sum((counts[v] - n * float(p[v])) ** 2 / (n * float(p[v])) for v in range(VOCAB))
    assert chi2.sf(statistic, VOCAB - 1) > 1e-3
    expected = float(torch.minimum(p, q).sum() if draft_sample == "probabilistic" else p[drafter.argmax()])
    assert abs(passed / n - expected) < 0.03


def test_seeds(small: tuple) -> None:
    make = lambda seed: generate(*small[:2], [1, 2], small[2], temperature=1.0, seed=seed)  # noqa: E731
    assert make(1) == make(1) != make(2)


# --- stops, counting, arguments -----------------------------------------------------------------------------


def test_end_of_sequence(llama: tuple) -> None:
    target, drafter, steering = llama
    prompt = random_prompt(7)
    whole = generate(target, drafter, prompt, steering, k=K, max_new_tokens=NEW)
    for eos in list(dict.fromkeys(whole.tokens))[:12]:
        cut = generate(target, drafter, prompt, steering, k=K, max_new_tokens=NEW, eos_token_ids=[eos, 999])
        assert cut.tokens == whole.tokens[: whole.tokens.index(eos) + 1]
        assert len(cut.tokens) == 1 + sum(b.kept for b in cut.blocks)
        for mine, theirs in zip(cut.blocks, whole.blocks, strict=False):
            assert (mine.position, mine.drafts, mine.accepted) == (theirs.position, theirs.drafts, theirs.accepted)
        if cut.blocks:
            assert cut.blocks[-1].stop == "eos" and cut.blocks[-1].tokens == cut.blocks[-1].kept
    assert generate(target, drafter, prompt, steering, eos_token_ids=whole.tokens[:1]).blocks == []


def test_length_limit(llama: tuple) -> None:
    target, drafter, steering = llama
    prompt = random_prompt(7)
    whole = generate(target, drafter, prompt, steering, k=K, max_new_tokens=NEW)
    for limit in range(1, 16):
        cut = generate(target, drafter, prompt, steering, k=K, max_new_tokens=limit)
        assert cut.tokens == whole.tokens[:limit]
        assert limit == 1 + sum(b.kept for b in cut.blocks)
        assert [b.drafts for b in cut.blocks] == [b.drafts for b in whole.blocks[: len(cut.blocks)]]
        assert [b.stop for b in cut.blocks] == [None] * (len(cut.blocks) - 1) + ["length"] * (limit > 1)
        assert [b.accepted for b in cut.blocks] == [b.accepted for b in whole.blocks[: len(cut.blocks)]]


def test_positions_and_drafts_fit_together(llama: tuple) -> None:
    target, drafter, steering = llama
    prompt = random_prompt(7)
    generation = generate(target, drafter, prompt, steering, k=K, max_new_tokens=NEW)
    tokens, position = prompt + generation.tokens, len(prompt)
    for block in generation.blocks[:-1]:
        assert block.position == position and len(block.drafts) == K
        after = tokens[position + 1 : position + 2 + block.accepted]
        assert tuple(after[:-1]) == block.drafts[: block.accepted]
        assert block.accepted == K or after[-1] != block.drafts[block.accepted]
        position += block.kept


def test_acceptance_length() -> None:
    full, short = Block(5, (1, 2, 3), 3, 4), Block(9, (1, 2, 3), 0, 1)
    assert acceptance_length([full, short]) == 2.5
    assert acceptance_length([full, short, Block(10, (1, 2, 3), 2, 1, "length")]) == 8 / 3  # counts in full
    assert acceptance_length([full, short, Block(10, (1, 2, 3), 2, 1, "eos")]) == 2  # up to the end
    assert acceptance_length([]) != acceptance_length([])


def test_a_drafter_vocabulary_padded_less_is_never_drafted_beyond() -> None:
    assert _fit(torch.tensor([1.0, 2.0]), 4).tolist() == [1.0, 2.0, float("-inf"), float("-inf")]


@pytest.mark.parametrize("draft_sample", ["greedy", "probabilistic"])
def test_a_drafter_vocabulary_padded_more_is_cut(small: tuple, draft_sample: str) -> None:
    _, other = tiny_pair("llama", 3, target=Size(64, 4, 64), drafter=Size(32, 1, 32), vocab_size=VOCAB + 5)
    prompt = [1, 2, 3]
    assert generate(small[0], other, prompt, max_new_tokens=20).tokens == alone(small[0], prompt, 20)
    generation = generate(small[0], other, prompt, temperature=1.0, draft_sample=draft_sample)
    assert max(max(b.drafts) for b in generation.blocks) < VOCAB


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"k": 0}, "k is 0, allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"draft_sample": "best"}, "draft_sample is 'best', allowed are greedy, probabilistic"),
    ],
)
def test_arguments(llama: tuple, how: dict, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        generate(*llama[:2], [1], llama[2], **how)
    with pytest.raises(SteeringError, match="prompt is empty"):
        generate(*llama[:2], [])
