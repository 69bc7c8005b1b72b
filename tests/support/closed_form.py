"""What lenient verification says, by the formulas of DistillSpec (arXiv 2310.08461)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_steer.common.lenience import Lenience


def raised(p: Tensor, lenience: Lenience) -> Tensor:
    """f(p)."""
    e = lenience.epsilon
    return {"linear": p / e, "square": p / e**2, "exponential": torch.where(p > 0, p**e, 0)}[lenience.form]


def said(p: Tensor, q: Tensor, lenience: Lenience) -> Tensor:
    """The distribution [..., V] of a token that lenient verification of one draft from q says."""
    accepted = torch.minimum(q, raised(p, lenience))
    residual = (p - q).clamp(min=0)
    left = residual.sum(-1, keepdim=True)
    residual = torch.where(left > 0, residual / left.clamp(min=1e-300), p)
    return accepted + (1 - accepted.sum(-1, keepdim=True)) * residual
