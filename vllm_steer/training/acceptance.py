"""Predicted acceptance: how much of a drafter's text a target would accept, teacher forced, without an engine.

Shape legend: B rows, T tokens, k draft length.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import collate, read_rows
from vllm_steer.drafters.models import load_models, text_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import default_target_layers
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.training.losses import agreement, overlap, rejection
from vllm_steer.training.pair import Pair, place_sources, read_target, response_mask


@torch.no_grad()
def measure(pair: Pair, batches: Iterable[dict[str, Tensor]], k: int) -> dict[str, Any]:
    """Predicted acceptance on held-out batches that hold the target's `states` and `final`.

    `overlap` is, per offset, the mean of sum min(p, q), what sampling at temperature 1 accepts; `agreement` is how
    often both choose the same token. `acceptance_length` (tokens per block, the target's own included) walks blocks
    over the rows (`walk`). Texts are teacher forced, and every response position is steered from d back rather than
    from its own block's guide: this predicts serving of texts like these and does not replay it.

    Raises SteeringError when no row is long enough for one block.
    """
    return predicted((chances(pair, batch, k) for batch in batches), k)


@torch.no_grad()
def chances(pair: Pair, batch: dict[str, Tensor], k: int) -> Chances:
    """Of the drafts of one batch, for `predicted`."""
    device = next(pair.parameters()).device
    batch = {name: x.to(device) for name, x in batch.items()}
    mask = response_mask(batch).cpu()
    found = []
    for d in range(1, k + 1 if pair.steering is not None else 2):
        source = fixed_sources(batch["prompt_lengths"], batch["attention_mask"].shape[1], d)
        found.append(pair.compare([overlap, agreement], batch, source).double().cpu())
    both = torch.stack((found * k)[:k])  # without steering the same at every offset
    placed = torch.zeros(k, 2, *mask.shape, dtype=torch.float64)
    placed[:, :, mask] = both
    return Chances(both.sum(-1).T, int(mask.sum()), placed, batch)


class Chances(NamedTuple):
    """Overlap and agreement of one batch's drafts."""

    sums: Tensor  # float64 [2, k], by offset
    positions: int  # how many each sum is of
    placed: Tensor  # float64 [k, 2, B, T], for `walk`
    batch: dict[str, Tensor]


def predicted(parts: Iterable[Chances], k: int) -> dict[str, Any]:
    """What `measure` returns, from every batch. Raises SteeringError when no row is long enough for one block."""
    sums, count = torch.zeros(2, k, dtype=torch.float64), 0
    tokens, blocks = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part in parts:
        sums, count = sums + part.sums, count + part.positions
        lengths = part.batch["prompt_lengths"].tolist(), part.batch["attention_mask"].sum(1).tolist()
        for name in range(2):
            more = walk(part.placed[:, name], *lengths)
            tokens[name], blocks[name] = tokens[name] + more[0], blocks[name] + more[1]
    if not blocks.all():
        raise SteeringError(f"no held-out response has {k} tokens, which a block of k={k} takes: give longer ones")
    overlaps, agreements = ([round(x, 4) for x in row] for row in (sums / count).tolist())
    sampled, greedily = (tokens / blocks).tolist()
    return {
        "overlap": overlaps,
        "agreement": agreements,
        "acceptance_length": {"sampled": round(sampled, 3), "greedy": round(greedily, 3)},
        "positions": count,
    }


def walk(chances: Tensor, prompt_lengths: list[int], lengths: list[int]) -> tuple[float, float]:
    """Expected tokens and blocks when rows are served block by block, whole blocks only.

    A block whose newest token is at n drafts from positions n..n+k-1 and ends at its first rejection; the next begins
    after the token the target then adds. So a stretch that is hard to draft weighs as many blocks as it takes.

    Args:
        chances: float64 [k, B, T], [d - 1, b, p] = the probability that the draft made at position p, d after its
            guide's state, is accepted; 0 or 1 for greedy drafts.
    """
    k, tokens, blocks = len(chances), 0.0, 0.0
    for row, (first, end) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        table = chances[:, row].tolist()
        begins = [0.0] * (end + 1)  # probability that a block's newest token is here
        begins[min(first, end)] = 1.0
        for n in range(first, end - k + 1):
            blocks += begins[n]
            reached = begins[n]
            for d in range(k):
                tokens += reached  # the token of this depth: an accepted draft or the target's own after a rejection
                accepted = reached * table[d][n + d]
                begins[n + d + 1] += reached - accepted
                reached = accepted
            tokens += reached  # the bonus
            if n + k + 1 <= end:
                begins[n + k + 1] += reached
    return tokens, blocks


def fixed_sources(prompt_lengths: Tensor, length: int, distance: int) -> Tensor:
    """`guide_sources` with every state `distance` positions back."""
    position = torch.arange(length, device=prompt_lengths.device)
    return place_sources(position, torch.full_like(prompt_lengths[:, None], distance), prompt_lengths)


def measure_directory(
    target: str | Path, drafter: str | Path, steering: str | Path, data: str | Path, k: int
) -> dict[str, Any]:
    """`measure` a saved drafter on every row of a data file; unsteered if `steering` has no steering/ folder."""
    tokenizer = load_tokenizer(str(target), str(drafter))
    big, small, _ = load_models(str(target), str(drafter), torch.float32)
    module = None
    layers: tuple[int, ...] = default_target_layers(big.config.num_hidden_layers)
    if checkpoint.has_steering(steering):
        module = checkpoint.load_for(steering, big.config, small.config)
        layers = module.config.target_layer_ids
    lengths = [getattr(text_config(m.config), "max_position_embeddings", None) for m in (big, small)]
    rows = read_rows(data, tokenizer, min((n for n in lengths if n), default=sys.maxsize))
    batches = (collate(rows[i : i + 8]) for i in range(0, len(rows), 8))
    return measure(Pair(small, module, big, rejection).eval(), (b | read_target(big, b, layers) for b in batches), k)
