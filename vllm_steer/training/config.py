"""The options of one training run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError, require_at_least, require_one_of
from vllm_steer.common.options import option
from vllm_steer.training.losses import LOSSES, current_name
from vllm_steer.training.pair import OFFSET_RULES

MODES = {"steer": "steering only, an adapter", "joint": "steering and drafter", "distill": "drafter only, the control"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    loss: str = option(
        "jsd", "distance between target and drafter at each position", choices=list(LOSSES), type=current_name
    )
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
        object.__setattr__(self, "loss", current_name(self.loss))
        for name, least in (("steps", 0), ("max_length", 2)):
            require_at_least(options.flag(name), getattr(self, name), least)
        for name in ("batch_size", "accumulate", "k", "save_every", "workers"):
            require_at_least(options.flag(name), getattr(self, name), 1)
        allowed: dict[str, Iterable[str]] = {
            "mode": MODES,
            "loss": LOSSES,
            "offsets": OFFSET_RULES,
            "precision": PRECISIONS,
        }
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
