"""A block drafter beside its target: what it reads, and the logits of each draft given the token before.

Shape legend: B rows, T tokens, A blocks of a row, k drafts, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer.drafters.block.config import BlockConfig
from vllm_steer.drafters.block.modules import Approximator, DFlash, Readout, ResidualBlock

Embed = Callable[[Tensor], Tensor]  # the target's: token ids [...] -> [..., H]


class BlockDrafter(nn.Module):
    """One of the kinds of config.py; its state has the keys of its file, and DFlash's the prefix `model.` besides."""

    def __init__(self, config: BlockConfig, device: Any = None):
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            if config.kind == "medusa":
                bias = bool(config.raw.get("medusa_fc_bias", False))
                self.blocks = nn.ModuleList(
                    ResidualBlock(config.hidden_size, config.layers, bias) for _ in range(config.draft_length)
                )
                heads = 1 if config.raw.get("original_lm_head") else config.draft_length
                self.lm_heads = nn.ModuleList(Readout(config.vocab_size, config.hidden_size) for _ in range(heads))
                self.lm_heads.requires_grad_(False)  # the target's own when trained here
            else:
                self.model = DFlash(config)
                self.ar_approximation = (
                    Approximator(config.hidden_size, config.model.intermediate_size)
                    if config.kind == "treeflash"
                    else None
                )

    def hidden(self, embed: Embed, newest: Tensor, states: Tensor, last: Tensor, anchors: Tensor, k: int) -> Tensor:
        """What one pass makes of each block: [B, A, k, H], for `corrected`.

        Args:
            newest: int64 [B, A], the newest token of each block.
            states: [B, T, len(config.states) * H] of the target; Medusa ignores them.
            last: [B, T, H], what the target's head reads; DFlash ignores it.
            anchors: int64 [B, A], the position of that token; what is read lies before it.
        """
        if self.config.kind == "medusa":
            at = (anchors - 1)[..., None].expand(-1, -1, last.shape[-1])
            x = last.gather(1, at)
            return torch.stack([block(x) for block in self.blocks[:k]], 2)
        masks = torch.full((*newest.shape, k + 1), self.config.mask_token, device=newest.device)
        masks[..., 0] = newest
        return self.model.hidden(embed(masks.flatten(1)), states, anchors, k)

    def corrected(self, hidden: Tensor, embed: Embed, previous: Tensor) -> Tensor:
        """What the head reads: [..., H] from `hidden` [..., H] and the tokens before them, int64 [...]."""
        if self.config.kind == "medusa":
            return hidden
        normed = self.model.norm(hidden)
        if self.ar_approximation is None:
            return normed
        return self.model.norm(hidden + self.ar_approximation(embed(previous), normed))

    @property
    def readouts(self) -> int:
        """How many read-outs it has: 1, or one for each head of a Medusa drafter that was trained that way."""
        return len(self.lm_heads) if self.config.kind == "medusa" else 1

    def head(self, target_head: Callable[[Tensor], Tensor], step: int) -> Callable[[Tensor], Tensor]:
        """The read-out of draft `step`, counted from 0: [N, H] -> logits [N, V]."""
        if self.config.kind != "medusa":
            return target_head
        weight: Any = self.lm_heads[min(step, len(self.lm_heads) - 1)].weight
        return lambda x: nn.functional.linear(x.to(weight.dtype), weight)
