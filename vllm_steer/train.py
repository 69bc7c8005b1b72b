"""Train a steering, a drafter, or both (SD², arXiv 2511.09844, section 3) on `transformers.Trainer`.

The loss is taken at response positions only, with one random guide offset d in 1..k per batch (see pair.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer import __version__, checkpoint
from vllm_steer.config import SteeringConfig, SteeringError, default_target_layers, drafter_shape, target_shape
from vllm_steer.data import Row, collate, read_rows, sha256, split_rows
from vllm_steer.losses import LOSSES
from vllm_steer.pair import Pair, load_models, load_tokenizer, measure, read_target, response_mask
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


def step_offset(seed: int, step: int, k: int) -> int:
    """The offset of one step, in 1..k: a function of seed and step, so a resumed run draws the same."""
    return random.Random(f"{seed}:{step}").randint(1, k)


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
    tokenizer = load_tokenizer(config.target, config.drafter)
    rows, held_out = split_rows(read_rows(config.data, tokenizer, config.max_length))
    target, drafter, stored = load_models(config.target, config.drafter, PRECISIONS[config.precision])
    settings = _settings(config, target, drafter)
    drafter.requires_grad_(config.mode != "steer")
    pair = Pair(drafter, None if config.mode == "distill" else Steering(settings))
    trainer = _trainer(config, pair, target, rows, settings.target_layer_ids)
    if trainer.args.n_gpu > 1 or trainer.args.world_size > 1:  # replicas would share one injector
        raise SteeringError("training runs on one device: set CUDA_VISIBLE_DEVICES to one GPU, start one process")
    target.to(trainer.args.device)
    pair.to(trainer.args.device)
    judge = lambda: measure(pair, target, held_out, settings.target_layer_ids, config.k, config.batch_size)  # noqa: E731
    pair.eval()
    before = judge()  # also in a resumed run: the checkpoint is loaded inside trainer.train
    if config.steps:
        trainer.train(resume_from_checkpoint=config.resume)
    _round_weights(pair, stored)
    pair.eval()
    acceptance = {
        "data": f"last {len(held_out)} rows of {Path(config.data).name}",
        "untrained": before,
        "trained": judge(),
    }
    settings = dataclasses.replace(settings, provenance=_provenance(config), acceptance=acceptance)
    _save(config, pair, tokenizer, settings, stored)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return acceptance


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
        use_cpu=not torch.accelerator.is_available(),
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
        for path in output.iterdir():  # safetensors writes for the owner alone; servers run as somebody else
            if path.is_file():
                path.chmod(0o644)
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
    given = {k: v for k, v in options.items() if v is not None and v is not False}
    words = [w for k, v in given.items() for w in ("--" + k.replace("_", "-"), *(v if isinstance(v, tuple) else [v]))]
    return {
        "command": shlex.join(["vllm-steer", "train", *(str(w) for w in words if w is not True)]),
        "data_sha256": sha256(config.data),
        "versions": {"vllm-steer": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The source commit when running from a git checkout; None for an installed package or without git."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
