"""Drafts sampled under the request's own top-k and top-p.

vLLM samples probabilistic drafts from the whole vocabulary even where the target's distribution is cut to a few tokens,
and every draft outside of these is rejected. Here the drafter's distribution is cut by the same rules, at the same
temperature. A draft is drawn from the cut distribution and verified against it, so rejection sampling stays exact.
Greedy drafts are the same with and without. (vLLM 0.32 and 0.33 accept no min-p under speculation.)
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("vllm.steer")


def say_so() -> None:
    """Log that drafts are filtered: not every drafter that this is true of is steered."""
    logger.info("sampled drafts follow each request's top-k and top-p (filter_drafts)")


def cut(logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The logits, with -inf for every token outside of the request's filters.

    Args:
        logits: [B, V].
        temperature: [B]; 0 for greedy.
        top_k: [B] integer, V for all tokens; None: no request has one.
        top_p: [B], 1 for all tokens; None: no request has one.

    Returns [B, V] of the logits' dtype; they themselves are not changed.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    scaled = logits.float() / torch.where(temperature == 0, 1, temperature)[:, None]
    return logits.masked_fill(apply_top_k_top_p(scaled, top_k, top_p) == -torch.inf, -torch.inf)


class Filters:
    """The filters of the requests in V2's batch, row by row.

    Its tensors are allocated once and never rebound, so that a CUDA graph of draft passes could read them. Which of the
    filters a round applies is decided on the host, without waiting, and a graph would keep what was decided at its
    capture: rounds that are `active` need passes without a graph, or a graph captured while they are.
    """

    active = False  # whether any request of the round has a filter

    def __init__(self, states: Any, device: torch.device):
        """`states` are the SamplingStates of the target's sampler (vllm/v1/worker/gpu/sample/states.py)."""
        self._states = states
        self._temperature = torch.ones(states.max_num_reqs, device=device)
        self._top_k = torch.full_like(self._temperature, states.vocab_size, dtype=torch.int32)
        self._top_p = torch.ones_like(self._temperature)
        self._any_top_k = self._any_top_p = False

    def begin(self, requests: Tensor, on_host: np.ndarray) -> None:
        """Take over the filters of a round's requests; both arguments are their places in the states, [B]."""
        states = self._states
        self._requests = len(requests)
        self._any_top_k = bool((states.top_k.np[on_host] != states.vocab_size).any())
        self._any_top_p = bool((states.top_p.np[on_host] != 1).any())
        self.active = self._any_top_k or self._any_top_p
        if self.active:
            torch.index_select(states.temperature.gpu, 0, requests, out=self._temperature[: len(requests)])
        if self._any_top_k:
            torch.index_select(states.top_k.gpu, 0, requests, out=self._top_k[: len(requests)])
        if self._any_top_p:
            torch.index_select(states.top_p.gpu, 0, requests, out=self._top_p[: len(requests)])

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B r, V] of the round's requests, r rows each, cut; as they are where no request has a filter."""
        if not self.active:
            return logits
        n = self._requests
        each = lambda of: of[:n].repeat_interleave(len(logits) // n)  # noqa: E731
        top_k, top_p = each(self._top_k) if self._any_top_k else None, each(self._top_p) if self._any_top_p else None
        return cut(logits, each(self._temperature), top_k, top_p)
