"""The watchdog's rule: when the acceptance of a steered drafter has collapsed."""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from vllm_steer.serving.telemetry.block_counter import Counts

ENOUGH, MOST = 200, 5000  # blocks that a verdict needs, and after which it is put off
SIGMAS = 4  # standard errors between what was measured and the limit
LOW = 0.5  # of the recorded acceptance
RECORDED = {"greedy": "agreement", "sampled": "overlap"}  # where training recorded the acceptance of each draft
REMEDY = (
    "The output is right all the same, but slower than it should be. Compare with the drafter unsteered "
    "(STEER_DISABLE=1, or scale 0), run `vllm-steer doctor CHECKPOINT --target TARGET --url URL`, and check that the "
    "target is what the steering was trained for: version, fine-tuning, dtype, quantization"
)


def recorded(acceptance: dict[str, Any], draft_length: int) -> dict[str, list[float]]:
    """Accepted tokens of a block by its number of drafts, 0..draft_length, as recorded in a checkpoint at training.

    Keys "greedy" and "sampled", missing where nothing was recorded. Draft i of a block is accepted if all before it
    were; drafts past those recorded count like the last of them.
    """
    trained, found = acceptance.get("trained"), {}
    for name, key in RECORDED.items():
        rates = trained.get(key) if isinstance(trained, dict) else None
        if isinstance(rates, list) and rates and all(map(_is_share, rates)):
            rates = (rates + [rates[-1]] * draft_length)[:draft_length]
            found[name] = [0.0, *accumulate(accumulate(rates, mul))]
    return found


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


class Watchdog:
    """Judges the blocks drafted with steering on; warns once until acceptance has recovered.

    It looks at ENOUGH blocks at least, and at more, up to MOST, until the verdict is certain: the mean of a few
    blocks varies, and a server that runs for months is judged often.
    """

    def __init__(self, expected: list[list[float]], seen: torch.Tensor | float = 0.0):
        """`expected`: lists of accepted tokens by number of drafts; `seen`: blocks that are not to be judged.

        The lowest list sets the threshold; if there is none, only zero acceptance warns.
        """
        self._expected = torch.tensor(expected, dtype=torch.float64).amin(0) if expected else None
        self._seen = seen
        self._warned = False

    def judge(self, counts: Counts) -> str | None:
        """A warning, if the blocks since the last verdict deserve a new one."""
        fresh = counts.steered - self._seen
        blocks = float(fresh.sum())
        if blocks < ENOUGH:
            return None
        share, number = fresh.sum(0) / blocks, torch.arange(len(fresh), dtype=torch.float64)
        accepted = float(share @ number)
        doubt = SIGMAS * math.sqrt(float(share @ (number - accepted) ** 2) / blocks)
        expected = None if self._expected is None else float(fresh.sum(1) @ self._expected) / blocks
        limit = LOW * (expected or 0)
        low = accepted == 0 or accepted + doubt < limit
        fine = not low and (expected is None or accepted - doubt >= limit)
        if not low and not fine and blocks < MOST:
            return None
        self._seen = counts.steered
        warn, self._warned = low and not self._warned, low or (self._warned and not fine)
        if not warn:
            return None
        what = "no draft was accepted" if accepted == 0 else f"{accepted:.2f} draft tokens per block were accepted"
        beside = "nothing was recorded at training" if expected is None else f"{expected:.2f} recorded at training"
        return f"acceptance has collapsed: {what} in the last {blocks:.0f} steered blocks, {beside}. {REMEDY}"
