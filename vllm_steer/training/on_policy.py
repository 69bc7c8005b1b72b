"""Rows that the drafter writes anew while it changes (DistillSpec, arXiv 2310.08461, section 3: on-policy data).

Every `--renew` steps the drafter answers training prompts as it is then. A steered drafter writes in blocks of k, each
under the guide of the target's state before it, as when serving; all k drafts are kept. What is written is seeded by
the step, so a run that is resumed there writes the same.

Shape legend: R rows, P prompt tokens (padded on the left), V vocabulary, H target hidden size.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import Row
from vllm_steer.decoding.chain import _Cached
from vllm_steer.drafters.models import text_config
from vllm_steer.training.batches import Batches
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.pair import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Draw = Callable[[Tensor], Tensor]  # logits [R, V] -> tokens [R]
AT_ONCE = 32  # rows that are written together


@dataclass
class Writer:
    """Replaces a share of every batch by rows that the drafter has written within the last `renew` steps."""

    pair: Pair
    source: Batches
    prompts: list[Row]  # what may be answered anew
    fraction: float
    renew: int
    rows: int  # written for each step, as many as its full batches take
    k: int
    seed: int
    eos: frozenset[int]
    rank: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _pool: list[Row] = field(default_factory=list)
    _of: int = -1  # the step that the pool is of

    def __post_init__(self) -> None:
        self.prompts = [row for row in self.prompts if row.prompt_length]
        if not self.prompts:
            raise SteeringError("--on-policy needs rows with a prompt, the data has none: give prompts and responses")

    def replace(self, batches: Sequence[dict[str, Tensor]], step: int) -> list[dict[str, Tensor]]:
        """The batches of one optimiser step, the last rows of each written by the drafter, with the target's states."""
        sizes = [len(batch["input_ids"]) for batch in batches]
        counts = [round(self.fraction * size) for size in sizes]
        first = step - step % self.renew
        if self._of != first:  # enough for full batches, also where the window begins with the short one of an epoch
            self._write(first, self.renew * self.rows)
        rng = random.Random(f"{self.seed}:{step}:{self.rank}:take")
        return [
            self.source.replace(batch, rng.sample(self._pool, min(n, len(self._pool)))) if n else batch
            for batch, n in zip(batches, counts, strict=True)
        ]

    def _write(self, step: int, count: int) -> None:
        start, rng = time.perf_counter(), random.Random(f"{self.seed}:{step}:{self.rank}")
        rows = rng.choices(self.prompts, k=count)
        generator = torch.Generator(self.source.device).manual_seed(rng.getrandbits(63))
        draw = lambda logits: torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]  # noqa: E731
        training, self._pool, self._of = self.pair.training, [], step
        self.pair.eval()
        for first in range(0, count, AT_ONCE):
            target, layers = self.source.target, self.source.layers
            self._pool += answers(self.pair, target, layers, rows[first : first + AT_ONCE], self.k, self.eos, draw)
        self.pair.train(training)
        tokens, seconds = sum(len(r.ids) - r.prompt_length for r in self._pool), time.perf_counter() - start
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        log.info("step %d: the drafter wrote %d rows, %d tokens, in %.1f s", step, count, tokens, seconds)

    def report(self, seconds: float) -> dict[str, Any]:
        """For acceptance.json, of a training that took so long: what was written, and which share of the time."""
        share = self.seconds / seconds if seconds else 0.0
        return {"fraction": self.fraction, "renew": self.renew, "tokens": self.tokens, "share_of_time": share}


@torch.no_grad()
def answers(
    pair: Pair,
    target: PreTrainedModel,
    layers: Sequence[int],
    rows: Sequence[Row],
    k: int,
    eos: frozenset[int],
    draw: Draw,
) -> list[Row]:
    """The rows' prompts with answers by the drafter, none longer than the row's own; an end-of-sequence token ends one.

    Args:
        layers: ids of the target layers whose inputs steer the drafter.
        k: drafts under one guide.
        draw: chooses the tokens.
    """
    device, width = pair.drafter.device, max(row.prompt_length for row in rows)
    text = torch.tensor([[0] * (width - r.prompt_length) + list(r.prompt) for r in rows], device=device)
    mask = torch.arange(width, device=device) >= torch.tensor([[width - r.prompt_length] for r in rows], device=device)
    most = max(len(row.ids) - row.prompt_length for row in rows)
    reader = _Cached(target, mask) if pair.steering is not None else None
    drafter = _Cached(pair.drafter, mask)
    vocabulary = min(text_config(model.config).vocab_size for model in (target, pair.drafter))
    with _under(pair, None):  # a prompt is never steered
        logits, states = drafter.feed_rows(text, 0, keep=1)
    if reader is not None:  # when serving, the target says the first token
        logits, states = reader.feed_rows(text, 0, keep=1, states=layers)
    text = torch.cat([text, draw(logits[:, -1, :vocabulary])[:, None]], 1)
    window = newest = width
    while text.shape[1] - width < most and not _all_ended(text[:, width:], eos):
        with _under(pair, states):
            feed, start = text[:, window:], window
            for _ in range(k):
                logits, _ = drafter.feed_rows(feed, start, keep=1)
                start, feed = start + feed.shape[1], draw(logits[:, -1, :vocabulary])[:, None]
                text = torch.cat([text, feed], 1)
        if reader is not None:
            _, states = reader.feed_rows(text[:, newest:-1], newest, keep=1, states=layers)
        window, newest = newest if reader is not None else newest + k, newest + k
    return [_row(row, text[i, width:].tolist(), eos) for i, row in enumerate(rows)]


def _under(pair: Pair, states: Tensor | None) -> Any:
    """The context in which the drafter's rows are steered by states [R, 1, 3H]; None: they are not."""
    if pair.steering is None or pair.injector is None:
        return nullcontext()
    if states is None:
        return pair.injector.using(None)
    return pair.injector.using(pair.steering(states.to(pair.steering.fuse.weight.dtype)))


def _all_ended(written: Tensor, eos: frozenset[int]) -> bool:
    ends = torch.isin(written, torch.tensor(sorted(eos), device=written.device))
    return bool(ends.any(-1).all())


def _row(row: Row, written: list[int], eos: frozenset[int]) -> Row:
    written = written[: len(row.ids) - row.prompt_length]
    end = next((i + 1 for i, token in enumerate(written) if token in eos), len(written))
    return Row((*row.prompt, *written[:end]), row.prompt_length, row.category, row.number)


def writer(
    config: TrainConfig, pair: Pair, source: Batches, rows: list[Row], tokenizer: Any, generation: Any
) -> Writer | None:
    """Who writes rows anew during a run, None for nobody; `generation` is the target's generation_config."""
    if not config.on_policy:
        return None
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    eos, rank = frozenset({tokenizer.eos_token_id, *ends} - {None}), int(os.environ.get("RANK", 0))
    written = round(config.on_policy * config.batch_size) * config.accumulate
    return Writer(pair, source, rows, config.on_policy, config.renew, written, config.k, config.seed, eos, rank)
