"""The blocks of a steered engine, counted on the device as they are verified.

A block counts when its drafts come from this drafter's last round for that request. vLLM also verifies drafts nobody
made, and its own counters know them as rejected: after a full hit of the prefix cache, after a preemption, after a
round without drafting. Those requests were not in the last round, or their window does not start where it ended.

Nothing here waits for the device. On a GPU the kernel that writes a round's rows counts its blocks too, and the thread
that reads the counts copies them on a stream of its own.

Shape legend: B requests in the batch, k draft length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_steer.serving.plan import tree_of

WARM_UP = re.compile(r"_(v2_mixed_)?warmup_")  # vllm/v1/worker/gpu/warmup.py; no request of a user begins with "_"


@dataclass(frozen=True)
class Counts:
    """Everything counted so far, on the CPU."""

    steered: Tensor  # [k + 1, k + 1] float64: blocks drafted with steering on, by drafts verified and drafts accepted
    unsteered: Tensor  # the same for blocks drafted while the scale was 0
    guides: float  # how many guides were made of finite numbers ...
    guide_norms: float  # ... the sum of their norms ...
    broken: float  # ... and how many others, which drafted unsteered
    rows: tuple[float, ...] = ()  # of draft trees: blocks by the row that was chosen; empty without trees

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


class Verified(NamedTuple):
    """What the counting of one round needs on the device."""

    counts: Tensor  # [2 (k + 1)^2 + ...] float64: unsteered and steered blocks, by drafts verified and drafts accepted
    before: Tensor  # [N] int32: position after the last round's newest token, by the last round's row
    after: Tensor  # [N] int32: the same of this round, to be written
    offset: int  # of the cells to count in: were the last round's drafts steered?
    side: int  # k + 1


class Blocks:
    """Counts one engine's blocks; the first tensor-parallel rank has one."""

    def __init__(self, max_num_seqs: int, draft_length: int, device: torch.device, rows: int = 0):
        """`rows` of a draft tree; 0: chains are drafted."""
        self.draft_length = draft_length
        self._side = draft_length + 1
        self._cells = 2 * self._side**2  # unsteered, steered
        self._counts = torch.zeros(self._cells + rows + 3, device=device, dtype=torch.float64)
        self.rows = self._counts[self._cells : -3]  # draft trees add to it
        self.guides = self._counts[-3:]  # good ones, the sum of their norms, broken ones: the injection adds to it
        self._newest = [torch.zeros(max_num_seqs, device=device, dtype=torch.int32) for _ in range(2)]
        self._rows: dict[str, int] = {}  # of the last round, by request
        self._steered = False  # the last round
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host = torch.zeros(len(self._counts), dtype=torch.float64, pin_memory=True) if self._stream else None

    @classmethod
    def of(cls, vllm_config: Any, device: torch.device) -> Blocks:
        """Those of an engine, of its chains or its trees."""
        spec, most = vllm_config.speculative_config, vllm_config.scheduler_config.max_num_seqs
        if (shape := tree_of(vllm_config)) is None:
            return cls(most, spec.num_speculative_tokens, device)
        return cls(most, shape.depth, device, shape.leaves)  # to vLLM all rows together are one long draft

    def begin(self, ids: Sequence[str], drafts: Sequence[int] | None, out: np.ndarray, steered: bool) -> Verified:
        """Note the requests of a round whose window vLLM has just verified.

        Args:
            ids: the request in each row of the batch.
            drafts: how many drafts were verified in each row; None: in none.
            out: [2, B] integer, gets each request's row in the last round, -1 for none, and its verified drafts.
            steered: whether the round that begins now is steered.
        """
        out[0] = -1 if drafts is None else self.last_round(ids)
        out[1] = 0 if drafts is None else drafts
        self._rows = dict(zip(ids, range(len(ids)), strict=True))
        self._newest.reverse()
        before, after = self._newest
        offset = self._side**2 if self._steered else 0
        self._steered = steered
        return Verified(self._counts, before, after, offset, self._side)

    def last_round(self, ids: Sequence[str]) -> np.ndarray:
        """[B], each request's row in the last round, -1 for none; between rounds."""
        # vLLM warms its kernels with requests of its own before the first of a user.
        known = {} if ids and WARM_UP.match(ids[0]) else self._rows
        return np.fromiter(map(known.get, ids, repeat(-1)), np.int64, len(ids))

    @property
    def newest(self) -> Tensor:
        """[N] int32, the position after the last round's newest token, by its row; between rounds."""
        return self._newest[1]

    def read(self) -> Counts:
        """What has been counted, without waiting for the device; any thread may ask.

        On a GPU that is what there was at the last call: this one only asks for a copy. To wait for it here would break
        a CUDA graph that another thread captures.
        """
        found = self._counts if self._host is None else self._host
        found = found.clone()
        if self._host is not None:
            with torch.cuda.stream(self._stream):
                self._host.copy_(self._counts, non_blocking=True)
        unsteered, steered = found[: self._cells].view(2, self._side, self._side)
        *rows, guides, norms, broken = found[self._cells :].tolist()
        return Counts(steered, unsteered, guides, norms, broken, tuple(rows))


def count(
    verified: Verified, previous: Tensor, drafts: Tensor, length: Tensor, rejected: Tensor, seq_lens: Tensor
) -> None:
    """Count the blocks of one round, and note where each request's window ended: what kernels.steer_window does too.

    Args (all integer [B]):
        previous, drafts: see `Blocks.begin`.
        length: rows of each request in the target's pass.
        rejected: how many of them, at the end, the target rejected.
        seq_lens: length of each request up to its last row in the target's pass.
    """
    accepted = length - 1 - rejected
    ours = (previous >= 0) & (accepted >= 0) & (accepted <= drafts) & (drafts > 0)
    ours &= verified.before[previous.clamp(min=0).long()] == seq_lens - length
    cells = torch.where(ours, verified.offset + drafts * verified.side + accepted, 0)
    verified.counts.index_add_(0, cells.long(), ours.double())  # a mask as an index would wait for the device
    verified.after[: len(length)] = seq_lens - rejected
