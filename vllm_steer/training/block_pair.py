"""A block drafter as one trainable module, run and measured against its target, teacher forced.

Blocks begin at random places of the responses (anchors). The token before each draft is the text's own: that is what
the realised chain has behind it wherever a draft is looked at, because everything before it was accepted.

Shape legend: B rows, T tokens, A anchors of a row, k drafts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.decoding.rescoring import rescored
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.drafters.block.ngram import Ngram
from vllm_steer.training.acceptance import Chances, predicted
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.losses import Distance, agreement, by_position, overlap
from vllm_steer.training.pair import Head, TrainedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECAY = 0.85  # a draft's weight in the loss against the one before it: it counts only if that was accepted
MEASURED_AT_ONCE = 32  # anchors


class BlockPair(TrainedWeights):
    """A block drafter, and the target that embeds, reads out and judges for it; frozen, not a part of this module."""

    def __init__(self, drafter: BlockDrafter, target: PreTrainedModel, loss: Distance, k: int, anchors: int):
        """`anchors`: blocks of a row in one step. Raises SteeringError where `k` is more than the drafter drafts."""
        super().__init__()
        if k > drafter.config.draft_length:
            raise SteeringError(f"--k is {k}, {drafter.config.where} drafts {drafter.config.draft_length} at most")
        self.drafter, self.loss, self.k, self.anchors = drafter, loss, k, anchors
        self._target = [target]  # in a list: not a submodule
        self._refinement: tuple[Ngram, float] | None = None
        weights = DECAY ** torch.arange(k)
        self.weights: Tensor
        self.register_buffer("weights", weights / weights.mean(), persistent=False)

    def refine(self, ngram: Ngram, alpha: float) -> None:
        """From now on, compare drafts that a bigram has rescored; not for training."""
        self._refinement = (ngram, alpha)

    # --- what the trainer asks of a pair --------------------------------------------------------------------------

    def groups(self, config: TrainConfig) -> list[tuple[nn.Module, float]]:
        """Modules and their peak learning rates."""
        return [(self.drafter, config.lr)]

    def draw(self, config: TrainConfig, batch: dict[str, Tensor], rng: random.Random) -> Tensor:
        """Where this step's blocks begin: int64 [B, A], -1 in rows without room for one."""
        first, last = self._room(batch)
        chosen = torch.tensor(
            [[rng.random() for _ in range(self.anchors)] for _ in first.tolist()], device=first.device
        )
        places = first[:, None] + (chosen * (last - first + 1)[:, None]).long().clamp(min=0)
        return torch.where((last >= first)[:, None], torch.minimum(places, last[:, None]), -1)

    def positions(self, batch: dict[str, Tensor]) -> int:
        """How many positions `forward` sums over."""
        first, last = self._room(batch)
        return int((last >= first).sum()) * self.anchors * self.k

    def forward(self, anchors: Tensor, **batch: Tensor) -> Tensor:
        """The weighted sum of the loss over all positions of all blocks, a scalar."""
        if batch["input_ids"].shape[1] <= self.k:  # no row has room for a block: nothing to learn, nothing to divide
            return sum(p.sum() for p in self.drafter.parameters() if p.requires_grad) * torch.zeros(())
        found = self.compare([self.loss], batch, anchors)[0] * self.weights
        return found[anchors >= 0].sum()

    @torch.no_grad()
    def measure(self, batches: Iterable[dict[str, Tensor]], k: int) -> dict[str, Any]:
        """Predicted acceptance on held-out batches, in the form of `acceptance.measure`.

        Raises SteeringError when no row is long enough for one block.
        """
        return predicted((self._chances(batch, k) for batch in batches), k)

    def _chances(self, batch: dict[str, Tensor], k: int) -> Chances:
        first, last = self._room(batch)
        length = batch["input_ids"].shape[1]
        sums, count = torch.zeros(2, k, dtype=torch.float64), 0
        placed = torch.zeros(k, 2, len(first), length, dtype=torch.float64)
        for start in range(int(first.min()), int(last.max()) + 1, MEASURED_AT_ONCE):
            place = torch.arange(start, min(start + MEASURED_AT_ONCE, length), device=first.device).expand(
                len(first), -1
            )
            anchors = torch.where((place >= first[:, None]) & (place <= last[:, None]), place, -1)
            found = self.compare([overlap, agreement], batch, anchors).double().cpu()
            anchors = anchors.cpu()
            rows, blocks_of = (anchors >= 0).nonzero(as_tuple=True)
            at = anchors[rows, blocks_of]
            for j in range(k):
                placed[j, :, rows, at + j] = found[:, rows, blocks_of, j]
            sums += found[:, rows, blocks_of].sum(1)
            count += len(at)
        return Chances(sums, count, placed, batch)

    # --------------------------------------------------------------------------------------------------------------

    def compare(self, functions: Sequence[Distance], batch: dict[str, Tensor], anchors: Tensor) -> Tensor:
        """Each function of (target logits, drafter logits) at every draft: float32 [len(functions), B, A, k]; of no
        meaning where an anchor is -1."""
        target, ids, k = self._target[0], batch["input_ids"], self.k
        kind = next(self.drafter.parameters()).dtype
        embed = lambda tokens: target.get_input_embeddings()(tokens).to(kind)  # noqa: E731
        places = anchors.clamp(min=1).minimum(torch.tensor(ids.shape[1] - k, device=ids.device))
        at = (places[..., None] + torch.arange(k, device=ids.device)).flatten(1)
        final = batch["final"]
        wanted = final.gather(1, at[..., None].expand(-1, -1, final.shape[-1])).unflatten(1, (-1, k))
        previous = ids.gather(1, at).unflatten(1, (-1, k))
        states = batch["states"].to(kind) if "states" in batch else final
        hidden = self.drafter.hidden(embed, ids.gather(1, places), states, final.to(kind), places, k)
        got = self.drafter.corrected(hidden, embed, previous)
        if self._refinement is not None:
            # The tokens before go with the states: float32 holds every whole number a vocabulary has.
            got = torch.cat([got.float(), previous[..., None].float()], -1)
        head, found = Head(target), []
        apart = k if self.drafter.readouts > 1 else 1  # all drafts at once where one head reads them out
        for step, (w, g) in enumerate(zip(wanted.tensor_split(apart, 2), got.tensor_split(apart, 2), strict=True)):
            own = self.drafter.head(head, step)
            if self._refinement is not None:
                own = _Refined(own, *self._refinement)
            found.append(by_position(functions, head, own, w.flatten(0, 2), g.flatten(0, 2), target.config.vocab_size))
        return torch.cat([each.view(len(functions), *anchors.shape, -1) for each in found], -1)

    def _room(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The first and the last place of each row, int64 [B], where a block can begin; last < first: none."""
        return batch["prompt_lengths"].clamp(min=1), batch["attention_mask"].sum(1) - self.k


@dataclass(frozen=True)
class _Refined:
    """A read-out of states [N, H + 1], whose last column is the token before: rescored logits [N, V]."""

    head: Callable[[Tensor], Tensor]
    ngram: Ngram
    alpha: float

    def __call__(self, given: Tensor) -> Tensor:
        return rescored(self.head(given[:, :-1]), given[:, -1].long(), self.ngram, self.alpha)
