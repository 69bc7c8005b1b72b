"""Draft trees of a block drafter, as rows: the L paths from the newest token that are worth the target's looking at.

As in TreeFlash (arXiv 2606.03819) the block's states are there after one pass, and a node costs the read-out of its
step alone, given the token before it. Plain tensor code of fixed shapes, for the oracle and for vLLM.

Shape legend: B requests, L rows, k depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Logits = Callable[[int, Tensor], Tensor]
"""(step, tokens before [B r]) -> logits [B r, V] of draft `step`, r rows of each request side by side."""


Rank = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
"""(logits [B r, V], step, width) -> the best tokens [B r, width], best first, and log-probabilities that weigh them."""


def probable(logits: Tensor, step: int, width: int) -> tuple[Tensor, Tensor]:
    """A `Rank`: the most probable tokens."""
    best = torch.log_softmax(logits.float(), -1).topk(width, -1)
    return best.indices, best.values


def branches(logits: Logits, newest: Tensor, k: int, rows: int, rank: Rank = probable) -> Tensor:
    """The chain of the best tokens, and the `rows` - 1 likeliest departures from it, continued alike: [B, L, k].

    A departure is another token than the chain's at one depth, as likely as the chain up to there and that token
    together. So rows part where the drafter is unsure. (Beams of L paths do not: on the tiny pair, greedy, four rows of
    five by departures gave 2.40 tokens per block where the four most probable paths gave 1.96 and the chain 1.93.)
    """
    requests, others, previous = len(newest), rows - 1, newest.long()
    reached = newest.new_zeros(requests, dtype=torch.float32)
    chain, alternatives, weights = [], [], []
    for step in range(k):
        tokens, weight = rank(logits(step, previous), step, rows)
        alternatives.append(tokens[:, 1:])
        weights.append(reached[:, None] + weight[:, 1:])
        previous, reached = tokens[:, 0], reached + weight[:, 0]
        chain.append(previous)
    main = torch.stack(chain, 1)
    if rows == 1:
        return main[:, None]
    chosen = torch.stack(weights, 1).flatten(1).topk(others, -1).indices  # [B, L - 1], places in [k, L - 1]
    depart, other = chosen // others, torch.stack(alternatives, 1).flatten(1).gather(1, chosen)
    found = [torch.where(depart == 0, other, main[:, :1])]
    for step in range(1, k):
        own = rank(logits(step, found[-1].flatten()), step, 1)[0].view(requests, others)
        found.append(torch.where(depart == step, other, torch.where(depart > step, main[:, step, None], own)))
    return torch.cat([main[:, None], torch.stack(found, 2)], 1)
