"""Recursive rejection sampling (RSD, arXiv 2402.14160, algorithm 1) of the trees of a batch at once.

As `recursive` in decoding/verification.py, node by node from the root. Children were drawn without replacement from the
drafter's distributions, which are kept from the draft round to the verification. Drafts that are not of the last round
(vLLM verifies placeholders after a preemption) are verified as if they had been certain: that is exact for any draft.

Shape legend: B requests, L leaves, V vocabulary, k depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving.trees.layout import Rows, to_device
from vllm_steer.serving.trees.noise import gumbel, uniform

DRAFTS, CHOICES = 1, 2  # streams of noise; 0 is the target's own


class Recursive:
    """What the last draft round drew its trees from, and their verification."""

    def __init__(self, shape: TreeShape, max_num_seqs: int, vocabulary: int, device: torch.device):
        self._shape = shape
        self._drafted: dict[str, int] = {}  # requests of the last round, by row
        self._newest: Tensor | None = None  # [B] positions of their newest tokens
        nodes = [shape.leaves // shape.below(depth) for depth in range(shape.depth)]
        # One buffer, from the start, so that vLLM's look at free memory sees it: by depth, [N, nodes, V].
        whole = torch.zeros(max_num_seqs, sum(nodes), vocabulary, device=device)
        self._q = whole.split(nodes, 1)
        self._depth = 0  # of what is noted next

    def begin(self, requests: Sequence[str], newest: Tensor) -> None:
        """A draft round begins for these requests, whose newest tokens are at the positions `newest` [B]."""
        self._drafted, self._newest, self._depth = {name: i for i, name in enumerate(requests)}, newest, 0

    def note(self, logits: Tensor) -> None:
        """The next depth is drawn from softmax(logits), [B nodes, V]."""
        assert self._newest is not None
        n = len(self._newest)
        self._q[self._depth][:n] = torch.softmax(logits.float(), -1).view(n, -1, logits.shape[-1])
        self._depth += 1

    def walk(
        self, rows: Rows, requests: Sequence[str], logits: Tensor, following: Tensor, seeds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Verify every tree of a batch.

        Args:
            requests: the B requests.
            logits: [logits, V] of the target, by the temperature and the filters of each request.
            following: [logits] the token after each in its row, -1 where there is none.
            seeds: [B] int64.

        Returns the row of each request that its accepted path lies on [B], what is said along it [B, k + 1], and how
        many drafts were accepted [B].
        """
        ours, slot = self._of_the_last_round(rows, requests)
        row = torch.zeros_like(rows.root)
        live, accepted, said = row == 0, row.clone(), []
        for depth in range(self._shape.depth + 1):
            at = rows.logit_of(row, depth, len(logits))
            p = torch.softmax(logits[at].float(), -1)
            position = rows.root + depth
            token, found = row.clone(), torch.zeros_like(live)
            if depth < self._shape.depth:
                chances = uniform(seeds, position, self._shape.widths[depth], CHOICES)
                row, token, found, p = self._children(rows, depth, row, live, ours, slot, p, following, chances)
            drawn = (p.log() + gumbel(seeds, position, p.shape[-1])).argmax(-1)
            said.append(torch.where(found, token, drawn))
            live = live & found
            accepted = accepted + live
        return row, torch.stack(said, 1), accepted

    def _of_the_last_round(self, rows: Rows, requests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Which requests' drafts are those of the last round [B], and their rows in it [B]."""
        slots = np.fromiter((self._drafted.get(name, -1) for name in requests), np.int64, len(requests))
        slot = to_device(rows.root.device, slot=slots).slot
        if self._newest is None:
            return slot < -1, slot.clamp(min=0)
        ours = (slot >= 0) & (self._newest[slot.clamp(min=0)] == rows.root)
        return ours, slot.clamp(min=0)

    def _children(
        self, rows: Rows, depth: int, row: Tensor, live: Tensor, ours: Tensor, slot: Tensor, p: Tensor,
        following: Tensor, chances: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """The children of the present node of each request, one after the other.

        Returns the rows, the accepted tokens, whether one was accepted, each [B], and what is left of p [B, V].
        """
        below, step = self._shape.below(depth), self._shape.below(depth + 1)
        node = row // below
        q = self._q[depth][slot, node]
        token, found = torch.full_like(row, -1), torch.zeros_like(live)
        for child in range(self._shape.widths[depth]):
            branch = node * below + child * step
            x = following[rows.logit_of(branch, depth, len(following))]
            one = torch.zeros_like(p).scatter_(1, x.clamp(min=0)[:, None], 1)
            now = torch.where(ours[:, None], q, one)
            px, qx = ((each * one).sum(-1) for each in (p, now))
            tried = live & ~found & rows.may_win(branch) & (x >= 0) & (qx > 0)
            taken = tried & (chances[:, child] * qx < px)
            row, token, found = torch.where(taken, branch, row), torch.where(taken, x, token), found | taken
            left = (p - now).clamp(min=0)
            p = torch.where((tried & ~taken)[:, None], left / left.sum(-1, keepdim=True), p)
            q = q * (1 - one)
            q = q / q.sum(-1, keepdim=True).clamp(min=1e-30)
        return row, token, found, p
