"""How far a drafter's next-token distribution is from the target's, per position; one signature for all.

Every function takes target logits [..., V1] and drafter logits [..., V2] of any float type and returns float32
[...]. One tokenizer is often padded to different vocabulary sizes; the padding is never sampled, so both sides are
cut to the smaller size and normalised over that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def forward_kl(target: Tensor, drafter: Tensor) -> Tensor:
    """KL(target || drafter) in nats: the drafter must cover what the target may say."""
    p, q = _log_probs(target, drafter)
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(target: Tensor, drafter: Tensor) -> Tensor:
    """KL(drafter || target) in nats: the drafter may pick one of the target's modes."""
    p, q = _log_probs(target, drafter)
    return (q.exp() * (q - p)).sum(-1)


def total_variation(target: Tensor, drafter: Tensor) -> Tensor:
    """Half the L1 distance, 0 to 1: the probability that a draft sampled at temperature 1 is rejected."""
    p, q = _log_probs(target, drafter)
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def overlap(target: Tensor, drafter: Tensor) -> Tensor:
    """sum min(p, q), 0 to 1: the probability that a draft sampled at temperature 1 is accepted."""
    return 1 - total_variation(target, drafter)


def agreement(target: Tensor, drafter: Tensor) -> Tensor:
    """1 where both would choose the same token greedily, else 0."""
    size = min(target.shape[-1], drafter.shape[-1])
    return (target[..., :size].argmax(-1) == drafter[..., :size].argmax(-1)).float()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": forward_kl,
    "reverse-kl": reverse_kl,
    "tvd": total_variation,
}


def _log_probs(target: Tensor, drafter: Tensor) -> tuple[Tensor, Tensor]:
    size = min(target.shape[-1], drafter.shape[-1])
    return tuple(torch.log_softmax(x[..., :size].float(), dim=-1) for x in (target, drafter))
