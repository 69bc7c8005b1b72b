"""The mathematics of SD² (arXiv 2511.09844, section 3), in plain torch, shared by Hugging Face and vLLM code.

Shape legend: H target hidden size, L steered drafter layers, F drafter FFN width, r rank; `...` any batch dims.

    s_t = [h_low; h_mid; h_high]                  [..., 3H]   residual stream of the target at three depths
    g_t = W_fuse s_t + b_fuse                     [..., H]    the guide
    delta_t = W_steer LayerNorm(g_t)              [..., L, F] added to the drafter's up-projections
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from vllm_steer.drafters.steered.config import NUM_STATES, SteeringConfig

NORM_EPS = 1e-5


class Steering(nn.Module):
    """Guide and projection. Starts as "no change": fuse sums the three states, the projection is zero."""

    def __init__(
        self, config: SteeringConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        hidden, out = config.target.hidden_size, config.projection_size
        kw = {"device": device, "dtype": dtype}
        self.fuse = nn.Linear(NUM_STATES * hidden, hidden, **kw)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS, **kw)
        if config.rank is None:
            self.project: nn.Module = nn.Linear(hidden, out, bias=False, **kw)
        else:
            self.project = nn.Sequential(
                OrderedDict(
                    down=nn.Linear(hidden, config.rank, bias=False, **kw),
                    up=nn.Linear(config.rank, out, bias=False, **kw),
                )
            )
        if not self.fuse.weight.is_meta:  # meta: shapes only, whatever the sizes
            self.reset_parameters()

    @property
    def output(self) -> nn.Linear:
        """The linear that writes L*F: the one that is zero at the start and sharded under tensor parallelism."""
        return self.project if self.config.rank is None else self.project.up

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W_fuse = [I I I], b_fuse = 0, LayerNorm = identity, W_steer = 0 (low rank: only its second factor)."""
        self.fuse.weight.copy_(torch.eye(self.config.target.hidden_size).repeat(1, NUM_STATES))
        self.fuse.bias.zero_()
        self.norm.reset_parameters()
        if self.config.rank is not None:
            self.project.down.reset_parameters()
        self.output.weight.zero_()

    def guide(self, states: Tensor) -> Tensor:
        """[..., 3H] concatenated target states, low to high -> [..., H]."""
        return self.fuse(states)

    def deltas(self, guide: Tensor) -> Tensor:
        """[..., H] guides -> [..., L, F] deltas, in the order of `config.steered_layers`."""
        return self.project(self.norm(guide)).unflatten(-1, (self.config.num_steered, -1))

    def compress(self, guide: Tensor) -> Tensor:
        """[..., H] guides -> [..., H], or [..., r] at low rank: all that is left is one matrix per layer."""
        x = self.norm(guide)
        return x if self.config.rank is None else self.project.down(x)

    def delta(self, compressed: Tensor, slot: int) -> Tensor:
        """`compress`ed guides -> [..., F], the delta of the slot-th steered layer: deltas(g)[..., slot, :]."""
        width = self.config.drafter.intermediate_size
        return nn.functional.linear(compressed, self.output.weight[slot * width : (slot + 1) * width])

    def forward(self, states: Tensor) -> Tensor:
        """[..., 3H] -> [..., L, F]."""
        return self.deltas(self.guide(states))
