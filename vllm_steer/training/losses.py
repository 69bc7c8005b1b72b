"""How far a drafter's next-token distribution is from the target's, per position; one signature for all.

Every function takes target logits [..., V1] and drafter logits [..., V2] of any float type and returns float32
[...]. One tokenizer is often padded to different vocabulary sizes; the padding is never sampled, so both sides are
cut to the smaller size and normalised over that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

CHUNK = 2**25  # logits held at a time by `by_position`: 128 MiB in float32


def forward_kl(target: Tensor, drafter: Tensor) -> Tensor:
    """KL(target || drafter) in nats: the drafter must cover what the target may say."""
    p, q = _log_probs(target, drafter)
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(target: Tensor, drafter: Tensor) -> Tensor:
    """KL(drafter || target) in nats: the drafter may pick one of the target's modes."""
    p, q = _log_probs(target, drafter)
    return (q.exp() * (q - p)).sum(-1)


def jensen_shannon(target: Tensor, drafter: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) in nats, m = beta p + (1 - beta) q (DistillSpec, arXiv 2310.08461)."""
    p, q = _log_probs(target, drafter)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def total_variation(target: Tensor, drafter: Tensor) -> Tensor:
    """Half the L1 distance, 0 to 1: the probability that a draft sampled at temperature 1 is rejected."""
    p, q = _log_probs(target, drafter)
    return (p.exp() - q.exp()).abs().sum(-1) / 2


def overlap(target: Tensor, drafter: Tensor) -> Tensor:
    """sum min(p, q), 0 to 1: the probability that a draft sampled at temperature 1 is accepted."""
    return 1 - total_variation(target, drafter)


def rejection(target: Tensor, drafter: Tensor) -> Tensor:
    """-log sum min(p, q): the log-likelihood of acceptance itself (arXiv 2602.23881)."""
    p, q = _log_probs(target, drafter)
    return -torch.logsumexp(torch.minimum(p, q), dim=-1)


def agreement(target: Tensor, drafter: Tensor) -> Tensor:
    """1 where both would choose the same token greedily, else 0."""
    size = min(target.shape[-1], drafter.shape[-1])
    return (target[..., :size].argmax(-1) == drafter[..., :size].argmax(-1)).float()


Distance = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Distance] = {
    "kl": forward_kl,
    "reverse-kl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "rejection": rejection,
}
RENAMED = {"overlap": "rejection"}  # 0.1.0 called the loss by the score that it raises


def current_name(name: str) -> str:
    """The current name of a loss; other values are returned unchanged."""
    if name in RENAMED:
        log.warning("--loss %s is called %s now; the old name goes in the next release", name, RENAMED[name])
    return RENAMED.get(name, name)


def by_position(
    functions: Sequence[Distance],
    target_head: Callable[[Tensor], Tensor],
    drafter_head: Callable[[Tensor], Tensor],
    target: Tensor,
    drafter: Tensor,
    vocab_size: int,
) -> Tensor:
    """Each function at N positions, from last hidden states [N, H1] and [N, H2]: float32 [len(functions), N].

    Logits exist for CHUNK / vocab_size positions at a time and are computed again for the gradient, so memory grows
    with neither vocabulary x positions nor N.
    """

    def part(wanted: Tensor, hidden: Tensor) -> Tensor:
        logits = target_head(wanted).detach(), drafter_head(hidden)
        return torch.stack([function(*logits) for function in functions])

    rows = max(1, CHUNK // vocab_size)
    if drafter.shape[0] <= rows:
        return part(target, drafter)
    pieces = zip(target.split(rows), drafter.split(rows), strict=True)
    return torch.cat([checkpoint(part, *piece, use_reentrant=False) for piece in pieces], dim=1)


def _log_probs(target: Tensor, drafter: Tensor) -> tuple[Tensor, Tensor]:
    size = min(target.shape[-1], drafter.shape[-1])
    a, b = (torch.log_softmax(x[..., :size].float(), dim=-1) for x in (target, drafter))
    return a, b
