"""The reference loop with trees in place of chains, on Hugging Face models: recursive speculative decoding (RSD).

As chain.py, with its positions and its window rule; only what is drafted and verified differs (arXiv 2402.14160):

    draft     the first pass of the drafter is that of a chain. Then one pass for each depth, with a row for each node
              of the frontier, all under the one guide of the round.
    verify    one pass of the target, with a row for each leaf: the newest token and the path to the leaf. From the root
              on, a verifier (verification.py) accepts a child, or ends the block with a token of the target's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.decoding.adaptive import TIE
from vllm_steer.decoding.chain import (
    Block,
    Generation,
    _Cached,
    _cut,
    _fit,
    _Guide,
    _guiding,
    _require,
    _require_request,
)
from vllm_steer.decoding.verification import Coupled, Greedy, Independent, Node, Noise, Recursive
from vllm_steer.drafters.steered.module import Steering

VERIFICATIONS = ("recursive", "coupled", "independent")


class Branching(TreeShape):
    """A number of children for every depth, drafted and verified."""

    def children(self, depth: int) -> int:
        """How many children a node at `depth` has."""
        return self.widths[depth]

    def keep(self, grown: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """Of all children of one depth, each with its parent's row, those that stay."""
        return grown


@dataclass(frozen=True)
class Beam:
    """The `width` best paths at every depth (RSD-S).

    At temperature 0 these are the most probable ones.
    """

    width: int
    depth: int
    whole: bool = False  # temperature 0 only: verify the paths that stay to the end, so `width` rows and no more

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 1:
            raise SteeringError(f"the beam is {self.width} wide and {self.depth} deep, allowed are numbers from 1 up")

    def children(self, depth: int) -> int:
        """No node has more children than there are paths."""
        return self.width

    def keep(self, grown: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """As Branching.keep; the order among the children of one node stays."""
        best = sorted(grown, key=lambda pair: -pair[0].score)[: self.width]
        kept = {id(node) for node, _ in best}
        return [pair for pair in grown if id(pair[0]) in kept]


@dataclass(frozen=True)
class Adaptive:
    """`rows` paths that part where the drafter is unsure; adaptive.py says how, for vLLM."""

    rows: int
    depth: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.depth < 1:
            raise SteeringError(
                f"the tree has {self.rows} rows and is {self.depth} deep, allowed are numbers from 1 up"
            )

    def children(self, depth: int) -> int:
        """No node has more children than there are rows."""
        return self.rows

    def keep(self, grown: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """As Branching.keep: each parent gives its rows, one by one, to the child that is worth most."""
        kept = []
        for parent in {id(child.parent): child.parent for child, _ in grown}.values():
            assert parent is not None
            own = [pair for pair in grown if pair[0].parent is parent]
            rows = parent.rows if parent.parent is not None else self.rows
            log_probs = [child.log_prob - parent.log_prob for child, _ in own]
            worth = [max(log_probs[i:]) - TIE * i for i in range(len(own))]
            last = own[0][0].depth == self.depth  # there each row is another child
            for n in range(rows):
                best = n if last else max(range(len(own)), key=lambda i: worth[i] - 2 * math.log(own[i][0].rows + 1))
                own[best][0].rows += 1
            kept += [pair for pair in own if pair[0].rows]
        return kept


Tree = Branching | Beam | Adaptive
Verifier = Greedy | Coupled | Independent | Recursive


@dataclass(frozen=True)
class TreeBlock(Block):
    """One round of a tree; `drafts` are those of the accepted path."""

    rows: tuple[tuple[int, ...], ...] = ()  # the drafts of every leaf's path

    @property
    def row_tokens(self) -> int:
        """Tokens that the target reads when the tree is served as rows: each path, and the newest token before it."""
        return sum(len(row) + 1 for row in self.rows)


@torch.no_grad()
def generate(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompt: Sequence[int],
    tree: Tree,
    steering: Steering | None = None,
    *,
    max_new_tokens: int = 64,
    eos_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    verification: str = "recursive",
    seed: int = 0,
    scale: float = 1.0,
) -> Generation:
    """Speculate with trees for one prompt; arguments that chain.generate has too mean the same.

    Args:
        tree: what is drafted.
        verification: at temperature T > 0, "recursive" rejection sampling, "coupled" draws (the output is then the
            target's own under `Noise(seed)`), or "independent" drafts, a baseline.
    Raises:
        SteeringError: an argument out of its range, or a drafter that cannot be steered.
    """
    _require_request(prompt, max_new_tokens, temperature)
    allowed = ", ".join(VERIFICATIONS)
    _require(verification in VERIFICATIONS, f"verification is {verification!r}, allowed are {allowed}")
    _require(
        temperature == 0 or verification == "coupled" or not isinstance(tree, Adaptive),
        f"which drafts of an adaptive tree stay depends on them, which is not exact with {verification} drafts: give "
        "verification 'coupled'",
    )
    _require(
        temperature == 0 or verification == "recursive" or not isinstance(tree, Beam),
        f"a beam ranks paths by their probability, which {verification} drafts do not follow: give a branching list, "
        "or verification 'recursive'",
    )
    _require(
        temperature == 0 or not (isinstance(tree, Beam) and tree.whole),
        f"temperature is {temperature} and the beam has whole paths only: sampled drafts are exact only if all that "
        "were drawn are verified; give temperature 0, or a beam without `whole`",
    )
    with _guiding(drafter, steering, scale) as guide:
        verifier = _verifier(temperature, verification, seed)
        eos = frozenset(eos_token_ids)
        return _loop(_Cached(target), _Cached(drafter), prompt, tree, guide, verifier, max_new_tokens, eos)


def _verifier(temperature: float, verification: str, seed: int) -> Verifier:
    if temperature == 0:
        return Greedy()
    if verification == "coupled":
        return Coupled(temperature, Noise(seed))
    made = Recursive if verification == "recursive" else Independent
    return made(temperature, torch.Generator().manual_seed(seed))


def _loop(
    target: _Cached, drafter: _Cached, prompt: Sequence[int], tree: Tree, guide: _Guide, verifier: Verifier,
    max_new_tokens: int, eos: frozenset[int],
) -> Generation:  # fmt: skip
    tokens = list(prompt)
    logits, states = target.feed(tokens, 0, states=guide.layer_ids)
    drafter.feed(tokens, 0)  # prompt rows are never steered
    source = states[0] if states is not None else None
    window = newest = len(prompt)
    tokens.append(verifier.verify(Node(0), logits[0].cpu(), newest)[1])  # a leaf: the target's own choice
    blocks: list[Block] = []
    while len(tokens) - len(prompt) < max_new_tokens and tokens[-1] not in eos:
        with guide.using(source):
            root = _grow(drafter, tokens, window, tree, logits.shape[-1], verifier)
        paths = _number_rows(root)
        longest = max(map(len, paths))
        target.select([0] * len(paths))
        rows = [[tokens[newest], *path, *[0] * (longest - len(path))] for path in paths]
        logits, states = target.feed_rows(rows, newest, states=guide.layer_ids)
        node, token = _descend(root, logits.cpu(), newest, verifier)
        source = states[node.row, node.depth] if states is not None else None
        target.select([node.row])
        target.crop(newest + 1 + node.depth)
        new, stop = _cut([*node.path, token], max_new_tokens - (len(tokens) - len(prompt)), eos)
        blocks.append(TreeBlock(newest, tuple(node.path), node.depth, len(new), stop, tuple(map(tuple, paths))))
        tokens += new
        window, newest = newest, newest + node.depth + 1
    return Generation(tokens[len(prompt) :], blocks)


def _grow(drafter: _Cached, tokens: list[int], window: int, tree: Tree, vocab: int, verifier: Verifier) -> Node:
    """The root of a tree after `tokens`, whose positions from `window` on are fed (again) under the guide in force."""
    frontier = [root := Node(tokens[-1])]
    logits, _ = drafter.feed_rows([tokens[window:]], window)
    for depth in range(tree.depth):
        position = len(tokens) + depth  # of the tokens that are drafted now
        grown = [
            (child, row)
            for row, node in enumerate(frontier)
            for child in verifier.draft(node, _fit(logits[row, -1].cpu(), vocab), tree.children(depth), position)
        ]
        grown = tree.keep(grown)
        for child, _ in grown:
            assert child.parent is not None
            child.parent.children.append(child)
        frontier = [child for child, _ in grown]
        if depth + 1 < tree.depth:
            drafter.select([row for _, row in grown])
            logits, _ = drafter.feed_rows([[child.token] for child in frontier], position)
    if isinstance(tree, Beam) and tree.whole:
        _drop_short_paths(root, tree.depth)
    drafter.select([0])  # the next round feeds everything from this round's newest token on
    drafter.crop(len(tokens) - 1)
    return root


def _drop_short_paths(node: Node, depth: int) -> bool:
    """Drop the paths below `node` that end before `depth`; whether one is left."""
    node.children = [child for child in node.children if _drop_short_paths(child, depth)]
    return bool(node.children) or node.depth == depth


def _number_rows(root: Node) -> list[list[int]]:
    """The path to every leaf, and in every node a row that it lies on."""
    paths: list[list[int]] = []

    def visit(node: Node) -> None:
        node.row = len(paths)
        for child in node.children:
            visit(child)
        if not node.children:
            paths.append(node.path)

    visit(root)
    return paths


def _descend(root: Node, logits: Tensor, newest: int, verifier: Verifier) -> tuple[Node, int]:
    """The last accepted node (the root: none was) and the target's token after it; logits [rows, T, V]."""
    node = root
    while True:
        child, token = verifier.verify(node, logits[node.row, node.depth], newest + node.depth + 1)
        if child is None:
            return node, token
        node = child
