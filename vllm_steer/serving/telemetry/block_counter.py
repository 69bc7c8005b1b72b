"""The blocks of a steered engine, counted on the device as they are verified.

A block counts when its drafts come from this drafter's last round for that request. vLLM also verifies drafts nobody
made, and its own counters know them as rejected: after a full hit of the prefix cache, after a preemption, after a
round without drafting. Those requests were not in the last round, or their window does not start where it ended.

Nothing here waits for the device. On a GPU the counts are copied after each round to pinned memory, and what is read
there may be a round old.

Shape legend: B requests in the batch, k draft length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = re.compile(r"_(v2_mixed_)?warmup_")  # vllm/v1/worker/gpu/warmup.py; no request of a user begins with "_"


@dataclass(frozen=True)
class Counts:
    """Everything counted so far, on the CPU."""

    steered: Tensor  # [k + 1, k + 1] float64: blocks drafted with steering on, by drafts verified and drafts accepted
    unsteered: Tensor  # the same for blocks drafted while the scale was 0
    guides: float  # how many guides were made of finite numbers ...
    guide_norms: float  # ... the sum of their norms ...
    broken: float  # ... and how many others, which drafted unsteered

    @property
    def accepted(self) -> float:
        """Accepted tokens of all blocks, the target's own tokens not included."""
        table = self.steered + self.unsteered
        return float((table.sum(0) * torch.arange(len(table))).sum())

    @property
    def accepted_at(self) -> list[float]:
        """[k]: blocks whose first, second, ... draft was accepted."""
        by_accepted = (self.steered + self.unsteered).sum(0)
        return [float(by_accepted[i:].sum()) for i in range(1, len(by_accepted))]


class Blocks:
    """Counts one engine's blocks; the first tensor-parallel rank has one."""

    def __init__(self, max_num_seqs: int, draft_length: int, device: torch.device):
        self.draft_length = draft_length
        self._side = draft_length + 1
        cells = 2 * self._side**2  # unsteered, steered
        pinned = self._pinned = device.type != "cpu"
        self._counts = torch.zeros(cells + 4, device=device, dtype=torch.float64)  # then: not ours, guides
        self._nowhere = cells
        self.guides = self._counts[-3:]  # good ones, the sum of their norms, broken ones: the injection adds to it
        self._host = torch.zeros(cells + 4, dtype=torch.float64, pin_memory=True) if pinned else self._counts
        self._ones = torch.ones(max_num_seqs, device=device, dtype=torch.float64)
        self._newest = torch.zeros(max_num_seqs, device=device, dtype=torch.int64)  # of the last round, by row
        self._rows: dict[str, int] = {}  # of the last round, by request
        self._steered = False  # the last round

    @torch.inference_mode()
    def verified(
        self, ids: Sequence[str], drafts: Sequence[int] | None, start: Tensor, accepted: Tensor, steered: bool
    ) -> None:
        """Count what vLLM has just verified, and remember the round that follows it.

        Args:
            ids: the request in each row of the batch.
            drafts: how many drafts were verified in each row; None: in none.
            start: [B] integer, on the device: position of the first token of each row's window.
            accepted: [B] integer, on the device: how many of the row's drafts the target accepted.
            steered: whether the round that begins now is steered.
        """
        n = len(ids)
        if drafts is not None:
            rows = [self._row(id) if d else -1 for id, d in zip(ids, drafts, strict=True)]
            if max(rows) >= 0:
                host = torch.tensor([rows, list(map(int, drafts))], pin_memory=self._pinned)
                row, verified = host.to(start.device, non_blocking=True)
                ours = (row >= 0) & (self._newest[row] == start)
                cell = (self._steered * self._side + verified) * self._side + accepted
                self._counts.index_add_(0, torch.where(ours, cell, self._nowhere), self._ones[:n])
        self._newest[:n] = start + accepted + 1
        self._rows = {id: i for i, id in enumerate(ids)}
        self._steered = steered
        if self._pinned:
            self._host.copy_(self._counts, non_blocking=True)

    def _row(self, id: str) -> int:
        """The request's row in the last round; -1 if it has none, or is one that vLLM warms its kernels with."""
        return -1 if WARM_UP.match(id) else self._rows.get(id, -1)

    def read(self) -> Counts:
        """What has been counted, without waiting for the device; any thread may ask."""
        host = self._host.clone()
        unsteered, steered = host[: self._nowhere].view(2, self._side, self._side)
        guides, norms, broken = host[-3:].tolist()
        return Counts(steered, unsteered, guides, norms, broken)
