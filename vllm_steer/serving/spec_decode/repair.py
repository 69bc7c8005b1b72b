"""Makes the drafts of a block depend on each other, from left to right along the realised chain; both runners.

No value is read back to the host: a draft is a tensor that the next step indexes with.

Shape legend: B requests, k drafts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from vllm_steer.decoding.block_tree import Logits
from vllm_steer.decoding.rescoring import rescored
from vllm_steer.drafters.block import ngram
from vllm_steer.serving.block_plan import BlockPlan

logger = logging.getLogger("vllm.steer")

_GREEDY_BELOW = 1e-5  # as vLLM tells greedy requests in a mixed batch


class Repair:
    """The approximator of a TreeFlash model, a bigram beside any other, or nothing: then drafts are blind."""

    def __init__(self, plan: BlockPlan, device: torch.device):
        self._table = None if plan.ngram is None else ngram.load(plan.ngram).to(device)
        self._approximates = plan.kind == "treeflash"
        self._weights = torch.tensor([plan.alpha, plan.alpha_sampled], device=device)
        self._gate = torch.ones((), device=device)  # 0: the drafts are blind
        self.on = True
        if self._table is not None:
            weights = f"alpha {plan.alpha:g} greedy and {plan.alpha_sampled:g} sampled"
            logger.info("each draft of a block knows the one before, by the bigram of %s, %s", plan.ngram, weights)
        elif self._approximates:
            logger.info("each draft of a block knows the one before, by its approximator")

    def switch(self, on: bool) -> None:
        """From the next draft round on, with or without."""
        self._gate.fill_(float(on))
        self.on = on

    def logits(self, model: Any, hidden: Tensor, k: int, temperature: Tensor | None) -> Logits:
        """How each draft is read out, given the token before it.

        Args:
            model: vLLM's, whose states `hidden` [B k, H or 2H] are.
            temperature: [B], or None where all drafts are greedy.
        """
        states = hidden.unflatten(0, (-1, k))
        if self._approximates:
            return lambda step, previous: model.step_logits(_rows(states[:, step], previous), previous, self._gate)
        return self.over(model.compute_logits(hidden).unflatten(0, (-1, k)), temperature)

    def over(self, blind: Tensor, temperature: Tensor | None) -> Logits:
        """The same from blind logits [B, k, V]."""
        if (table := self._table) is None:
            return lambda step, previous: _rows(blind[:, step], previous)
        alpha = self._weights[:1].expand(len(blind))
        if temperature is not None:
            alpha = torch.where(temperature < _GREEDY_BELOW, self._weights[0], self._weights[1])
        alpha = (alpha * self._gate)[:, None]
        return lambda step, previous: rescored(_rows(blind[:, step], previous), previous, table, _rows(alpha, previous))


def _rows(of_request: Tensor, previous: Tensor) -> Tensor:
    """[B r, ...] from [B, ...], for r rows of each request."""
    rows = len(previous) // len(of_request)
    return of_request if rows == 1 else of_request.repeat_interleave(rows, 0)
