"""One target pass over draft trees: which of its tokens belong to which row, and where each row keeps its KV cache.

To vLLM a request has N = L (k + 1) - 1 draft tokens, laid out

    root c1 .. ck | root d1 .. dk | ...

where each `|` begins a *row*. With block size bs, root position n and P = n // bs, row b shares the request's pages
before P and has P + bT ... P + bT + T - 1 to itself, T pages that vLLM gives every request as lookahead; row 0's are
the request's ordinary ones. A row may win only if it is whole, its root is the real root (stale drafts have others) and
its pages lie within the context.

What depends on the accepted tokens stays on the device; shapes come from the host, and nothing waits.

Shape legend: B requests, L rows of a tree, R rows in all, T pages of a row, M pages of a request, k depth.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving.telemetry.block_counter import Blocks


def to_device(device: torch.device, **arrays: np.ndarray) -> SimpleNamespace:
    """The arrays as int64 tensors on the device, in one copy from memory that nobody writes to afterwards."""
    host = torch.empty(sum(map(len, arrays.values())), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(list(arrays.values()), out=host.numpy(), casting="unsafe")
    parts = host.to(device, non_blocking=True).split([len(array) for array in arrays.values()])
    return SimpleNamespace(**dict(zip(arrays, parts, strict=True)))


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of several groups begins, laid end to end, and where the last one ends: [groups + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def spread(counts: np.ndarray, first: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
    """For each member of several groups: the number of its group, and `first` of that plus its place in the group."""
    of = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(of)) - starts(counts)[of]
    return of, place + (first[of] if isinstance(first, np.ndarray) else first)


def page_tables(table: Tensor, first: Tensor, branch: Tensor, pages: int) -> Tensor:
    """The pages [R, M] of rows, from those of their requests, table [R, M].

    `first` [R] is the page of each row's root and `branch` [R] its number in the tree; `pages` is T.
    """
    index = torch.arange(table.shape[1], device=table.device)
    own = index + (branch * pages)[:, None]
    return table.gather(1, torch.where(index < first[:, None], index, own).clamp(max=table.shape[1] - 1))


def slots(table: Tensor, position: Tensor, valid: Tensor, block_size: int, limit: int) -> Tensor:
    """The slot [R] in the KV cache of the token at `position` [R] of each row; -1, nowhere, for rows not `valid` and
    positions from `limit` on."""
    page = (position // block_size).clamp(max=table.shape[1] - 1)[:, None]
    found = table.gather(1, page)[:, 0].long() * block_size + position % block_size
    return torch.where(valid & (position < limit), found, -1)


class Rows:
    """The rows of one target pass.

    After `choose` the winner of each request stands for it, as if vLLM had verified a chain of k: these chains, and all
    tokens of the other requests, are what is *shown* to the rest of vLLM.
    """

    def __init__(
        self, shape: TreeShape, lengths: np.ndarray, drafts: np.ndarray, alone: np.ndarray, device: torch.device
    ):
        """Args:
        lengths: [B] tokens of each request in the pass.
        drafts: [B] how many of them, at the end, are drafts.
        alone: [B] bool, requests of which only the first row may win: their logits depend on the drafts before.
        """
        self.shape, self._k1 = shape, shape.depth + 1
        self.tree = (drafts > shape.depth) & (lengths == drafts + 1)
        self.cut = np.where(self.tree, drafts - shape.depth, 0)  # drafts of each request that are not shown
        self.shown_length, self.shown_drafts = lengths - self.cut, drafts - self.cut
        self.shown_begin, self.kept_begin = starts(self.shown_length), starts(self.shown_drafts + 1)
        begin, logits = starts(lengths), starts(drafts + 1)
        self.request, branch = spread(np.where(self.tree, -(-lengths // self._k1), 1))
        whole = np.where(self.tree, self._k1, lengths)[self.request]
        self.length = np.minimum(whole, lengths[self.request] - branch * self._k1)
        self.begin = starts(self.length)
        row_of_token, offset = spread(self.length)
        shown_of, shown = spread(self.shown_length, begin[:-1])
        kept_of, kept = spread(self.shown_drafts + 1, logits[:-1])
        self.on = to_device(
            device,
            **{"request": self.request, "branch": branch, "begin": self.begin, "length": self.length},
            eligible=(branch == 0) | ((self.length == self._k1) & ~alone[self.request]),
            **{"first": begin[:-1], "row_of_token": row_of_token, "offset": offset, "cut": self.cut},
            **{"shown_of": shown_of, "shown": shown, "shown_begin": self.shown_begin},
            **{"kept_of": kept_of, "kept": kept, "kept_begin": self.kept_begin},
            **{"first_logit": logits[:-1], "logits_end": logits[1:]},
            kept_drafts=np.delete(np.arange(len(kept)), self.kept_begin[1:] - 1),
            request_of_logit=spread(drafts + 1)[0],
            is_tree=self.tree & ~alone,
        )
        self.winner: Tensor | None = None  # [B], which row of each request won
        self.pages: Tensor | None = None  # [R, M]

    @property
    def requests(self) -> int:
        """B."""
        return len(self.tree)

    def place(self, ids: Tensor, positions: Tensor, block_size: int, limit: int) -> None:
        """Give every token its position in its row, in place; ids and positions [tokens] are those of the pass."""
        on, n = self.on, len(self.on.offset)
        self._limit, self._block_size = limit, block_size
        self.root = positions[on.first]  # [B], position of each request's first token
        root = self.root[on.request]
        real = ids[on.begin[:-1]] == ids[on.first][on.request]
        end = (root // block_size + self.shape.leaves * self.shape.pages(block_size)) * block_size
        self._valid = (on.branch == 0) | (on.eligible.bool() & real & (end <= limit))
        positions[:n] = root[on.row_of_token] + on.offset
        self._positions = positions[:n]
        self.seq_lens = (root + on.length).clamp(max=limit).int()

    def find_pages(self, table: Tensor, slot_mapping: Tensor) -> None:
        """Give every row its pages and every token its slot, in place; table [B, M] are the requests' own pages."""
        on, self.table = self.on, table
        first = (self.root // self._block_size)[on.request]
        self.pages = page_tables(table[on.request], first, on.branch, self.shape.pages(self._block_size))
        row = on.row_of_token
        found = slots(self.pages[row], self._positions, self._valid[row], self._block_size, self._limit)
        slot_mapping[: len(row)] = found

    def forks(self) -> tuple[Tensor, Tensor]:
        """Pages (from, to), each [R]: every row's first own page begins as the page of the root."""
        assert self.pages is not None
        of = self.on.request
        first = (self.root // self._block_size)[of][:, None].clamp(max=self.table.shape[1] - 1)
        source = self.table[of].gather(1, first)[:, 0]
        return source, torch.where(self._valid, self.pages.gather(1, first)[:, 0], source)

    def commits(self) -> tuple[Tensor, Tensor]:
        """Pages (from, to), each [B T]: the winner's own become the request's."""
        assert self.winner is not None
        count = self.shape.pages(self._block_size)
        index = (self.root // self._block_size)[:, None] + torch.arange(count, device=self.root.device)
        top = self.table.shape[1] - 1
        source = self.table.gather(1, (index + (self.winner * count)[:, None]).clamp(max=top))
        return source.flatten(), self.table.gather(1, index.clamp(max=top)).flatten()

    def following(self, ids: Tensor, placeholders: Tensor, invalid: Tensor | None) -> Tensor:
        """The draft after each token that has logits, [logits]; -1 where there is none that may be accepted.

        Args:
            ids: [logits] these tokens.
            placeholders: [B] bool, requests whose step begins inside the prefill: nobody made their drafts.
            invalid: [logits] bool, tokens that are drafts no grammar has looked at; None: there is none.
        """
        none = placeholders[self.on.request_of_logit].index_fill(0, self.on.first_logit, True)
        drafts = torch.where(none if invalid is None else none | invalid, -1, ids)
        return torch.cat([drafts[1:], drafts.new_full((1,), -1)])

    def choose(self, own: Tensor, following: Tensor) -> Tensor:
        """Choose the row that agrees longest with the target, the first of several, and return the agreement [B].

        Args:
            own: [logits] what the target says after each token that has logits, request by request.
            following: [logits] the token after it in its row, which is accepted if the target says the same.
        """
        on, rows = self.on, self.shape.leaves
        first = on.first_logit[on.request] + on.branch * self._k1
        index = first[:, None] + torch.arange(self.shape.depth, device=own.device)
        index = index.clamp(max=len(own) - 1)  # of rows that are none of a tree
        agreed = (own[index] == following[index]).long().cumprod(1).sum(1)
        score = torch.where(self._valid, agreed * rows + rows - 1 - on.branch, -1)
        best = score.new_full((self.requests * rows,), -1)
        best[on.request * rows + on.branch] = score
        best = best.view(self.requests, rows).max(1).values
        self.winner = torch.where(on.is_tree > 0, rows - 1 - best % rows, 0)
        return best // rows

    def let_win(self, winner: Tensor, where: Tensor) -> None:
        """Another choice [B] for some requests, `where` [B] bool."""
        assert self.winner is not None
        self.winner = torch.where(where, winner, self.winner)

    def may_win(self, branch: Tensor) -> Tensor:
        """Whether the row of number `branch` [B] of each request may win, [B] bool."""
        return self._eligible.gather(1, branch[:, None])[:, 0]

    @functools.cached_property
    def _eligible(self) -> Tensor:
        """[B, L] bool: which rows of each request may win."""
        grid = self._valid.new_zeros(self.requests * self.shape.leaves)
        grid[self.on.request * self.shape.leaves + self.on.branch] = self._valid
        return grid.view(self.requests, -1)

    def logit_of(self, branch: Tensor, depth: int, count: int) -> Tensor:
        """Which of `count` logits comes after the token at `depth` of the row of number `branch` [B], [B]."""
        return (self.on.first_logit + branch * self._k1 + depth).clamp(max=count - 1)

    def said(self, own: Tensor) -> Tensor:
        """Of `own` [logits], the target's tokens along each winner [B, k + 1]."""
        assert self.winner is not None
        first = self.on.first_logit + self.winner * self._k1
        index = first[:, None] + torch.arange(self._k1, device=own.device)
        return own[index.clamp(max=len(own) - 1)]

    def kept(self) -> Tensor:
        """Logits of the chains that are shown, as indices [kept] into those of the pass."""
        assert self.winner is not None
        return self.on.kept + (self.winner * self._k1)[self.on.kept_of]

    def shown(self) -> Tensor:
        """Tokens of the chains that are shown, as indices [shown] into those of the pass."""
        assert self.winner is not None
        return self.on.shown + (self.winner * self._k1)[self.on.shown_of]

    def count_winners(self, blocks: Blocks, requests: Sequence[str]) -> None:
        """Add to `blocks.rows` the batch's trees that are of the drafter's last round, by the row that was chosen."""
        assert self.winner is not None
        slot = to_device(self.root.device, slot=blocks.last_round(requests)).slot
        ours = (slot >= 0) & (blocks.newest[slot.clamp(min=0)] == self.root) & (self.on.is_tree > 0)
        blocks.rows.index_add_(0, self.winner, ours.double())

    def without_others(self, counts: Tensor) -> Tensor:
        """[B], what is counted from the end of each request's tokens, less those that are not shown."""
        return counts - self.on.cut.to(counts.dtype)


def flat(root: Tensor, paths: Tensor) -> Tensor:
    """Drafts [B, N] of paths [B, L, k] from roots [B], as vLLM is given them."""
    roots = root.to(paths.dtype)[:, None, None].expand(-1, paths.shape[1], 1)
    return torch.cat([roots, paths], 2).flatten(1)[:, 1:]
