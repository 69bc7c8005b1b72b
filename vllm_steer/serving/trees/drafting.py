"""The draft passes of a tree, with a row for every leaf: what both model runners share.

All L rows of a request run in every pass, from copies of its partial page. Rows that have not parted yet compute the
same thing; that costs row tokens, and saves copying pages between passes.

Shape legend: B requests, L leaves, V vocabulary, M pages of a request, k depth, w children of a node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.decoding.adaptive import share
from vllm_steer.decoding.block_tree import Rank as BlockRank
from vllm_steer.decoding.block_tree import probable
from vllm_steer.serving.trees.layout import page_tables, slots

Rank = Callable[[Tensor, int, int, Tensor], Tensor]
"""(logits [B r, V], w, r, positions [B r]) -> the w best tokens [B r, w] after the token at each position, best first;
r rows of each request."""


class Growth:
    """The rows of one draft round. `tokens` [B L] are the newest ones, to be fed next at `advance`."""

    def __init__(self, shape: TreeShape, table: Tensor, newest: Tensor, block_size: int, limit: int, rank: Rank):
        """Args:
        table: [B, M] the requests' pages.
        newest: [B] position of each request's newest token, whose page is up to date.
        limit: the longest context.
        """
        self.shape, self._rank, self._block_size, self._limit = shape, rank, block_size, limit
        rows, count = shape.leaves, shape.pages(block_size)
        self._newest = newest
        self._base = newest.repeat_interleave(rows)
        first = self._base // block_size
        branch = torch.arange(rows, device=newest.device).repeat(len(newest))
        self._valid = (branch == 0) | ((first + rows * count) * block_size <= limit)
        each = table.repeat_interleave(rows, 0)
        self.table = page_tables(each, first, branch, count)
        index = first[:, None].clamp(max=table.shape[1] - 1)
        source = each.gather(1, index)[:, 0]
        self.forks = source, torch.where(self._valid, self.table.gather(1, index)[:, 0], source)
        self._paths: list[Tensor] = []

    def grow(self, logits: Tensor) -> None:
        """Add a token to every row: the children of the nodes at the present depth, which have logits [B nodes, V]."""
        depth = len(self._paths)
        width, below, requests = self.shape.widths[depth], self.shape.below(depth + 1), len(self._newest)
        nodes = len(logits) // requests
        position = (self._newest + depth).repeat_interleave(nodes)
        best = self._rank(logits, width, nodes, position)
        self._paths.append(best.repeat_interleave(below, 1).view(requests, nodes * width * below))

    def parting(self) -> Tensor:
        """[nodes] a row of the first request for every node at the present depth; of the others, L further on."""
        return torch.arange(0, self.shape.leaves, self.shape.below(len(self._paths)), device=self._newest.device)

    def nodes(self, hidden: Tensor) -> Tensor:
        """Of hidden states [B L, H] of all rows, one for each node at the present depth, [B nodes, H]."""
        return hidden.view(len(self._newest), self.shape.leaves, -1)[:, self.parting()].flatten(0, 1)

    @property
    def tokens(self) -> Tensor:
        """[B L], the newest of every row."""
        return self._paths[-1].flatten()

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the newest tokens of all rows: positions, slots and lengths up to them, each [B L]."""
        position = self._base + len(self._paths)
        slot = slots(self.table, position, self._valid, self._block_size, self._limit)
        length = (position + 1).clamp(max=self._limit).int()
        return position.clamp(max=self._limit - 1), slot, length

    @property
    def paths(self) -> Tensor:
        """[B, L, k], once k tokens have been added."""
        return torch.stack(self._paths, 2)


class AdaptiveGrowth(Growth):
    """A draft round whose rows part where the drafter is unsure. After the first pass each row has its own logits."""

    def __init__(self, *args: Any, weigh: BlockRank):
        """The other arguments are Growth's."""
        super().__init__(*args)
        self._weigh = weigh
        self._first = self._newest.new_zeros(len(self._newest), self.shape.leaves)
        self._rows = torch.full_like(self._first, self.shape.leaves)

    def grow(self, logits: Tensor) -> None:
        """Add a token to every row, from logits [B, V] at first, then [B L, V]."""
        rows, requests = self.shape.leaves, len(self._newest)
        found = self._weigh(logits, len(self._paths), rows)
        tokens, weights = (each.view(requests, -1, rows).expand(requests, rows, rows) for each in found)
        last = len(self._paths) + 1 == self.shape.depth
        child, self._first, self._rows = share(weights, self._first, self._rows, last)
        self._paths.append(tokens.gather(2, child[..., None])[..., 0])

    def nodes(self, hidden: Tensor) -> Tensor:
        """All of them: where rows part is not known to the host."""
        return hidden


def growing(
    shape: TreeShape, table: Tensor, newest: Tensor, block_size: int, limit: int, rank: Rank, heat: Tensor | None
) -> Growth:
    """The draft round of a tree; `heat` [B], for an adaptive one, are the temperatures, None if all are greedy."""
    given = (shape, table, newest, block_size, limit, rank)
    return AdaptiveGrowth(*given, weigh=weighed(rank, newest, heat)) if shape.adaptive else Growth(*given)


def greedy(logits: Tensor, width: int, rows: int, positions: Tensor) -> Tensor:
    """A `Rank`: the most probable tokens."""
    return logits.topk(width).indices if width > 1 else logits.argmax(-1, keepdim=True)


def weighed(rank: Rank, newest: Tensor, temperature: Tensor | None) -> BlockRank:
    """A `Rank` of block drafters from one of draft models, for requests whose newest tokens are at positions [B].

    Its tokens are weighed by their log-probabilities at the request's temperature [B]; None: all are greedy.
    """
    if rank is greedy:
        return probable

    heat = torch.ones_like(newest) if temperature is None else torch.where(temperature > 0, temperature, 1)

    def ranked(logits: Tensor, step: int, width: int) -> tuple[Tensor, Tensor]:
        rows = len(logits) // len(newest)
        tokens = rank(logits, width, rows, (newest + step).repeat_interleave(rows))
        log_probs = torch.log_softmax(logits.float() / heat.repeat_interleave(rows)[:, None], -1)
        return tokens, log_probs.gather(1, tokens)

    return ranked
