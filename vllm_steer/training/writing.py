"""Writes the result of a training run; whether that will work is tried before the first step."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import write_json
from vllm_steer.drafters.block import checkpoint as block_checkpoint
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.training.block_pair import BlockPair
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.pair import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"


def rehearse(config: TrainConfig, pair: Pair, tokenizer: Any, stored: torch.dtype) -> None:
    """Find out before training whether the result can be written.

    Raises SteeringError for an output that cannot be written, a disk that is too small, and a model or tokenizer that
    transformers does not save.
    """

    def attempt(scratch: str) -> None:
        if config.mode != "steer":
            pair.drafter.config.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            _original_generation_config(str(config.drafter))

    _rehearse(Path(config.output), attempt, pair, sum(map(torch.numel, pair.written())), stored)


def rehearse_block(config: TrainConfig, pair: BlockPair, stored: torch.dtype) -> None:
    """`rehearse` of a block drafter."""
    _rehearse(Path(config.output), lambda scratch: None, pair, sum(map(torch.numel, pair.parameters())), stored)


def _rehearse(output: Path, attempt: Callable[[str], None], pair: nn.Module, written: int, stored: torch.dtype) -> None:
    there = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=output) as scratch:
            attempt(scratch)
        _require_room(output, pair, written, stored)
    except Exception as error:  # transformers raises many unrelated types
        if not there:
            shutil.rmtree(output, ignore_errors=True)
        if isinstance(error, SteeringError):
            raise
        raise SteeringError(
            f"the result could not be written to {output} ({type(error).__name__}: {error}): mend that first, the "
            "training has not begun"
        ) from error


def _require_room(output: Path, pair: nn.Module, written: int, stored: torch.dtype) -> None:
    trained = sum(p.numel() for p in pair.parameters() if p.requires_grad)
    state = 3 * 4 * trained  # of one checkpoint: float32 weights and Adam's two moments
    result = written * stored.itemsize
    free = shutil.disk_usage(output).free
    if free < state + result:
        raise SteeringError(
            f"{output} has {free / 1e9:.1f} GB free, one checkpoint and the result take {(state + result) / 1e9:.1f}: "
            "make room, or give an --output elsewhere"
        )
    if free < 3 * state + result:  # --keep best may hold a third one
        log.warning(
            "%s has %.1f GB free, checkpoints and result take %.1f", output, free / 1e9, (3 * state + result) / 1e9
        )


@torch.no_grad()
def round_weights(pair: nn.Module, dtype: torch.dtype) -> None:
    """Round what trained to the dtype it is stored in, so that what is measured is what is served."""
    for parameter in pair.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


def write(config: TrainConfig, pair: Pair, tokenizer: Any, settings: SteeringConfig, dtype: torch.dtype) -> None:
    """Write the steering, the drafter or both to `config.output`; `settings` has provenance and acceptance."""
    output = Path(config.output)
    pair.detach()
    if pair.steering is not None:  # first: a full disk must not leave a joint drafter without its steering
        pair.steering.config = settings
        checkpoint.save(output, pair.steering.to(dtype))
    if config.mode != "steer":
        pair.drafter.to(dtype=dtype)  # type: ignore[call-arg]  # in place, as its wrapper does not say
        _write_drafter(str(config.drafter), pair.drafter, output)
        tokenizer.save_pretrained(output)
        for path in output.iterdir():  # safetensors writes for the owner alone; servers run as somebody else
            if path.is_file():
                path.chmod(0o644)
    if pair.steering is None:
        write_json(output / "training.json", {"provenance": settings.provenance, "acceptance": settings.acceptance})
    if config.mode == "joint":
        checkpoint.mark(output)
    write_json(output / "acceptance.json", settings.acceptance)


def write_block(config: TrainConfig, drafter: BlockDrafter, record: block_checkpoint.Record) -> None:
    """Write a block drafter to `config.output`."""
    output = Path(config.output)
    block_checkpoint.save(output, drafter, record)
    write_json(output / "acceptance.json", record.acceptance)


def _write_drafter(source: str, drafter: PreTrainedModel, output: Path) -> None:
    """Save the model with the generation config of its source, byte for byte.

    transformers refuses to save some that it loads: sampling values without do_sample, as Vicuna and Llama 2 have them.
    """
    from transformers import GenerationConfig

    drafter.generation_config = GenerationConfig()
    drafter.save_pretrained(output)
    (output / GENERATION).unlink(missing_ok=True)
    if (original := _original_generation_config(source)) is not None:
        shutil.copyfile(original, output / GENERATION)


def _original_generation_config(source: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        source, GENERATION, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None


def set_steering_aside(config: TrainConfig, drafter: PreTrainedModel) -> None:
    """Prepare a drafter that is itself a steered checkpoint: its steering is replaced or dropped by this run.

    Raises SteeringError in mode steer: an adapter for it could not be served, the drafter carries its own steering.
    """
    if not (hasattr(drafter.config, checkpoint.MARKER) or checkpoint.has_steering(str(config.drafter))):
        return
    if config.mode == "steer":
        raise SteeringError(
            f"--drafter {config.drafter} is a steered checkpoint, and --mode steer makes an adapter, which needs a "
            "plain drafter: give the drafter it was made from, or use --mode joint"
        )
    if hasattr(drafter.config, checkpoint.MARKER):
        delattr(drafter.config, checkpoint.MARKER)
    what = (
        "is not trained further, a new one is"
        if config.mode == "joint"
        else "is left out: the result is a plain drafter"
    )
    log.warning("%s is a steered checkpoint; its steering %s", config.drafter, what)
