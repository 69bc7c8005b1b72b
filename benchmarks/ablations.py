"""Ablations: train variants of one recipe and predict the acceptance of each on test text.

A variant is a mode and what it changes in the trainer's settings (`vllm_steer.training.config.TrainConfig`), values
in JSON:

    joint                                   the base: --loss, --lr and the other options below
    "joint rank=8"                          one change
    "distill loss=tvd data=[\"own.jsonl\"]"   two
    "distill steps=0"                       the plain drafter

All variants of the same data and guides share one cache of the target's states. Predictions are teacher forced
(vllm_steer/training/acceptance.py: `measure`); the few that matter are measured in vLLM by `vllm-steer bench`. A
variant that is in the output already is not trained again.

    python examples/tiny_pair/make.py --out pair --work work        # once: responses.jsonl, test.jsonl
    python benchmarks/ablations.py --pair pair --data work/responses.jsonl --test work/test.jsonl --output ablations \
        --target-layers 1 2 3 --variants distill joint "joint rank=8"
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from record import write_report

from vllm_steer.training.acceptance import measure_directory
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.trainer import train


def parse(variant: str, base: TrainConfig) -> TrainConfig:
    """The settings a variant names, e.g. "joint rank=8"."""
    mode, *changes = variant.split()
    values: dict[str, Any] = {"mode": mode}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        values[key] = tuple(parsed) if isinstance(parsed, list) else parsed
    config = dataclasses.replace(base, **values)
    what = json.dumps([config.data, config.target_layers, config.precision, config.max_length])
    folder = re.sub(r"[^a-z0-9.]+", "-", variant.lower()).strip("-")
    return dataclasses.replace(
        config,
        output=str(Path(base.output) / folder),
        cache=str(Path(base.output) / f"cache-{hashlib.sha256(what.encode()).hexdigest()[:8]}"),
    )


def run(variant: str, base: TrainConfig, test: Path | None) -> dict[str, Any]:
    """Train one variant and predict its acceptance on the test rows, or on the rows held out of training."""
    config = parse(variant, base)
    began = time.perf_counter()
    if not (Path(config.output) / "acceptance.json").exists():
        train(config)
    seconds = time.perf_counter() - began
    if test is None:
        kept = json.loads((Path(config.output) / "acceptance.json").read_text(encoding="utf-8"))
        return {"variant": variant, "seconds": round(seconds, 1)} | kept["trained"]
    drafter = base.drafter if config.mode == "steer" else config.output
    found = measure_directory(config.target, drafter, config.output, test, config.k)
    return {"variant": variant, "seconds": round(seconds, 1)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", type=Path, required=True, help="folder with target/ and drafter/")
    parser.add_argument("--data", nargs="+", required=True, help="training rows of the base")
    parser.add_argument("--test", type=Path, help="rows to predict on (default: what the trainer holds out)")
    parser.add_argument("--output", type=Path, required=True, help="where the trained variants go")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    parser.add_argument("--loss", default=TrainConfig.loss, help="loss of the base (default: the trainer's)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of steering")
    parser.add_argument("--drafter-lr", type=float, default=3e-3, help="learning rate of the drafter")
    parser.add_argument("--save-every", type=int, default=250, help="steps between evaluations")
    parser.add_argument("--max-length", type=int, default=352, help="tokens per row")
    parser.add_argument("--precision", default=TrainConfig.precision, help="float32 or bfloat16")
    parser.add_argument("--target-layers", type=int, nargs=3, help="guides of the base")
    parser.add_argument("--variants", nargs="+", required=True, help="see above")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = TrainConfig(
        target=str(args.pair / "target"),
        drafter=str(args.pair / "drafter"),
        data=tuple(args.data),
        output=str(args.output),
        loss=args.loss,
        lr=args.lr,
        drafter_lr=args.drafter_lr,
        steps=args.steps,
        max_length=args.max_length,
        precision=args.precision,
        target_layers=tuple(args.target_layers) if args.target_layers else None,
        save_every=args.save_every,
    )
    for variant in args.variants:  # before hours of training: a wrong name fails now
        parse(variant, base)
    rows = []
    for variant in args.variants:
        rows.append(run(variant, base, args.test))
        efficiency = rows[-1]["acceptance_length"]
        print(f"{variant:40} T=1 {efficiency['sampled']:.3f}, greedy {efficiency['greedy']:.3f}", flush=True)
        if args.json:
            write_report(args.json, steps=args.steps, rows=rows)


if __name__ == "__main__":
    main()
