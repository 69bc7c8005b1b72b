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
    """The filters of the requests in V2's batch: what of them a round needs is decided on the host, without waiting."""

    def __init__(self, states: Any):
        """`states` are the SamplingStates of the target's sampler (vllm/v1/worker/gpu/sample/states.py)."""
        self._states = states
        self._top_k = self._top_p = False

    def begin(self, requests: np.ndarray) -> None:
        """See which filters the requests of a round have; `requests` [B] are their places in the states."""
        states = self._states
        self._top_k = bool((states.top_k.np[requests] != states.vocab_size).any())
        self._top_p = bool((states.top_p.np[requests] != 1).any())

    @property
    def active(self) -> bool:
        """Whether a request of the round has a filter."""
        return self._top_k or self._top_p

    def __call__(self, logits: Tensor, requests: Tensor) -> Tensor:
        """Logits [B, V] of `requests` [B], on the device, cut; as they are where no request has a filter."""
        if not self.active:
            return logits
        states = self._states
        return cut(
            logits,
            states.temperature.gpu[requests],
            states.top_k.gpu[requests] if self._top_k else None,
            states.top_p.gpu[requests] if self._top_p else None,
        )
