"""How the rows of an adaptive draft tree are shared among its nodes: they part where the drafter is unsure.

A tree of L rows begins with all of them at the root. A node shares its rows among its children, in the order of
p / (c + 1)^2: p is a child's probability, c the rows it already has. So the second row goes to the second child only if
that is at least a quarter as probable as the first; else both stay together, and may part further down. At the last
depth each row is a child of its own. (As EAGLE-2's dynamic trees, arXiv 2406.16858, this follows the drafter's
confidence; here the number of rows is fixed, since that is what the target pays for.) Plain tensor code of fixed
shapes, for vLLM.

Shape legend: B requests, L rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-4  # children of equal weight: the earlier one first


def share(weights: Tensor, first: Tensor, rows: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The child that each row goes on with, and the nodes of the next depth.

    Args:
        weights: [B, L, L] log-probabilities of the L best children of each row's node, best first.
        first: [B, L] the first row of each row's node, whose rows lie side by side.
        rows: [B, L] how many rows it has.
        last: this is the last depth.

    Returns the place of each row's child among the L, and `first` and `rows` of the next depth, each [B, L].
    """
    count = weights.shape[-1]
    number = torch.arange(count, device=weights.device)
    place = number - first  # of a row in its node
    if last:
        return place, number.expand_as(first), torch.ones_like(rows)
    # A child that comes first is never worth less: under a request's own noise the order is not that of probabilities.
    weights = weights.float().flip(-1).cummax(-1).values.flip(-1) - TIE * number
    values = weights[..., None] - 2 * torch.log(number + 1.0)
    child = values.flatten(-2).topk(count).indices // count  # of every row that a node might give, in order
    given = (number < rows[..., None]).long()
    own = torch.zeros_like(child).scatter_add_(-1, child, given)
    end = own.cumsum(-1)
    chosen = (end <= place[..., None]).sum(-1)
    at = chosen[..., None]
    here = own.gather(-1, at)[..., 0]
    return chosen, first + end.gather(-1, at)[..., 0] - here, here
