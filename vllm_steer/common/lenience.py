"""Lenience (DistillSpec, arXiv 2310.08461, section 4): accept drafts that the target would have rejected.

A draft x is accepted with probability min(1, f(p(x)) / q(x)) in place of min(1, p(x) / q(x)), where f raises the
target's p. What is said then is *not* the target's distribution any more: that is the price of the speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError, require_one_of

FORMS = {
    "linear": "f(p) = p / epsilon",
    "square": "f(p) = p / epsilon squared",
    "exponential": "f(p) = p to the power of epsilon",
}


@dataclass(frozen=True)
class Lenience:
    """How much is given up: epsilon 1 nothing, smaller more."""

    epsilon: float
    form: str = "linear"

    @classmethod
    def read(cls, raw: Any, where: str) -> Lenience:
        """From a number, which means the linear form, or {"epsilon": number, "form": name}.

        Raises SteeringError, which begins with `where`, for anything else.
        """
        found = {"epsilon": raw} if isinstance(raw, int | float) else raw
        if not isinstance(found, dict) or not {"epsilon"} <= found.keys() <= {"epsilon", "form"}:
            raise SteeringError(
                f'{where} is {raw!r}, allowed is a number, or {{"epsilon": number, "form": name}} with a form of '
                f"{', '.join(FORMS)}"
            )
        epsilon, form = found["epsilon"], found.get("form", "linear")
        number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
        if not number or not 0 < epsilon <= 1:
            raise SteeringError(f"{where}: epsilon is {epsilon!r}, allowed is more than 0, to 1 (nothing is given up)")
        require_one_of(f"{where}: form", str(form), FORMS)
        return cls(float(epsilon), form)

    @property
    def exact(self) -> bool:
        """Whether nothing is given up."""
        return self.epsilon == 1

    def __str__(self) -> str:
        return f"{self.epsilon:g} ({self.form})"

    def log_gain(self, log_p: Tensor) -> Tensor:
        """log(f(p) / p) for drafts of log-probability `log_p` under the target; 0 where p is 0, which stays 0."""
        if self.form == "exponential":
            return ((self.epsilon - 1) * log_p).masked_fill(log_p == -torch.inf, 0)
        return torch.full_like(log_p, -math.log(self.epsilon) * (2 if self.form == "square" else 1))

    def log_p(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """The log-probability of drafts [N] under logits [N, V], as far as this form needs it: else the bare logit."""
        drafted = logits.gather(1, drafts[:, None])[:, 0].float()
        return drafted - logits.float().logsumexp(-1) if self.form == "exponential" else drafted
