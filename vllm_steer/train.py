"""Train a steering, a drafter, or both (SD², arXiv 2511.09844, section 3) on `transformers.Trainer`.

The loss is taken at response positions only. The input at position t is steered with the guide at t - d, with one
random d in 1..k per batch: when serving, the newest token sits one position after the state that produced it, and the
drafts after it 2..k positions. Prompt positions are not steered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer import __version__, checkpoint
from vllm_steer.config import SteeringConfig, SteeringError, default_target_layers, drafter_shape, target_shape
from vllm_steer.data import Row, collate, read_rows, sha256, split_rows
from vllm_steer.drafter import attach
from vllm_steer.losses import LOSSES, agreement, overlap
from vllm_steer.steering import Steering

MODES = {"steer": "steering only, an adapter", "joint": "steering and drafter", "distill": "drafter only, the control"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _option(default: Any, text: str, **how: Any) -> Any:
    return field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the command line is made from these fields."""

    target: str = _option(dataclasses.MISSING, "target model: hub id or directory")
    drafter: str = _option(dataclasses.MISSING, "pretrained drafter with the same tokenizer: hub id or directory")
    data: str = _option(dataclasses.MISSING, "JSONL of prompts and the target's responses (see vllm_steer/data.py)")
    output: str = _option(
        dataclasses.MISSING, "directory to write: a drafter with steering/; mode steer: steering/ alone"
    )
    mode: str = _option(
        "joint", "what trains: " + "; ".join(f"{k} = {v}" for k, v in MODES.items()), choices=list(MODES)
    )
    loss: str = _option("kl", "distance between target and drafter at each position", choices=list(LOSSES))
    steps: int = _option(1000, "optimiser steps; 0 writes the starting point")
    batch_size: int = _option(8, "rows per step and device")
    lr: float = _option(1e-3, "peak learning rate of the steering")
    drafter_lr: float = _option(1e-5, "peak learning rate of the drafter")
    k: int = _option(5, "draft length to train for: offsets 1..k")
    rank: int | None = _option(
        None, "factor the projection through this many dimensions (default: full rank)", type=int
    )
    target_layers: tuple[int, ...] | None = _option(
        None,
        "three target layer ids, id i = input of layer i (default: 2, middle, third from the end)",
        nargs=3,
        type=int,
    )
    steered_layers: tuple[int, ...] | None = _option(
        None, "drafter layers to steer (default: all)", nargs="+", type=int
    )
    max_length: int = _option(1024, "tokens per row; longer rows are cut")
    precision: str = _option(
        "float32", "arithmetic of both forwards; weights train in float32", choices=list(PRECISIONS)
    )
    seed: int = _option(0, "order of the rows, offsets, new weights")
    save_every: int = _option(500, "steps between the checkpoints --resume starts from")
    resume: bool = _option(False, "go on from the last checkpoint in the output directory")

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("k", 1), ("max_length", 2), ("save_every", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise SteeringError(f"--{flag} is {getattr(self, name)}, allowed is {least} or more")
        for name, allowed in (("mode", MODES), ("loss", LOSSES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise SteeringError(f"--{name} is {getattr(self, name)!r}, allowed are {', '.join(allowed)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer train`."""
    for item in dataclasses.fields(TrainConfig):
        how = dict(item.metadata)
        if item.default is dataclasses.MISSING:
            how["required"] = True
        elif isinstance(item.default, bool):
            how["action"] = "store_true"
        else:
            how.setdefault("type", type(item.default))
            how["default"] = item.default
            how["help"] += "" if item.default is None else f" (default: {item.default})"
        parser.add_argument("--" + item.name.replace("_", "-"), **how)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer train`: train, then say what was written and what it accepts."""
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    values = {name: getattr(args, name) for name in names}
    values |= {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    config = TrainConfig(**values)
    acceptance = train(config)
    print(f"wrote {config.output}\n{json.dumps(acceptance, indent=2)}")


class Pair(nn.Module):
    """A drafter and its steering as one trainable module; `steering` is None when only the drafter trains."""

    def __init__(self, drafter: nn.Module, steering: Steering | None):
        super().__init__()
        self.drafter = drafter
        self.steering = steering
        self._injector = [attach(drafter, steering.config.steered_layers)] if steering is not None else []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, states: Tensor, prompt_lengths: Tensor, offset: int
    ) -> Tensor:
        """Drafter logits [B, T, V] for ids [B, T] under states [B, T, 3H], guides taken `offset` positions back."""
        context = nullcontext()
        if self.steering is not None:
            context = self._injector[0].using(offset_deltas(self.steering, states, prompt_lengths, offset))
        with context:
            return self.drafter(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What trains and nothing else: a resumable checkpoint need not carry frozen weights or tied copies."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if name in trained}

    def detach(self) -> None:
        """Take the wrappers off the drafter, so that it saves under its own names."""
        for injector in self._injector:
            injector.detach()


def offset_deltas(steering: Steering, states: Tensor, prompt_lengths: Tensor, offset: int) -> Tensor:
    """Deltas [B, T, L, F]: position t from the states at t - offset, zero in the prompt and where t < offset.

    Args:
        states: target states [B, T, 3H]. prompt_lengths: int64 [B]. offset: d, 1 or more.
    """
    length = states.shape[1]
    guides = nn.functional.pad(steering.guide(states), (0, 0, offset, 0))[:, :length]
    position = torch.arange(length, device=states.device)
    steered = (position >= prompt_lengths[:, None]) & (position >= offset)
    return steering.deltas(guides) * steered[..., None, None]


@torch.no_grad()
def read_target(target: nn.Module, batch: dict[str, Tensor], layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The target's states [B, T, 3H] float32 at three layers, and its logits [B, T, V]."""
    out = target(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.cat([out.hidden_states[i] for i in layers], dim=-1).float(), out.logits


def response_mask(batch: dict[str, Tensor]) -> Tensor:
    """Bool [B, T]: real tokens after the prompt, the positions a drafter is fed when serving."""
    position = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    return (position >= batch["prompt_lengths"][:, None]) & batch["attention_mask"].bool()


def step_offset(seed: int, step: int, k: int) -> int:
    """The offset of one step, in 1..k: a function of seed and step, so a resumed run draws the same."""
    return random.Random(f"{seed}:{step}").randint(1, k)


@torch.no_grad()
def measure(pair: Pair, target: nn.Module, rows: list[Row], layers: tuple[int, ...], k: int, batch_size: int) -> dict:
    """Predicted acceptance per offset on held-out rows.

    `overlap` is the mean of sum min(p, q), what sampling at temperature 1 accepts; `greedy` is how often both choose
    the same token. Every response position is steered with the pattern used in training (all guides `d` back, rather
    than one guide per block), so this predicts serving and does not replay it. `block_efficiency` (tokens per block,
    the target's own included) treats offsets as independent.
    """
    device = next(pair.parameters()).device
    sums, count = torch.zeros(2, k, dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch = {name: x.to(device) for name, x in collate(rows[start : start + batch_size]).items()}
        states, wanted = read_target(target, batch, layers)
        mask = response_mask(batch)
        count += int(mask.sum())
        for d in range(1, k + 1):
            logits = pair(**batch, states=states, offset=d)[mask]
            sums[0, d - 1] += overlap(wanted[mask], logits).sum().item()
            sums[1, d - 1] += agreement(wanted[mask], logits).sum().item()
    means = sums / count
    efficiency = (1 + means.cumprod(dim=1).sum(dim=1)).tolist()
    overlaps, greedy = ([round(x, 4) for x in row] for row in means.tolist())
    return {
        "overlap": overlaps,
        "greedy": greedy,
        "block_efficiency": {"sampled": round(efficiency[0], 3), "greedy": round(efficiency[1], 3)},
        "positions": count,
    }


def train(config: TrainConfig) -> dict[str, Any]:
    """Run one training and write `config.output`; returns the measured acceptance, also stored in the checkpoint.

    Raises SteeringError for a pair that does not fit, unreadable data, an output that exists, or a loss that is not
    finite.
    """
    output = Path(config.output)
    saved = sorted((output / "checkpoints").glob("checkpoint-*"))
    if config.resume and not saved:
        raise SteeringError(f"{output} has no checkpoint to resume from: start without --resume")
    if not config.resume and output.exists() and any(output.iterdir()):
        raise SteeringError(f"{output} exists and is not empty: give a new directory, or --resume a stopped run")
    torch.manual_seed(config.seed)
    tokenizer, target, drafter, stored = load_pair(config.target, config.drafter, PRECISIONS[config.precision])
    settings = _settings(config, target, drafter)
    vocab = min(settings.target.vocab_size, settings.drafter.vocab_size)
    rows, held_out = split_rows(read_rows(config.data, tokenizer, config.max_length, vocab))
    drafter.requires_grad_(config.mode != "steer")
    pair = Pair(drafter, None if config.mode == "distill" else Steering(settings))
    trainer = _trainer(config, pair, target, rows, settings.target_layer_ids)
    target.to(trainer.args.device)
    pair.to(trainer.args.device)
    judge = lambda: measure(pair, target, held_out, settings.target_layer_ids, config.k, config.batch_size)  # noqa: E731
    pair.eval()
    before = None if config.resume else judge()
    if config.steps:
        trainer.train(resume_from_checkpoint=config.resume)
    _round_weights(pair, stored)
    pair.eval()
    acceptance = {"data": f"last {len(held_out)} rows of {Path(config.data).name}", "trained": judge()}
    if before is not None:
        acceptance["untrained"] = before
    settings = dataclasses.replace(settings, provenance=_provenance(config), acceptance=acceptance)
    _save(config, pair, tokenizer, settings, stored)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return acceptance


def load_pair(target: str, drafter: str, precision: torch.dtype) -> tuple[Any, nn.Module, nn.Module, torch.dtype]:
    """The common tokenizer, the target (frozen, in `precision`), the drafter (float32), and the drafter's own dtype.

    Raises SteeringError when a model cannot be read or the tokenizers differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizers = [AutoTokenizer.from_pretrained(name) for name in (target, drafter)]
        big = AutoModelForCausalLM.from_pretrained(target, dtype=precision)
        small = AutoModelForCausalLM.from_pretrained(drafter, dtype="auto")
    except (OSError, ValueError) as error:
        raise SteeringError(f"cannot load {target} and {drafter}: {error}") from error
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if ours != theirs:
        token = min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise SteeringError(
            f"the tokenizers of {target} and {drafter} differ: token {token!r} is {ours.get(token)} in one and "
            f"{theirs.get(token)} in the other; speculation needs one tokenizer, take a drafter of the target's family"
        )
    return tokenizers[1], big.requires_grad_(False).eval(), small.float(), small.dtype


def measure_directory(target: str | Path, drafter: str | Path, steering: str | Path, data: str | Path, k: int) -> dict:
    """`measure` a saved drafter on every row of a data file; unsteered if `steering` has no steering/ folder."""
    tokenizer, big, small, _ = load_pair(str(target), str(drafter), torch.float32)
    module, layers = None, default_target_layers(big.config.num_hidden_layers)
    if checkpoint.has_steering(steering):
        module = checkpoint.load_for(steering, big.config, small.config)
        layers = module.config.target_layer_ids
    rows = read_rows(data, tokenizer, big.config.max_position_embeddings, big.config.vocab_size)
    return measure(Pair(small, module).eval(), big, rows, layers, k, batch_size=8)


def _trainer(config: TrainConfig, pair: Pair, target: nn.Module, rows: list[Row], layers: tuple[int, ...]) -> Any:
    """A Trainer whose loss is the distance to the target; progress, logging, schedule and resume are its own."""
    from transformers import Trainer, TrainingArguments

    class PairTrainer(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
            states, wanted = read_target(target, inputs, layers)
            offset = step_offset(config.seed, self.state.global_step, config.k)
            mask = response_mask(inputs)
            loss = LOSSES[config.loss](wanted[mask], model(**inputs, states=states, offset=offset)[mask]).mean()
            if not torch.isfinite(loss):
                raise SteeringError(
                    f"the loss is {loss.item()} at step {self.state.global_step}: lower --lr and --drafter-lr, or "
                    "--precision float32; --resume starts from the last checkpoint"
                )
            return loss

    groups = [(pair.steering, config.lr), (pair.drafter, config.drafter_lr)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr}
            for module, lr in groups
            if module is not None and any(p.requires_grad for p in module.parameters())
        ],
        weight_decay=0.0,
    )
    arguments = TrainingArguments(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=max(1, config.steps),
        per_device_train_batch_size=config.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=config.steps // 20,
        max_grad_norm=0.5,
        bf16=config.precision == "bfloat16",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=max(1, min(50, config.steps // 10)),
        report_to=[],
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return PairTrainer(
        model=pair, args=arguments, train_dataset=rows, data_collator=collate, optimizers=(optimizer, None)
    )


def _settings(config: TrainConfig, target: nn.Module, drafter: nn.Module) -> SteeringConfig:
    shape = drafter_shape(_public(config.drafter), drafter.config)
    return SteeringConfig(
        target=target_shape(_public(config.target), target.config),
        drafter=shape,
        target_layer_ids=config.target_layers or default_target_layers(target.config.num_hidden_layers),
        steered_layers=config.steered_layers or tuple(range(shape.num_hidden_layers)),
        rank=config.rank,
        draft_length=config.k,
    )


@torch.no_grad()
def _round_weights(pair: Pair, dtype: torch.dtype) -> None:
    """Round what trained to the dtype it is stored in, so that what is measured is what is served."""
    for parameter in pair.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(dtype))


def _save(config: TrainConfig, pair: Pair, tokenizer: Any, settings: SteeringConfig, dtype: torch.dtype) -> None:
    output = Path(config.output)
    pair.detach()
    if config.mode != "steer":
        pair.drafter.to(dtype).save_pretrained(output)
        tokenizer.save_pretrained(output)
    if pair.steering is None:
        record = {"provenance": settings.provenance, "acceptance": settings.acceptance}
        (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    pair.steering.config = settings
    checkpoint.save(output, pair.steering.to(dtype))
    if config.mode == "joint":
        checkpoint.mark(output)


def _public(name: str) -> str:
    """A model's name for the record: a directory's own name without the path to it, a hub id as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def _provenance(config: TrainConfig) -> dict[str, Any]:
    """How a checkpoint was made: the whole configuration, the data's hash, versions, source commit, date (UTC)."""
    import transformers

    options = dataclasses.asdict(config)
    options |= {key: _public(options[key]) for key in ("target", "drafter", "data", "output")}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    words = [w for k, v in given.items() for w in ("--" + k.replace("_", "-"), *(v if isinstance(v, tuple) else [v]))]
    return {
        "command": shlex.join(["vllm-steer", "train", *(str(w) for w in words if w is not True)]),
        "data_sha256": sha256(config.data),
        "versions": {"vllm-steer": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
