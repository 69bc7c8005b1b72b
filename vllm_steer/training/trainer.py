"""Train a steering, a drafter, or both (SD², arXiv 2511.09844, section 3) on `transformers.Trainer`.

The loss is taken at response positions only; which target state steers which position is drawn anew in every step
(see pair.py). Several GPUs: `torchrun --nproc-per-node N -m vllm_steer.cli train ...`, or `--ray --workers N`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError, require_at_least, require_one_of
from vllm_steer.common.identity import fingerprint
from vllm_steer.common.options import option
from vllm_steer.common.provenance import origin, public_name
from vllm_steer.data import split
from vllm_steer.data.dataset import sha256
from vllm_steer.drafters.models import load_model, load_models
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.training.acceptance import measure
from vllm_steer.training.batches import Batches, read_data
from vllm_steer.training.losses import LOSSES
from vllm_steer.training.pair import OFFSET_RULES, Pair, guide_sources
from vllm_steer.training.plots import plot_training

MODES = {"steer": "steering only, an adapter", "joint": "steering and drafter", "distill": "drafter only, the control"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BEST = "eval_sampled"  # predicted block efficiency at temperature 1, what --keep best goes by


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the command line is made from these fields."""

    target: str = option(MISSING, "target model: hub id or directory")
    drafter: str = option(MISSING, "pretrained drafter that encodes texts as the target does: hub id or directory")
    data: tuple[str, ...] = option(
        MISSING,
        "JSONL files of prompts and responses: from `vllm-steer generate`, or your own (vllm_steer/data/dataset.py); "
        "a twentieth of the prompts of the first is held out for measuring, with all their rows",
        nargs="+",
    )
    output: str = option(MISSING, "directory to write: a drafter with steering/; mode steer: steering/ alone")
    mode: str = option(
        "joint", "what trains: " + "; ".join(f"{k} = {v}" for k, v in MODES.items()), choices=list(MODES)
    )
    loss: str = option("jsd", "distance between target and drafter at each position", choices=list(LOSSES))
    offsets: str = option(
        "batch",
        "how far back the state lies that steers a position: "
        + "; ".join(f"{k} = {v}" for k, v in OFFSET_RULES.items()),
        choices=list(OFFSET_RULES),
    )
    steps: int = option(1000, "optimiser steps; 0 writes the starting point")
    batch_size: int = option(8, "rows per forward and device")
    accumulate: int = option(1, "forwards per optimiser step")
    lr: float = option(1e-3, "peak learning rate of the steering")
    drafter_lr: float = option(1e-5, "peak learning rate of the drafter")
    k: int = option(5, "draft length to train for: offsets 1..k")
    rank: int | None = option(None, "factor the projection through this many dimensions (default: full rank)", type=int)
    target_layers: tuple[int, ...] | None = option(
        None,
        "three target layer ids, id i = input of layer i (default: 2, middle, third from the end)",
        nargs=3,
        type=int,
    )
    steered_layers: tuple[int, ...] | None = option(None, "drafter layers to steer (default: all)", nargs="+", type=int)
    max_length: int = option(1024, "tokens per row; longer rows are cut, those without room for a response left out")
    chat_template_kwargs: str = option(
        "{}", 'variables of the target\'s chat template in JSON, like {"enable_thinking": false}: those you serve with'
    )
    precision: str = option(
        "float32", "arithmetic of both forwards; weights train in float32", choices=list(PRECISIONS)
    )
    cache: str | None = option(
        None,
        "directory for the target's states and, when only upper layers of a frozen drafter are steered, what enters "
        "them: computed once, then shared by all epochs and by runs on the same rows (8 H + 2 H' bytes a token)",
        type=str,
    )
    control: str | None = option(
        None,
        "a drafter to stand beside this one in acceptance.json and the plot: the one that --mode distill made of the "
        "same data",
        type=str,
    )
    gradient_checkpointing: bool = option(
        False, "compute the drafter's activations again in the backward pass: less memory"
    )
    keep: str = option(
        "best", "which weights are written: of the best evaluation, or the last", choices=["best", "last"]
    )
    seed: int = option(0, "order of the rows, offsets, new weights")
    save_every: int = option(500, "steps between evaluations, and between the checkpoints --resume starts from")
    report_to: tuple[str, ...] = option((), "live curves besides the plots: tensorboard, wandb", nargs="*", type=str)
    resume: bool = option(False, "go on from the last checkpoint in the output directory")
    ray: bool = option(False, "train on a Ray cluster (Ray Train), one process per worker")
    workers: int = option(1, "with --ray: how many processes, one GPU each where there are GPUs")

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("max_length", 2)):
            require_at_least(options.flag(name), getattr(self, name), least)
        for name in ("batch_size", "accumulate", "k", "save_every", "workers"):
            require_at_least(options.flag(name), getattr(self, name), 1)
        allowed = {"mode": MODES, "loss": LOSSES, "offsets": OFFSET_RULES, "precision": PRECISIONS}
        for name, values in (allowed | {"keep": ("best", "last")}).items():
            require_one_of(options.flag(name), getattr(self, name), values)
        for name in self.report_to:
            require_one_of("--report-to", name, ("tensorboard", "wandb"))
            if find_spec(name) is None:
                raise SteeringError(f"--report-to {name} needs it: pip install {name}")
        if self.workers > 1 and not self.ray:
            raise SteeringError(f"--workers {self.workers} needs --ray; without Ray start torchrun --nproc-per-node")
        self.template_options  # noqa: B018 - refuses what is not usable

    @property
    def template_options(self) -> dict[str, Any]:
        """`chat_template_kwargs`, parsed."""
        return options.json_object("chat_template_kwargs", self.chat_template_kwargs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer train`."""
    options.add_arguments(parser, TrainConfig)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer train`: train, then say what was written and what it accepts."""
    config = options.from_arguments(TrainConfig, args)
    acceptance = train_on_ray(config) if config.ray else train(config)
    if acceptance is not None:
        print(f"wrote {config.output}\n{json.dumps(acceptance, indent=2)}")


def train_on_ray(config: TrainConfig) -> dict[str, Any]:
    """`train` in `config.workers` processes of a Ray cluster; paths must mean the same on every machine of it."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    paths = {name: str(Path(value).resolve()) for name in ("target", "drafter", "output", "cache", "control")
             if (value := getattr(config, name)) and (Path(value).exists() or name in ("output", "cache"))}  # fmt: skip
    data = tuple(str(Path(path).resolve()) for path in config.data)
    local = dataclasses.replace(config, data=data, **paths)
    before_training(local)
    TorchTrainer(
        lambda: train(local),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=str(Path(local.output) / "checkpoints" / "ray")),
    ).fit()
    shutil.rmtree(Path(local.output) / "checkpoints", ignore_errors=True)
    return json.loads((Path(local.output) / "acceptance.json").read_text(encoding="utf-8"))


def before_training(config: TrainConfig) -> None:
    """Raises SteeringError unless the output is new, or a stopped run that `--resume` was given for."""
    output = Path(config.output)
    if config.resume and last_checkpoint(output) is None:
        raise SteeringError(f"{output} has no checkpoint to resume from: start without --resume")
    if not config.resume and output.exists() and any(output.iterdir()):
        raise SteeringError(f"{output} exists and is not empty: give a new directory, or --resume a stopped run")


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole: its trainer_state.json is what the Trainer writes last."""
    found = sorted((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed while it was written
            continue
        return path
    return None


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run one training and write `config.output`; returns the measured acceptance, also stored in the checkpoint.

    In several processes (torchrun, Ray) each trains, the first one writes and returns, the others return None.
    Raises SteeringError for a pair that does not fit, unreadable data, an output that exists, or a loss that is not
    finite.
    """
    if int(os.environ.get("RANK", 0)) == 0 and not config.ray:  # the others may come when the first has begun
        before_training(config)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.target, config.drafter)
    rows, held_out = read_data(config, tokenizer)
    target, drafter, stored = load_models(config.target, config.drafter, PRECISIONS[config.precision])
    settings = _settings(config, target, drafter)
    drafter.requires_grad_(config.mode != "steer")
    arguments = _arguments(config)
    target.to(arguments.device)
    drafter.to(arguments.device)
    everything, training, held = split.in_file_order(rows, held_out)
    source = Batches(config, target, drafter, everything, settings, arguments)
    steering = None if config.mode == "distill" else Steering(settings)
    pair = Pair(drafter, steering, target, source.first_layer).to(arguments.device)
    pair.loss = LOSSES[config.loss]
    judge = lambda: _judge(pair, source, held, config)  # noqa: E731
    before = judge()  # also in a resumed run: the checkpoint is loaded inside trainer.train
    data = split.describe(rows, held_out, Path(config.data[0]).name)
    if config.control is not None:
        split.check_control(config.control, data)
    control = _judge_control(config, target, source, held)
    trainer = _trainer(config, pair, source, training, arguments, judge)
    if not config.resume and trainer.is_world_process_zero():
        split.store(held_out, Path(arguments.output_dir))
    if config.steps:
        last = last_checkpoint(Path(config.output)) if config.resume else None
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not trainer.is_world_process_zero():
        return None
    _round_weights(pair, stored)
    acceptance = {"data": data, "untrained": before, "trained": judge()} | control
    settings = dataclasses.replace(settings, provenance=_provenance(config), acceptance=acceptance)
    _save(config, pair, tokenizer, settings, stored)
    (Path(config.output) / "acceptance.json").write_text(json.dumps(acceptance, indent=2) + "\n", encoding="utf-8")
    plot_training(Path(config.output) / "training.png", acceptance, trainer.state.log_history)
    if not config.ray:  # Ray Train still writes there
        shutil.rmtree(Path(config.output) / "checkpoints", ignore_errors=True)
    return acceptance


def _judge(pair: Pair, source: Batches, held_out: list[int], config: TrainConfig) -> dict[str, Any]:
    training = pair.training
    found = measure(pair.eval(), source.held(held_out, config.batch_size), config.k)
    pair.train(training)
    return found


def _judge_control(config: TrainConfig, target: nn.Module, source: Batches, held_out: list[int]) -> dict[str, Any]:
    """{"control": its acceptance on the held-out rows}, or {} when none was given."""
    if config.control is None:
        return {}
    load_tokenizer(config.target, config.control)
    pair = Pair(load_model(config.control, torch.float32), None, target).to(source.device)
    return {"control": {"drafter": public_name(config.control)} | _judge(pair, source, held_out, config)}


def _arguments(config: TrainConfig) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=max(1, config.steps),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        lr_scheduler_type="cosine",
        warmup_steps=config.steps // 20,
        max_grad_norm=0.5,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=config.save_every,
        save_steps=config.save_every,
        save_total_limit=2,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model=BEST,
        greater_is_better=True,
        logging_steps=max(1, min(50, config.steps // 10)),
        report_to=list(config.report_to),
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:  # replicas in one process would share one injector
        raise SteeringError(
            f"{arguments.n_gpu} GPUs in one process: start `torchrun --nproc-per-node {arguments.n_gpu} -m "
            "vllm_steer.cli train ...`, or set CUDA_VISIBLE_DEVICES to one"
        )
    return arguments


def _trainer(config: TrainConfig, pair: Pair, source: Batches, rows: list[int], arguments: Any, judge: Any) -> Any:
    """A Trainer whose loss is the distance to the target; progress, logging, schedule and resume are its own."""
    from transformers import Trainer

    class PairTrainer(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
            batch = source.complete(inputs)
            # A function of step and rows: a resumed run draws the same, other processes and forwards do not.
            rng = random.Random(f"{config.seed}:{self.state.global_step}:{int(inputs['input_ids'].sum())}")
            length = inputs["input_ids"].shape[1]
            steered_from = guide_sources(config.offsets, inputs["prompt_lengths"], length, config.k, rng)
            loss = model(steered_from, **batch)
            if not torch.isfinite(loss):
                _stop_at(config, self.state.global_step, loss, inputs)
            return loss

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            found = judge()
            metrics = {f"eval_{name}": value for name, value in found["block_efficiency"].items()}
            self.log(metrics | {"eval_overlap": found["overlap"], "eval_agreement": found["greedy"]})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    if config.gradient_checkpointing:
        pair.drafter.gradient_checkpointing_enable({"use_reentrant": False})
    groups = [(pair.steering, config.lr), (pair.drafter, config.drafter_lr)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr}
            for module, lr in groups
            if module is not None and any(p.requires_grad for p in module.parameters())
        ],
        weight_decay=0.0,
    )
    return PairTrainer(
        model=pair,
        args=arguments,
        train_dataset=rows,
        eval_dataset=range(1),  # `evaluate` has its own rows
        data_collator=source.collate,
        optimizers=(optimizer, None),
    )


def _stop_at(config: TrainConfig, step: int, loss: Tensor, inputs: dict[str, Tensor]) -> None:
    path = Path(config.output) / "failed-batch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: inputs[name].tolist() for name in ("input_ids", "attention_mask", "prompt_lengths")}
    path.write_text(json.dumps({"step": step} | rows) + "\n", encoding="utf-8")
    raise SteeringError(
        f"the loss is {loss.item()} at step {step}; its batch is in {path}: lower --lr and --drafter-lr, or "
        "--precision float32; --resume starts from the last checkpoint"
    )


def _settings(config: TrainConfig, target: nn.Module, drafter: nn.Module) -> SteeringConfig:
    return SteeringConfig.for_models(
        target.config,
        drafter.config,
        names=(public_name(config.target), public_name(config.drafter)),
        target_layer_ids=config.target_layers,
        steered_layers=config.steered_layers,
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
    if pair.steering is not None:  # first: a full disk must not leave a joint drafter without its steering
        pair.steering.config = settings
        checkpoint.save(output, pair.steering.to(dtype))
    if config.mode != "steer":
        pair.drafter.to(dtype).save_pretrained(output)
        tokenizer.save_pretrained(output)
        for path in output.iterdir():  # safetensors writes for the owner alone; servers run as somebody else
            if path.is_file():
                path.chmod(0o644)
    if pair.steering is None:
        record = {"provenance": settings.provenance, "acceptance": settings.acceptance}
        (output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if config.mode == "joint":
        checkpoint.mark(output)


def _provenance(config: TrainConfig) -> dict[str, Any]:
    """How a checkpoint was made: the whole configuration, the data's hashes, versions, source commit, date (UTC)."""
    given = dataclasses.asdict(config)
    given |= {key: public_name(given[key]) for key in ("target", "drafter", "output", "cache", "control") if given[key]}
    given["data"] = [public_name(path) for path in config.data]
    return {
        "command": options.command("train", given),
        "identity": {"target": fingerprint(config.target), "drafter": fingerprint(config.drafter)},
        "data_sha256": {public_name(path): sha256(path) for path in config.data},
    } | origin("torch", "transformers")
