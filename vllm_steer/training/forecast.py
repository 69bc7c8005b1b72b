"""How fast a run will be and how long it will take, from a step that is timed and thrown away."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from vllm_steer.training.batches import Batches
from vllm_steer.training.block_pair import BlockPair
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.pair import Pair, choose_positions


def forecast(
    pair: Pair | BlockPair, source: Batches, rows: list[int], config: TrainConfig, last: Path | None, judging: float
) -> str:
    """A sentence with tokens per second and the time of the steps that are left. No weight and no random draw of the
    run changes.

    Args:
        rows: numbers of the training rows.
        last: the checkpoint that a resumed run goes on from, `checkpoint-STEP`.
        judging: seconds an evaluation on the held-out rows takes.
    """
    left = config.steps - (int(last.name.split("-")[1]) if last else 0)
    if left <= 0:
        return "no steps to make"
    some = rows[: config.batch_size]
    with torch.random.fork_rng():
        _step(pair, source, some, config)  # the first one also warms up
        begun = time.perf_counter()
        tokens = _step(pair, source, some, config) * config.accumulate
        seconds = (time.perf_counter() - begun) * config.accumulate
    total = left * seconds + left // config.save_every * judging
    writing = ", and besides what writing by the drafter takes" if config.on_policy else ""
    return (
        f"about {tokens / seconds:,.0f} tokens/s in each process: {left} steps and their evaluations take "
        f"{_duration(total)}{writing}"
    )


def _step(pair: Pair | BlockPair, source: Batches, rows: list[int], config: TrainConfig) -> int:
    """One forward and backward pass over these rows; returns the tokens that were read."""
    batch = next(source.held(rows, len(rows)))
    if config.positions < 1:
        batch = choose_positions(batch, config.positions, "forecast")
    with torch.autocast(source.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss = pair(pair.draw(config, batch, random.Random("forecast")), **batch)
    loss.backward()
    pair.zero_grad(set_to_none=True)
    return int(batch["attention_mask"].sum())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
