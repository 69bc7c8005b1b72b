"""Trees on Hugging Face models: each verifier gives the target's own tokens or its distribution; a broken one shows."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_pair, random_prompt
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_steer.common.errors import SteeringError
from vllm_steer.decoding import chain, tree
from vllm_steer.decoding.adaptive import share
from vllm_steer.decoding.tree import Adaptive, Beam, Branching
from vllm_steer.decoding.verification import Node, Noise, gumbel, recursive
from vllm_steer.drafters.steered import checkpoint

NEW = 20
P_VALUE = 1e-4
SHAPES = [
    Branching((4, 1, 1)),
    Branching((3, 2, 1)),
    Branching((1, 1, 1, 1)),
    Beam(4, 3),
    Beam(4, 3, whole=True),
    Beam(1, 4),
    Adaptive(4, 3),
]
V = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Target, drafter, steering, of 32 tokens."""
    paths = make_pair(tmp_path_factory.mktemp("tree"), "llama", vocab_size=32, distance=0.2)
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
    return load(paths.target), load(paths.drafter), checkpoint.load(Path(paths.steered))


@torch.no_grad()
def alone(target: Any, prompt: list[int], choose: Any) -> list[int]:
    """What the target says by itself; `choose` takes logits [V] and a position."""
    tokens = list(prompt)
    for _ in range(NEW):
        tokens.append(choose(target(torch.tensor([tokens])).logits[0, -1].double(), len(tokens)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_output_is_the_targets(pair: Any, shape: tree.Tree, steered: bool) -> None:
    target, drafter, steering = pair
    accepted = []
    for seed in range(3):
        prompt = random_prompt(7, seed=seed, vocab_size=32)
        found = tree.generate(target, drafter, prompt, shape, steering if steered else None, max_new_tokens=NEW)
        assert found.tokens == alone(target, prompt, lambda logits, _: int(logits.argmax()))
        accepted += [block.accepted for block in found.blocks]
    assert len(set(accepted)) > 2, "every number of accepted drafts, or this proves little"


def test_a_tree_of_one_path_is_the_chain(pair: Any) -> None:
    target, drafter, steering = pair
    prompt = random_prompt(7, vocab_size=32)
    one = tree.generate(target, drafter, prompt, Branching((1, 1, 1)), steering, max_new_tokens=NEW)
    line = chain.generate(target, drafter, prompt, steering, k=3, max_new_tokens=NEW)
    assert one.tokens == line.tokens and [b.rows for b in one.blocks] == [(b.drafts,) for b in line.blocks]


def test_wider_trees_hold_what_narrower_ones_do(pair: Any) -> None:
    """Acceptance grows with the width, and a beam at least reaches the branching list of equal rows."""
    target, drafter, steering = pair
    prompts = [random_prompt(7, seed=seed, vocab_size=32) for seed in range(6)]

    def length(shape: tree.Tree) -> float:
        found = [tree.generate(target, drafter, p, shape, steering, max_new_tokens=NEW) for p in prompts]
        return chain.acceptance_length([block for each in found for block in each.blocks])

    assert length(Branching((1, 1, 1))) < length(Branching((4, 1, 1))) <= length(Beam(4, 3))


def test_a_beam_of_whole_paths_has_a_row_for_each(pair: Any) -> None:
    target, drafter, steering = pair
    prompt = random_prompt(7, vocab_size=32)
    blocks = {
        whole: tree.generate(target, drafter, prompt, Beam(4, 3, whole), steering, max_new_tokens=NEW).blocks
        for whole in (False, True)
    }
    assert all(len(block.rows) == 4 and set(map(len, block.rows)) == {3} for block in blocks[True])
    assert set(blocks[True][0].rows) < set(blocks[False][0].rows)


def test_an_adaptive_tree_has_its_rows_and_the_chain_first(pair: Any) -> None:
    target, drafter, steering = pair
    prompt = random_prompt(7, vocab_size=32)
    found = tree.generate(target, drafter, prompt, Adaptive(4, 3), steering, max_new_tokens=NEW)
    line = tree.generate(target, drafter, prompt, Branching((1, 1, 1)), steering, max_new_tokens=NEW)
    assert all(len(set(block.rows)) == 4 and set(map(len, block.rows)) == {3} for block in found.blocks)
    assert found.blocks[0].rows[0] == line.blocks[0].rows[0]
    depths = {tuple(len({row[:depth] for row in block.rows}) for depth in (1, 2)) for block in found.blocks}
    assert len(depths) > 1, "rows part at other depths in other rounds"


@pytest.mark.parametrize("sort", [True, False], ids=["by probability", "by noise"])
@pytest.mark.parametrize("last", [False, True])
def test_rows_are_shared_as_in_the_reference(sort: bool, last: bool) -> None:
    """For vLLM, of two nodes at once, against the loop that gives one row after the other."""
    generator = torch.Generator().manual_seed(0)
    for two in range(4, 6):
        weights = torch.log_softmax(torch.randn(2, 6, generator=generator) * 3, -1)
        weights = weights.sort(-1, descending=True).values if sort else weights
        first, rows = torch.tensor([[0] * two + [two] * (6 - two)]), torch.tensor([[two] * two + [6 - two] * (6 - two)])
        child, start, left = share(weights[[0] * two + [1] * (6 - two)][None], first, rows, last)
        expected = []
        for number, budget in enumerate((two, 6 - two)):
            root = Node(0, parent=Node(9), rows=budget)
            grown = [(Node(i, root, float(w)), 0) for i, w in enumerate(weights[number])]
            kept = Adaptive(6, 2 if last else 3).keep(grown)
            expected += [(node.token, node.rows) for node, _ in kept for _ in range(node.rows)]
        assert list(zip(child[0].tolist(), left[0].tolist(), strict=True)) == expected
        assert all(start[0, i] == i or start[0, i] == start[0, i - 1] for i in range(6))


@pytest.mark.parametrize("shape", [Branching((4, 1, 1)), Branching((3, 2, 1)), Adaptive(4, 3)], ids=str)
def test_coupled_output_is_the_targets_under_the_same_noise(pair: Any, shape: tree.Tree) -> None:
    target, drafter, steering = pair
    accepted = []
    for seed in range(4):
        prompt, noise = random_prompt(7, seed=seed, vocab_size=32), Noise(seed)
        found = tree.generate(
            target, drafter, prompt, shape, steering, temperature=0.8, verification="coupled", seed=seed,
            max_new_tokens=NEW,
        )  # fmt: skip
        assert found.tokens == alone(target, prompt, lambda x, at, n=noise: int((x / 0.8 + n.at(at, len(x))).argmax()))
        accepted += [block.accepted for block in found.blocks]
    assert len(set(accepted)) > 2


# --- the recursive verifier alone ------------------------------------------------------------------------------------


def outcomes(verify: Any, draw: Any, width: int, n: int = 6000) -> Tensor:
    """How often each token is said, [V], by `verify` on children that `draw` made."""
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.softmax(1.5 * torch.randn(V, generator=generator, dtype=torch.float64), -1) for _ in range(2))
    said = [verify(p, q, draw(q, width, generator), generator)[1] for _ in range(n)]
    return torch.stack([torch.bincount(torch.tensor(said), minlength=V).double(), n * p])


def without_replacement(q: Tensor, width: int, generator: torch.Generator) -> list[int]:
    return (q.log() + gumbel(V, generator)).topk(width).indices.tolist()


def most_probable(q: Tensor, width: int, generator: torch.Generator) -> list[int]:
    return q.topk(width).indices.tolist()


def never_renewed(p: Tensor, q: Tensor, children: list[int], generator: torch.Generator) -> tuple[int | None, int]:
    """Broken on purpose: the residual is taken once, at the end."""
    for i, child in enumerate(children):
        if float(torch.rand((), generator=generator, dtype=torch.float64)) * float(q[child]) < float(p[child]):
            return i, child
    return None, int(torch.multinomial((p - q).clamp(min=0), 1, generator=generator))


def p_value(counts: Tensor) -> float:
    return float(chisquare(*counts.tolist()).pvalue)


@pytest.mark.parametrize("width", [0, 1, 2, 4, V])
def test_recursive_rejection_keeps_the_targets_distribution(width: int) -> None:
    assert p_value(outcomes(recursive, without_replacement, width)) > P_VALUE


def independent(q: Tensor, width: int, generator: torch.Generator) -> list[int]:
    return torch.multinomial(q, width, replacement=True, generator=generator).tolist()


def test_independent_drafts_keep_it_too() -> None:
    verify = functools.partial(recursive, replacement=True)
    assert p_value(outcomes(verify, independent, 3)) > P_VALUE


def test_a_broken_verifier_shows() -> None:
    assert p_value(outcomes(never_renewed, without_replacement, 3)) < P_VALUE
    assert p_value(outcomes(recursive, most_probable, 3)) < P_VALUE, "children must be drawn, not chosen"


@pytest.mark.parametrize(
    ("shape", "verification"),
    [(Branching((3, 2, 1)), "recursive"), (Beam(4, 3), "recursive"), (Branching((3, 2, 1)), "independent")],
    ids=["branching", "beam", "independent"],
)
def test_sampled_output_has_the_targets_distribution(pair: Any, shape: tree.Tree, verification: str) -> None:
    target, drafter, steering = pair
    bins, numbers = 16, []
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        prompt = random_prompt(5, seed=seed, vocab_size=32)
        found = tree.generate(target, drafter, prompt, shape, steering, temperature=1.2, seed=seed, max_new_tokens=NEW)
        with torch.no_grad():
            rows = target(torch.tensor([prompt + found.tokens])).logits[0, len(prompt) - 1 : -1].double()
        probabilities = torch.softmax(rows / 1.2, -1)
        mass = probabilities.gather(-1, torch.tensor(found.tokens)[:, None])
        below = (probabilities * (probabilities > mass)).sum(-1, keepdim=True)
        numbers.append((below + mass * torch.rand(mass.shape, generator=generator, dtype=torch.float64))[:, 0])
    found = torch.bincount((torch.cat(numbers).clamp(0, 1 - 1e-12) * bins).long(), minlength=bins)
    assert chisquare(found.tolist()).pvalue > P_VALUE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Branching(()), r"the tree is \[\], allowed is a list of whole numbers from 1 up"),
        (lambda: Branching((2, 0)), r"the tree is \[2, 0\]"),
        (lambda: Beam(0, 3), "the beam is 0 wide and 3 deep"),
        (lambda: Adaptive(3, 0), "the tree has 3 rows and is 0 deep"),
        (lambda: tree.generate(None, None, [1], Adaptive(2, 2), temperature=1.0), "give verification 'coupled'"),
        (lambda: tree.generate(None, None, [], Beam(2, 2)), "the prompt is empty"),
        (
            lambda: tree.generate(None, None, [1], Beam(2, 2), verification="lucky"),
            "verification is 'lucky', allowed are",
        ),
        (
            lambda: tree.generate(None, None, [1], Beam(2, 2), temperature=1.0, verification="coupled"),
            "a beam ranks paths by their probability",
        ),
        (
            lambda: tree.generate(None, None, [1], Beam(2, 2, whole=True), temperature=1.0),
            "temperature is 1.0 and the beam has whole paths only",
        ),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(SteeringError, match=message):
        make()
