"""Train a steering, a drafter, both (SD², arXiv 2511.09844, section 3), or a block drafter, on `transformers.Trainer`.

The loss is taken at response positions only; which target state steers which position (pair.py), or where blocks begin
(block_pair.py), is drawn anew in every step.
Several GPUs: `torchrun --nproc-per-node N -m vllm_steer.cli train ...`, or `--ray --workers N`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer, refuse_used
from vllm_steer.common.provenance import public_name
from vllm_steer.data import split
from vllm_steer.drafters.models import read_model_config, text_config
from vllm_steer.drafters.tokenizer import require_embeddings
from vllm_steer.training import on_policy, record, runs, writing
from vllm_steer.training.batches import Batches, read_data
from vllm_steer.training.block_pair import BlockPair
from vllm_steer.training.config import TrainConfig, add_arguments
from vllm_steer.training.forecast import forecast
from vllm_steer.training.pair import Pair, choose_positions
from vllm_steer.training.plots import plot_training

log = logging.getLogger(__name__)

__all__ = ["add_arguments", "run", "train"]  # the first two are the verb's

BEST = "eval_acceptance_length_sampled"  # predicted at temperature 1; --keep best compares it


def run(args: argparse.Namespace) -> None:
    """`vllm-steer train`: train, then print what was written and the measured acceptance."""
    config = options.from_arguments(TrainConfig, args)
    acceptance = train_on_ray(config) if config.ray else train(config)
    if acceptance is not None:
        print(f"wrote {config.output}\n{json.dumps(acceptance, indent=2)}")


def train_on_ray(config: TrainConfig) -> dict[str, Any]:
    """`train` in `config.workers` processes of a Ray cluster; paths must mean the same on every machine of it."""
    paths: dict[str, Any] = {}
    for name in ("target", "drafter", "output", "cache", "control"):
        value = getattr(config, name)
        if value and (Path(value).exists() or name in ("output", "cache")):
            paths[name] = str(Path(value).resolve())
    data = tuple(str(Path(path).resolve()) for path in config.data)
    local = dataclasses.replace(config, data=data, **paths)
    with _own_output(local):
        before_training(local)
        _fit_on_ray(local)
    return json.loads((Path(local.output) / "acceptance.json").read_text(encoding="utf-8"))


def _fit_on_ray(local: TrainConfig) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def worker() -> None:
        train(local)

    TorchTrainer(
        worker,
        scaling_config=ScalingConfig(num_workers=local.workers, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(storage_path=str(Path(local.output) / "checkpoints" / "ray")),
    ).fit()
    shutil.rmtree(Path(local.output) / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _own_output(config: TrainConfig) -> Iterator[None]:
    """Hold the output directory: no other process trains into it meanwhile."""
    output = Path(config.output).resolve()
    with only_writer(output.parent / f".{output.name}.lock", config.output):
        yield


def before_training(config: TrainConfig) -> None:
    """Raises SteeringError unless the output is new, or a stopped run with the same options is resumed."""
    output = Path(config.output)
    if config.cache is not None and Path(config.cache).resolve().is_relative_to(output.resolve()):
        raise SteeringError(
            f"--cache {config.cache} lies in --output {output}, which is for the checkpoint alone: give a directory "
            "elsewhere"
        )
    if not config.resume:
        refuse_used(output, "give a new one, or --resume a run that was stopped after its first checkpoint")
        return
    last = record.last_checkpoint(output)
    if last is None:
        raise SteeringError(
            f"{output} has no checkpoint to resume from: delete it if it exists, and start without --resume"
        )
    record.require_same(config, last)


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run one training and write `config.output`; returns the measured acceptance, also stored in the checkpoint.

    In several processes (torchrun, Ray) each trains, the first one writes and returns, the others return None.
    Raises SteeringError for a pair that does not fit, unreadable data, an output that exists, or a loss that is not
    finite.
    """
    if int(os.environ.get("RANK", 0)) != 0 or config.ray:  # the other processes may enter once the first has begun
        return _train(config)
    with _own_output(config):
        before_training(config)
        return _train(config)


def _train(config: TrainConfig) -> dict[str, Any] | None:
    torch.manual_seed(config.seed)
    tokenizer = runs.require_same_tokens(config)
    for model in config.writers:
        require_embeddings(tokenizer, model, text_config(read_model_config(model)).vocab_size)
    rows, held_out = read_data(config, tokenizer)
    everything, training, held = split.in_file_order(rows, held_out)
    arguments = _arguments(config)
    made = runs.prepare(config, tokenizer, everything, arguments)
    pair, source = made.pair, made.source
    if int(os.environ.get("RANK", 0)) == 0:
        made.rehearse()
    judge = lambda: _judge(pair, source, held, config)  # noqa: E731
    begun = time.perf_counter()
    before = judge()  # also in a resumed run: the checkpoint is loaded inside trainer.train
    judging = time.perf_counter() - begun
    data = split.describe(rows, held_out, Path(config.data[0]).name)
    if config.control is not None:
        split.check_control(config.control, data)
    control = _judge_control(config, made, held)
    writer = None
    if isinstance(pair, Pair):
        rows, ends = [everything[i] for i in training], made.target.generation_config
        writer = on_policy.writer(config, pair, source, rows, tokenizer, ends)
    trainer = _trainer(config, pair, source, training, arguments, judge, writer)
    checkpoints, last = (
        Path(arguments.output_dir),
        record.last_checkpoint(Path(config.output)) if config.resume else None,
    )
    if trainer.is_world_process_zero():
        record.begin(config, held_out, checkpoints, last)
        log.info("%s", forecast(pair, source, training, config, last, judging))
    begun = time.perf_counter()
    if config.steps:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    own = {} if writer is None else {"on_policy": writer.report(time.perf_counter() - begun)}
    if not trainer.is_world_process_zero():
        return None
    writing.round_weights(pair, made.stored)
    acceptance = {"data": data, "untrained": before, "trained": judge()} | own | control
    _warn_of_harm(acceptance)
    made.write(record.provenance(config) | record.resumptions(checkpoints), acceptance)
    plot_training(Path(config.output) / "training.png", acceptance, trainer.state.log_history)
    if not config.ray:  # Ray Train still writes there
        shutil.rmtree(checkpoints, ignore_errors=True)
    return acceptance


def _warn_of_harm(acceptance: dict[str, Any]) -> None:
    """Log where training has made the held-out acceptance lower than it was."""
    before, after = (acceptance[key]["acceptance_length"]["sampled"] for key in ("untrained", "trained"))
    if after < before:
        log.warning(
            "the held-out acceptance length is %.3f, below the untrained drafter's %.3f: lower --lr and --drafter-lr, "
            "or give more data; do not serve this checkpoint",
            after,
            before,
        )


def _judge(pair: Pair | BlockPair, source: Batches, held_out: list[int], config: TrainConfig) -> dict[str, Any]:
    training = pair.training
    found = pair.eval().measure(source.held(held_out, config.batch_size), config.k)
    pair.train(training)
    return found


def _judge_control(config: TrainConfig, made: runs.Run, held_out: list[int]) -> dict[str, Any]:
    """{"control": its acceptance on the held-out rows}, or {} when none was given."""
    if config.control is None:
        return {}
    pair, source = runs.control(config, made)
    return {
        "control": {"drafter": public_name(config.control)} | _judge(pair.to(source.device), source, held_out, config)
    }


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


def _trainer(
    config: TrainConfig,
    pair: Pair | BlockPair,
    source: Batches,
    rows: list[int],
    arguments: Any,
    judge: Any,
    writer: on_policy.Writer | None,
) -> Any:
    """A Trainer whose loss is the distance to the target; progress, logging, schedule and resume are its own."""
    if config.gradient_checkpointing and isinstance(pair, Pair):
        pair.drafter.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = _trainer_class(config, pair, source, judge, writer)(
        model=pair,
        args=arguments,
        train_dataset=rows,
        eval_dataset=range(1),  # `evaluate` has its own rows
        data_collator=source.collate,
        callbacks=[_own_pace()],
        optimizers=(_optimizer(config, pair), None),
    )
    trainer.model_accepts_loss_kwargs = True  # `compute_loss` divides by the number of positions of the whole step
    return trainer


def _trainer_class(
    config: TrainConfig, pair: Pair | BlockPair, source: Batches, judge: Any, writer: on_policy.Writer | None
) -> Any:
    from transformers import Trainer

    class PairTrainer(Trainer):
        def get_batch_samples(
            self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
        ) -> tuple[list[Any], Tensor]:
            """The batches of one optimiser step, and how many positions they have in all processes together."""
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if writer is not None:
                batches = writer.replace(batches, self.state.global_step)
            if config.positions < 1:
                batches = [choose_positions(b, config.positions, self._seed(b)) for b in batches]
            count = torch.tensor(sum(pair.positions(batch) for batch in batches), device=device)
            return batches, self.accelerator.gather(count).sum()

        def compute_loss(  # type: ignore[override]  # never asked for outputs
            self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None, **_: Any
        ) -> Tensor:
            """This forward's share of the mean over all positions of the step, so that each of them weighs the same."""
            batch = source.complete(inputs)
            rng = random.Random(self._seed(inputs))
            assert num_items_in_batch is not None
            total = model(pair.draw(config, batch, rng), **batch)
            # Gradients of processes are averaged; a step whose rows have no position to learn from changes nothing.
            loss = total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
            if not torch.isfinite(loss):
                _stop_at(config, self.state.global_step, loss, inputs)
            return loss

        def _seed(self, batch: dict[str, Tensor]) -> str:
            # By step and rows: a resumed run draws the same numbers, other processes and forwards draw others.
            return f"{config.seed}:{self.state.global_step}:{int(batch['input_ids'].sum())}"

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            found = judge()
            metrics = {f"eval_acceptance_length_{name}": value for name, value in found["acceptance_length"].items()}
            self.log(metrics | {"eval_overlap": found["overlap"], "eval_agreement": found["agreement"]})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return PairTrainer


def _own_pace() -> Any:
    """A resumed run evaluates and saves as often as it is told to now, not as its checkpoint was."""
    from transformers import TrainerCallback

    class OwnPace(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            state.compute_steps(args, state.max_steps)

    return OwnPace()


def _optimizer(config: TrainConfig, pair: Pair | BlockPair) -> torch.optim.Optimizer:
    """AdamW over what is trained, every module at its own learning rate."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": lr}
            for module, lr in pair.groups(config)
            if any(p.requires_grad for p in module.parameters())
        ],
        weight_decay=0.0,
    )


def _stop_at(config: TrainConfig, step: int, loss: Tensor, inputs: dict[str, Tensor]) -> None:
    path = Path(config.output) / "failed-batch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: inputs[name].tolist() for name in ("input_ids", "attention_mask", "prompt_lengths")}
    path.write_text(json.dumps({"step": step} | rows) + "\n", encoding="utf-8")
    raise SteeringError(
        f"the loss is {loss.item()} at step {step}; its batch is in {path}: lower --lr and --drafter-lr, or give "
        "--precision float32, and start with a new --output"
    )
