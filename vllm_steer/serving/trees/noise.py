"""Noise for V1's sampled trees that depends on a request's seed, a position and a token, and on nothing else.

Every row of a tree then sees the same noise at the same position, so rows that share a path agree on it, and drafts may
take the noise that the target will (decoding/verification.py, `Noise`). V2 has such noise of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64's (Steele et al., 2014), as signed numbers.
_A, _B, _C = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64 numbers; multiplication wraps, and shifts bring no sign in."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _B
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _C
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seeds: Tensor, positions: Tensor, size: int, stream: int = 0) -> Tensor:
    """Numbers in (0, 1), [n, size] float64, for seeds and positions [n] int64; other streams are independent."""
    start = ((stream + 1) * _A + 2**63) % 2**64 - 2**63  # wrapped, as the tensors are
    state = _mix(_mix(seeds + start) + positions * _A)
    bits = _mix(state[:, None] + torch.arange(1, size + 1, device=seeds.device) * _A)
    return (((bits >> 11) & 0x1FFFFFFFFFFFFF).double() + 0.5) * 2.0**-53


def gumbel(seeds: Tensor, positions: Tensor, size: int, stream: int = 0) -> Tensor:
    """Standard Gumbel noise [n, size] float32, as `uniform`: argmax(log p + noise) draws from p."""
    return -torch.log(-torch.log(uniform(seeds, positions, size, stream))).float()
