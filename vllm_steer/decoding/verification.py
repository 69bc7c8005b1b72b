"""Which drafted children of a node the target accepts, in plain torch: greedy, recursive rejection, coupled draws.

A node has drafted children, in the order in which they were drawn. A verifier looks at the target's logits after the
node and returns an accepted child, or the token that the target says instead. Every token is then distributed as the
target's own: exactly its choice (greedy, coupled), or drawn from its distribution (recursive).

Shape legend: V vocabulary, W children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_steer.common.lenience import Lenience


def gumbel(size: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise [size], float64: argmax(log p + noise) is a draw from p."""
    return -torch.log(-torch.log(torch.rand(size, generator=generator, dtype=torch.float64)))


def recursive(
    p: Tensor,
    q: Tensor,
    children: Sequence[int],
    generator: torch.Generator,
    replacement: bool = False,
    lenience: Lenience | None = None,
) -> tuple[int | None, int]:
    """Recursive rejection sampling (RSD, arXiv 2402.14160, algorithm 1) of children drawn without replacement.

    The first child is accepted with probability min(1, p / q). After a rejection the target's distribution is the
    residual max(p - q, 0) and the drafter's is q without that child, each made a distribution again; so the next child
    is a draw from the renewed q, as a draw without replacement is. With replacement (independent drafts, as in SpecTr,
    arXiv 2310.15141) q stays.

    Args:
        p, q: [V] float64 distributions of target and drafter after the node.
        children: W tokens, drawn from q without replacement, in that order; none for a leaf.
        generator: the source of every random number here.
        lenience: of one child: it is accepted with min(1, f(p) / q), and what is said is not the target's any more.

    Returns (the accepted child's index, its token), or (None, a token from what is left of p).
    """
    assert lenience is None or len(children) <= 1
    q = q.clone()
    for i, child in enumerate(children):
        f = p[child] if lenience is None else p[child] * lenience.log_gain(p[child].log()).exp()
        if float(torch.rand((), generator=generator, dtype=torch.float64)) * float(q[child]) < float(f):
            return i, child
        p = (p - q).clamp_(min=0)
        p /= p.sum()
        if not replacement:
            q[child] = 0
            q /= q.sum()
    return None, int(torch.multinomial(p, 1, generator=generator))


@dataclass(frozen=True)
class Noise:
    """Gumbel noise that depends on a seed and a position only, as that of vLLM's V2 sampler does.

    A target that says argmax(log p + noise) at every position samples from p. Drafts that take the same noise often
    coincide with what it says (arXiv 2408.07978, 2506.05632), and verification is equality.
    """

    seed: int

    def at(self, position: int, size: int) -> Tensor:
        """The noise [size] float64 of the token at `position`."""
        return gumbel(size, torch.Generator().manual_seed(self.seed * 1_000_003 + position))


@dataclass
class Node:
    """A drafted token; the root is the newest token, which is not drafted."""

    token: int
    parent: Node | None = None
    log_prob: float = 0.0  # of the path from the root, under the drafter
    score: float = 0.0  # what beams are ranked by: the log-probability, or the perturbed one
    children: list[Node] = field(default_factory=list)  # in the order in which they were drawn
    q: Tensor | None = None  # [V] float64: the drafter's distribution after this token, where it has children
    row: int = 0  # a row of the target's pass that holds this node
    rows: int = 0  # how many rows pass through it, in an adaptive tree

    @property
    def depth(self) -> int:
        """0 for the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    @property
    def path(self) -> list[int]:
        """The drafted tokens from the root's child to this one."""
        return [] if self.parent is None else [*self.parent.path, self.token]


class Greedy:
    """Temperature 0: the most probable tokens are drafted, and the target's argmax is accepted."""

    def draft(self, node: Node, logits: Tensor, width: int, position: int) -> list[Node]:
        """`width` children of `node` for the token at `position`, from the drafter's logits [V]."""
        log_q = torch.log_softmax(logits.double(), -1)
        best = log_q.topk(min(width, len(log_q)))
        pairs = zip(best.indices.tolist(), (node.log_prob + best.values).tolist(), strict=True)
        return [Node(token, node, log_prob, log_prob) for token, log_prob in pairs]

    def verify(self, node: Node, logits: Tensor, position: int) -> tuple[Node | None, int]:
        """The accepted child of `node`, or None, and the target's token at `position`, from its logits [V]."""
        return _child(node, int(logits.argmax()))


class Coupled:
    """Temperature T: drafts and target take the same noise, so the output is the target's own under that noise."""

    def __init__(self, temperature: float, noise: Noise):
        self.temperature, self.noise = temperature, noise

    def draft(self, node: Node, logits: Tensor, width: int, position: int) -> list[Node]:
        """As Greedy.draft, of the perturbed logits."""
        log_q = torch.log_softmax(logits.double() / self.temperature, -1)
        best = (log_q + self.noise.at(position, len(log_q))).topk(min(width, len(log_q)))
        return [Node(token, node, node.log_prob + float(log_q[token]), float(score))
                for token, score in zip(best.indices.tolist(), best.values, strict=True)]  # fmt: skip

    def verify(self, node: Node, logits: Tensor, position: int) -> tuple[Node | None, int]:
        """As Greedy.verify, of the perturbed logits."""
        perturbed = logits.double() / self.temperature + self.noise.at(position, len(logits))
        return _child(node, int(perturbed.argmax()))


class Independent:
    """Temperature T: children drawn independently, so that one token may be drafted twice. A baseline for Recursive."""

    def __init__(self, temperature: float, generator: torch.Generator):
        self.temperature, self.generator = temperature, generator

    def draft(self, node: Node, logits: Tensor, width: int, position: int) -> list[Node]:
        """As Greedy.draft; notes the distribution that the children are drawn from."""
        node.q = torch.softmax(logits.double() / self.temperature, -1)
        tokens = torch.multinomial(node.q, width, replacement=True, generator=self.generator).tolist()
        return [Node(token, node, node.log_prob + float(node.q[token].log())) for token in tokens]

    def verify(self, node: Node, logits: Tensor, position: int) -> tuple[Node | None, int]:
        """As Greedy.verify, by `recursive` with replacement."""
        return _rejected(node, logits, self.temperature, self.generator, replacement=True)


class Recursive:
    """Temperature T: children drawn without replacement, accepted by recursive rejection sampling.

    A node's children are the largest of its Gumbel-perturbed log-probabilities (Gumbel-top-k), conditioned on the
    node's own perturbed value as their maximum (stochastic beam search, arXiv 1903.06059). Within one node that is
    sampling without replacement, in decreasing order; between nodes the scores rank beams.
    """

    def __init__(self, temperature: float, generator: torch.Generator):
        self.temperature, self.generator = temperature, generator

    def draft(self, node: Node, logits: Tensor, width: int, position: int) -> list[Node]:
        """As Greedy.draft; notes the distribution that the children are drawn from."""
        log_q = torch.log_softmax(logits.double() / self.temperature, -1)
        node.q = log_q.exp()
        log_probs = node.log_prob + log_q
        scores = _below(log_probs + gumbel(len(log_q), self.generator), node.score)
        best = scores.topk(min(width, int((node.q > 0).sum())))
        return [Node(token, node, float(log_probs[token]), float(score))
                for token, score in zip(best.indices.tolist(), best.values, strict=True)]  # fmt: skip

    def verify(self, node: Node, logits: Tensor, position: int) -> tuple[Node | None, int]:
        """As Greedy.verify, by `recursive`."""
        return _rejected(node, logits, self.temperature, self.generator, replacement=False)


def _below(perturbed: Tensor, maximum: float) -> Tensor:
    """Gumbel variables [V] conditioned on `maximum` as their largest (arXiv 1903.06059, appendix B.3)."""
    largest = perturbed.max()
    v = maximum - perturbed + torch.log1p(-torch.exp(perturbed - largest))
    found = maximum - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return torch.where(perturbed == largest, maximum, found)


def _rejected(
    node: Node, logits: Tensor, temperature: float, generator: torch.Generator, replacement: bool
) -> tuple[Node | None, int]:
    p = torch.softmax(logits.double() / temperature, -1)
    q = torch.zeros_like(p) if node.q is None else node.q  # a leaf
    accepted, token = recursive(p, q, [child.token for child in node.children], generator, replacement)
    return (None if accepted is None else node.children[accepted]), token


def _child(node: Node, token: int) -> tuple[Node | None, int]:
    return next((child for child in node.children if child.token == token), None), token
