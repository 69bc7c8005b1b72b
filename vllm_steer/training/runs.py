"""What a training run trains, and how its result is written: a draft model with its steering, or a block drafter."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import fingerprint
from vllm_steer.common.options import flag
from vllm_steer.common.provenance import public_name
from vllm_steer.data.dataset import Row
from vllm_steer.drafters.block import checkpoint as block_checkpoint
from vllm_steer.drafters.block.config import APPROXIMATION, KINDS, WRITTEN_AS, BlockConfig, is_block_drafter
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.drafters.models import load_model, load_models, text_config
from vllm_steer.drafters.steered.config import SteeringConfig, default_target_layers
from vllm_steer.drafters.steered.hf import decoder_layers
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.training import writing
from vllm_steer.training.batches import Batches
from vllm_steer.training.block_pair import BlockPair
from vllm_steer.training.config import PRECISIONS, STEERED, TrainConfig
from vllm_steer.training.losses import LOSSES
from vllm_steer.training.new_block import new_config, start_from_target
from vllm_steer.training.pair import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A pair to train, what it reads, and what becomes of it."""

    pair: Pair | BlockPair
    source: Batches
    stored: torch.dtype  # of the weights as they are written
    rehearse: Callable[[], None]  # finds out whether the result can be written
    write: Callable[[dict[str, Any], dict[str, Any]], None]  # with provenance and acceptance
    target: PreTrainedModel


def prepare(config: TrainConfig, tokenizer: Any, rows: list[Row], arguments: Any) -> Run:
    """Load the models of a run. Raises SteeringError for models that do not fit each other."""
    return (_steered if config.kind == STEERED else _block)(config, tokenizer, rows, arguments)


def _steered(config: TrainConfig, tokenizer: Any, rows: list[Row], arguments: Any) -> Run:
    assert config.drafter is not None
    target, drafter, stored = load_models(config.target, config.drafter, PRECISIONS[config.precision])
    writing.set_steering_aside(config, drafter)
    settings = SteeringConfig.for_models(
        target.config,
        drafter.config,
        names=(public_name(config.target), public_name(config.drafter)),
        target_layer_ids=config.target_layers,
        steered_layers=config.steered_layers,
        rank=config.rank,
        draft_length=config.k,
    )
    changed = _set_trained(config, drafter)
    target.to(arguments.device)
    drafter.to(arguments.device)
    first = min(changed if config.mode == "distill" else [*changed, *settings.steered_layers])
    # What the drafter writes itself is not in a cache: it is read by the whole of it.
    trunk = (drafter, first) if first and not config.on_policy else None
    source = Batches(config, target, rows, settings.target_layer_ids, arguments, trunk)
    steering = None if config.mode == "distill" else Steering(settings)
    pair = Pair(drafter, steering, target, LOSSES[config.loss], source.first_layer).to(arguments.device)

    def write(provenance: dict[str, Any], acceptance: dict[str, Any]) -> None:
        final = dataclasses.replace(settings, provenance=provenance, acceptance=acceptance)
        writing.write(config, pair, tokenizer, final, stored)

    return Run(pair, source, stored, lambda: writing.rehearse(config, pair, tokenizer, stored), write, target)


def _set_trained(config: TrainConfig, drafter: PreTrainedModel) -> list[int]:
    """Freeze what of the drafter does not train; the layers that do, 0 among them if the embedding does.

    Raises SteeringError for `trained_layers` that it does not have.
    """
    layers = decoder_layers(drafter)
    chosen = config.trained_layers
    drafter.requires_grad_(config.mode != "steer" and chosen is None)
    if config.mode == "steer":
        return []
    if chosen is None:
        return [0]
    if wrong := sorted({i for i in chosen if not 0 <= i < len(layers)}):
        raise SteeringError(f"--trained-layers has {wrong[0]}, {config.drafter} has layers 0 to {len(layers) - 1}")
    for i in chosen:
        layers[i].requires_grad_(True)
    return sorted(set(chosen))


def _block(config: TrainConfig, tokenizer: Any, rows: list[Row], arguments: Any) -> Run:
    target = load_model(config.target, "auto")
    stored = target.dtype
    target.to(dtype=PRECISIONS[config.precision]).requires_grad_(False).eval()  # type: ignore[call-arg]  # as it is
    drafter = _block_drafter(config, tokenizer, target)
    target.to(arguments.device)
    source = Batches(config, target, rows, drafter.config.states, arguments)
    pair = BlockPair(drafter, target, LOSSES[config.loss], config.k, config.anchors).to(arguments.device)
    record = block_checkpoint.Record(public_name(config.target), fingerprint(config.target))

    def write(provenance: dict[str, Any], acceptance: dict[str, Any]) -> None:
        final = dataclasses.replace(record, provenance=provenance, acceptance=acceptance)
        writing.write_block(config, drafter.to(stored), final)

    return Run(pair, source, stored, lambda: writing.rehearse_block(config, pair, stored), write, target)


def _block_drafter(config: TrainConfig, tokenizer: Any, target: PreTrainedModel) -> BlockDrafter:
    """The drafter to train, with `requires_grad` where it is trained."""
    if config.drafter is None:
        layers = config.target_layers or default_target_layers(text_config(target.config).num_hidden_layers)
        drafter = BlockDrafter(new_config(config, tokenizer, text_config(target.config), layers))
        start_from_target(drafter, target)
    else:
        base = block_checkpoint.load_for(config.drafter, config.target)
        _require_its_own(config, base.config)
        drafter = _as_kind(config, base)
    drafter.requires_grad_(not config.freeze_base)
    if config.kind == "medusa":
        if drafter.readouts != 1:
            raise SteeringError(
                f"{config.drafter} has a read-out per head: vllm-steer trains heads that share the target's"
            )
        drafter.lm_heads.requires_grad_(False)
    elif drafter.ar_approximation is not None:
        drafter.ar_approximation.requires_grad_(True)
    return drafter


def _require_its_own(config: TrainConfig, base: BlockConfig) -> None:
    """Raise SteeringError for an option that contradicts the drafter to go on with."""
    asked: dict[str, tuple[Any, Any]] = {}
    if config.layers != 1:  # the default, of a new drafter
        asked["layers"] = (config.layers, base.layers)
    if config.target_layers is not None:
        asked["target_layers"] = (tuple(config.target_layers), base.states)
    if base.kind == "medusa" or config.k > base.draft_length:
        asked["k"] = (config.k, base.draft_length)
    for name, (given, its) in asked.items():
        if given != its:
            value = " ".join(map(str, its)) if isinstance(its, tuple) else its
            raise SteeringError(
                f"{flag(name)} is {given}, --drafter {config.drafter} has {its}: give {flag(name)} {value}"
            )


def _as_kind(config: TrainConfig, base: BlockDrafter) -> BlockDrafter:
    """The drafter to go on with: `base`, or TreeFlash's form of DFlash layers, with blocks of `config.k` drafts."""
    kinds, raw = (base.config.kind, config.kind), dict(base.config.raw)
    if kinds != ("dflash", "treeflash") and kinds[0] != kinds[1]:
        raise SteeringError(f"--drafter {config.drafter} is a {kinds[0]} drafter, --kind is {config.kind}")
    if kinds[1] == "medusa":
        return base
    if config.k < base.config.draft_length:
        log.info("blocks of %d drafts: %s had %d", config.k, config.drafter, base.config.draft_length)
        raw["block_size"] = config.k + 1
    if kinds[0] != kinds[1]:
        raw |= {
            "architectures": [WRITTEN_AS["treeflash"]],
            "treeflash_config": {"ar_approximation": APPROXIMATION},
        }
    drafter = BlockDrafter(BlockConfig.of(raw, base.config.where))
    drafter.load_state_dict(base.state_dict(), strict=kinds[0] == kinds[1])
    return drafter


def control(config: TrainConfig, made: Run) -> tuple[Pair | BlockPair, Batches]:
    """The pair of `config.control`, and what it reads: a block drafter has target layers of its own."""
    assert config.control is not None
    target, loss = made.target, LOSSES[config.loss]
    if is_block_drafter(config.control):
        drafter = block_checkpoint.load_for(config.control, config.target)
        return BlockPair(drafter, target, loss, config.k, config.anchors), made.source.reading(drafter.config.states)
    load_tokenizer(config.target, config.control)
    return Pair(load_model(config.control, torch.float32), None, target, loss), made.source


def require_same_tokens(config: TrainConfig) -> Any:
    """The tokenizer of the models. Raises SteeringError where drafter and target encode texts in different ways."""
    return load_tokenizer(config.target, config.target if config.kind in KINDS else str(config.drafter))
