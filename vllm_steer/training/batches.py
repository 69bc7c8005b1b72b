"""What a training run reads: the rows of its data files, and batches with the target's states."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import difference, fingerprint
from vllm_steer.data.dataset import Row, collate, read_file, without_prompts
from vllm_steer.data.response_file import meta_path
from vllm_steer.data.split import split_of_run, split_rows
from vllm_steer.drafters.models import read_model_config, text_config
from vllm_steer.training.cache import StateCache
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.pair import read_target, read_trunk, trunk_fits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def read_data(config: TrainConfig, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    """Training rows of all files and held-out rows of the first, whose prompts no other file trains on.

    A run that is resumed holds out what it did when it began. Rows are numbered in the order they were read.
    Raises SteeringError for unreadable data, or data that another model than this target or drafter wrote.
    """
    identity = None
    for path in config.data:
        written_by = _writer(path)
        if written_by is not None:
            identity = identity or {fingerprint(name): name for name in config.writers}
            if all(what := [difference(written_by["fingerprint"], mine) for mine in identity]):
                raise SteeringError(
                    f"{path} was written by another model ({written_by['name']}) than the target {config.target} or "
                    f"the drafter {config.drafter}: {what[0]} from the target's; generate responses with one of these, "
                    "or give that target"
                )
    limits = model_limits(*config.writers) | {"model": config.log_model or config.target}
    (first, left_out), *others = (
        read_file(path, tokenizer, config.max_length, config.template_options, **limits) for path in config.data
    )
    try:
        if config.resume:
            rows, held_out = split_of_run(first, Path(config.output) / "checkpoints")
        else:
            rows, held_out = split_rows(first)
    except SteeringError as error:
        raise SteeringError(f"{config.data[0]}: {error}" + (f" ({left_out})" if left_out else "")) from None
    read = len(first)
    for path, (more, _) in zip(config.data[1:], others, strict=True):
        more = [dataclasses.replace(row, number=read + row.number) for row in more]
        read += len(more)
        kept = without_prompts(more, held_out)
        if taken := len(more) - len(kept):
            logger.warning("%s: %d of %d rows left out: their prompts are held out", path, taken, len(more))
        rows += kept
    return rows, held_out


def model_limits(*models: str) -> dict[str, Any]:
    """`positions` and `embeddings` for `read_file`: the smallest of the models' values; None if no model states one."""
    found: dict[str, list[tuple[int, str]]] = {"max_position_embeddings": [], "vocab_size": []}
    for name in models:
        config = text_config(read_model_config(name))
        for key, values in found.items():
            if isinstance(count := getattr(config, key, None), int) and count > 0:
                values.append((count, name))
    positions, embeddings = (min(values, default=None) for values in found.values())
    return {"positions": positions, "embeddings": embeddings and embeddings[0]}


def _writer(path: str) -> dict[str, str] | None:
    """Name and fingerprint of the model that wrote a data file, if `vllm-steer generate` made it."""
    meta = meta_path(path)
    if not meta.exists():
        return None
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
        if not found["complete"]:
            logger.warning("%s is not complete: `vllm-steer generate --resume` finishes it", path)
        return found["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise SteeringError(f"{meta} is damaged ({error}): generate the responses again") from None


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[B, T, ...] with zeros up to `length` tokens; [B] as it is."""
    if tensor.ndim == 1:
        return tensor
    room = (0, 0) * (tensor.ndim - 2) + (0, length - tensor.shape[1])
    return torch.nn.functional.pad(tensor, room)


class Batches:
    """Batches by row number: ids, prompt lengths, and from the cache or the live target its states."""

    def __init__(
        self,
        config: TrainConfig,
        target: PreTrainedModel,
        rows: list[Row],
        layers: tuple[int, ...],
        arguments: Any,
        trunk: tuple[PreTrainedModel, int] | None = None,
    ):
        """`layers`: whose inputs are the states; `trunk`: a drafter and its first layer that is not frozen, whose input
        is cached too if the drafter can start there."""
        self.target, self.rows, self.layers = target, rows, layers
        self.device, self.first_layer, self.cache = arguments.device, 0, None
        if config.cache is None:
            return
        hidden = text_config(target.config).hidden_size
        widths = ({"states": len(layers) * hidden} if layers else {}) | {"final": hidden}
        # Without the tokenizer: the rows' token ids are compared themselves.
        made_from: dict[str, object] = {
            "target": fingerprint(config.target, tokenizer=False),
            "layers": self.layers,
            "precision": config.precision,
        }
        if trunk is not None and trunk[1]:
            drafter, first = trunk
            if trunk_fits(drafter, first, self._to_device(collate(rows[:1]))):
                self.first_layer = first
                widths["trunk"] = text_config(drafter.config).hidden_size
                made_from |= {"drafter": fingerprint(str(config.drafter), tokenizer=False), "first_layer": first}
            else:
                logger.info("a %s drafter cannot start at an upper layer: only the target's states are cached",
                            drafter.config.model_type)  # fmt: skip

        def read(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            batch = self._to_device(batch)
            found = read_target(target, batch, self.layers)
            return (
                found | {"trunk": read_trunk(trunk[0], batch, self.first_layer)}
                if trunk and self.first_layer
                else found
            )

        # The first process of the whole job fills it. The others then find it whole or, on machines that have a disk of
        # their own, fill theirs one after the other.
        with arguments.main_process_first(local=False, desc="caching states"):
            self.cache = StateCache(config.cache, rows, widths, made_from)
            self.cache.fill(read, config.batch_size)

    def reading(self, layers: tuple[int, ...]) -> Batches:
        """These batches for a reader of other target layers, which are read anew; itself for one of the same."""
        if layers == self.layers:
            return self
        other = copy.copy(self)
        other.layers, other.cache = layers, None
        return other

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """What the data loader makes, on the CPU."""
        return self.cache.batch(indices) if self.cache else collate([self.rows[i] for i in indices])

    def complete(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the target's states and last hidden states, on the device."""
        return batch if "final" in batch else batch | read_target(self.target, batch, self.layers)

    def replace(self, batch: dict[str, Tensor], rows: list[Row]) -> dict[str, Tensor]:
        """A batch whose last rows are replaced by these, complete with the target's states, which are read anew."""
        kept = {name: tensor[: len(tensor) - len(rows)] for name, tensor in batch.items()}
        fresh = self.complete(self._to_device(collate(rows)))
        if not len(kept["input_ids"]):
            return fresh
        kept = self.complete(kept)
        longest = max(part["input_ids"].shape[1] for part in (kept, fresh))
        return {name: torch.cat([_padded(part[name], longest) for part in (kept, fresh)]) for name in fresh}

    def held(self, indices: list[int], size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of at most `size` of these rows, complete with the target's states."""
        for start in range(0, len(indices), size):
            yield self.complete(self._to_device(self.collate(indices[start : start + size])))

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}
