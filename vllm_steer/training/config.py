"""The options of one training run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from importlib.util import find_spec
from typing import Any

import torch

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError, require_at_least, require_one_of
from vllm_steer.common.options import option
from vllm_steer.drafters.block.config import KINDS
from vllm_steer.training.losses import LOSSES, current_name
from vllm_steer.training.pair import OFFSET_RULES

STEERED = "steered"
MODES = {"steer": "steering only, an adapter", "joint": "steering and drafter", "distill": "drafter only, the control"}
OF_STEERED = (
    "mode",
    "offsets",
    "guide_dropout",
    "positions",
    "on_policy",
    "drafter_lr",
    "rank",
    "steered_layers",
    "trained_layers",
    "gradient_checkpointing",
)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the command line is made from these fields."""

    target: str = option(MISSING, "target model: hub id or directory")
    data: tuple[str, ...] = option(
        MISSING,
        "JSONL files of prompts and responses: from `vllm-steer generate`, or your own (vllm_steer/data/dataset.py), "
        "or a gateway's log; a twentieth of the prompts of the first is held out for measuring, with all their rows",
        nargs="+",
    )
    output: str = option(MISSING, "directory to write: a drafter with steering/; mode steer: steering/ alone")
    drafter: str | None = option(
        None,
        "pretrained drafter that encodes texts as the target does: hub id or directory; for a block drafter, one to "
        "start from (default: a new one)",
        type=str,
    )
    log_model: str | None = option(
        None, "of a gateway's log in --data: the name the target was served under (default: --target)", type=str
    )
    kind: str = option(
        STEERED,
        "what is trained: " + "; ".join(f"{k} = {v}" for k, v in ({STEERED: "a draft model"} | KINDS).items()),
        choices=[STEERED, *KINDS],
    )
    layers: int = option(1, "of a new block drafter: its decoder layers, or the blocks of a Medusa head")
    anchors: int = option(24, "of a block drafter: blocks of a row in one step")
    freeze_base: bool = option(False, "of treeflash: train the approximator alone, on the DFlash layers of --drafter")
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
    guide_dropout: float = option(
        0.0, "share of rows that train without their guide in each step, so that the drafter also drafts well unsteered"
    )
    positions: float = option(
        1.0,
        "share of the response positions that the loss is taken at, drawn anew in each step: with a large vocabulary "
        "the models' heads are most of a step",
    )
    on_policy: float = option(
        0.0, "share of every batch that the drafter writes itself, anew as it changes (modes distill and joint)"
    )
    renew: int = option(50, "with --on-policy: steps for which what the drafter wrote is used")
    steps: int = option(1000, "optimiser steps; 0 writes the starting point")
    batch_size: int = option(8, "rows per forward and device")
    accumulate: int = option(1, "forwards per optimiser step")
    lr: float = option(1e-3, "peak learning rate of the steering")
    drafter_lr: float = option(1e-5, "peak learning rate of the drafter")
    k: int = option(5, "draft length to train for: offsets 1..k")
    rank: int | None = option(None, "factor the projection through this many dimensions (default: full rank)", type=int)
    target_layers: tuple[int, ...] | None = option(
        None,
        "target layer ids, id i = input of layer i: three, for a block drafter any number (default: 2, middle, third "
        "from the end)",
        nargs="+",
        type=int,
    )
    steered_layers: tuple[int, ...] | None = option(None, "drafter layers to steer (default: all)", nargs="+", type=int)
    trained_layers: tuple[int, ...] | None = option(
        None,
        "drafter layers that train in modes joint and distill; the others, embedding and head stay as they are "
        "(default: the whole drafter)",
        nargs="+",
        type=int,
    )
    max_length: int = option(1024, "tokens per row; longer rows are cut, those without room for a response left out")
    chat_template_kwargs: str = option(
        "{}", 'variables of the target\'s chat template in JSON, like {"enable_thinking": false}: those you serve with'
    )
    precision: str = option(
        "float32", "arithmetic of both forwards; weights train in float32", choices=list(PRECISIONS)
    )
    cache: str | None = option(
        None,
        "directory for the target's states and, when only upper layers of the drafter train or are steered, what "
        "enters them: computed once, then shared by all epochs and by runs on the same rows (8 H + 2 H' bytes a token)",
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
        for name in ("batch_size", "accumulate", "k", "save_every", "workers", "layers", "anchors"):
            require_at_least(options.flag(name), getattr(self, name), 1)
        allowed: dict[str, Iterable[str]] = {
            "kind": (STEERED, *KINDS),
            "mode": MODES,
            "loss": LOSSES,
            "offsets": OFFSET_RULES,
            "precision": PRECISIONS,
        }
        for name, values in (allowed | {"keep": ("best", "last")}).items():
            require_one_of(options.flag(name), getattr(self, name), values)
        if not 0 <= self.guide_dropout < 1:
            raise SteeringError(f"--guide-dropout is {self.guide_dropout}, allowed is 0 to less than 1")
        if self.guide_dropout and self.mode != "joint" and self.kind == STEERED:
            raise SteeringError(
                f"--guide-dropout is for --mode joint, where guide and drafter train; --mode is {self.mode}"
            )
        self._check_on_policy()
        for name in self.report_to:
            require_one_of("--report-to", name, ("tensorboard", "wandb"))
            if find_spec(name) is None:
                raise SteeringError(f"--report-to {name} needs it: pip install {name}")
        if self.workers > 1 and not self.ray:
            raise SteeringError(f"--workers {self.workers} needs --ray; without Ray start torchrun --nproc-per-node")
        self._check_kind()
        self.template_options  # noqa: B018 - refuses what is not usable

    def _check_on_policy(self) -> None:
        require_at_least("--renew", self.renew, 1)
        if not 0 < self.positions <= 1:
            raise SteeringError(f"--positions is {self.positions}, allowed is more than 0, to 1 (all of them)")
        if not 0 <= self.on_policy <= 1:
            raise SteeringError(f"--on-policy is {self.on_policy}, allowed is 0 to 1")
        if self.on_policy and self.mode == "steer" and self.kind == STEERED:
            raise SteeringError(
                "--on-policy is for modes in which the drafter changes, joint and distill; --mode is steer"
            )
        if self.on_policy and not round(self.on_policy * self.batch_size):
            raise SteeringError(
                f"--on-policy {self.on_policy} of --batch-size {self.batch_size} is no row: raise one of them"
            )
        if self.on_policy and self.save_every % self.renew:
            raise SteeringError(
                f"--save-every is {self.save_every} and --renew {self.renew}: with --on-policy give a --save-every "
                "that --renew divides, so that a resumed run writes what the first one wrote"
            )

    def _check_kind(self) -> None:
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        if self.kind == STEERED:
            if self.drafter is None:
                raise SteeringError("--drafter is missing: give the pretrained drafter to steer")
            if self.target_layers is not None and len(self.target_layers) != 3:
                raise SteeringError(f"--target-layers has {len(self.target_layers)} ids, steering reads three")
            if self.trained_layers is not None and self.mode == "steer":
                raise SteeringError("--trained-layers is for modes in which the drafter changes, joint and distill")
            others: tuple[str, ...] = ("layers", "anchors", "freeze_base")
        else:
            others = OF_STEERED
            if self.freeze_base and (self.kind != "treeflash" or self.drafter is None):
                raise SteeringError("--freeze-base is for --kind treeflash with a DFlash --drafter to start from")
        for name in others:
            if getattr(self, name) != defaults[name]:
                raise SteeringError(
                    f"{options.flag(name)} is {getattr(self, name)}, which --kind {self.kind} does not have: drop it"
                )

    @property
    def writers(self) -> tuple[str, ...]:
        """The models that may have written the data: the target, and a draft model."""
        return (self.target, self.drafter) if self.kind == STEERED and self.drafter else (self.target,)

    @property
    def template_options(self) -> dict[str, Any]:
        """`chat_template_kwargs`, parsed."""
        return options.json_object("chat_template_kwargs", self.chat_template_kwargs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer train`."""
    options.add_arguments(parser, TrainConfig)
