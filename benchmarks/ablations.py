"""Ablations on the tiny pair: losses, data, guide layers, rank, offset rules, modes; predicted acceptance on test text.

Every variant changes one thing of the base and trains on the same rows for the same steps, all from one cache of the
target's states. Predictions are teacher forced (see vllm_steer/pair.py: `measure`); the few that matter are measured
in vLLM by `vllm-steer bench`. A variant that is in the output already is not run again.

    python examples/tiny_pair/make.py --out /tmp/pair --work /tmp/work        # once: responses.jsonl, test.jsonl
    python benchmarks/ablations.py --data /tmp/work --output /tmp/ablations --json ablations.json
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from record import write_report

PAIR = Path(__file__).parents[1] / "examples" / "tiny_pair"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": dict(mode="distill", steps=0),
    "steer": dict(mode="steer"),
    "distill": dict(mode="distill"),
    "joint": dict(mode="joint"),
    **{f"{mode}, {loss}": dict(mode=mode, loss=loss) for loss in ("reverse-kl", "jsd", "tvd", "overlap")
       for mode in ("distill", "joint")},
    **{f"joint, offsets {rule}": dict(offsets=rule) for rule in ("sequence", "block")},
    **{f"joint, rank {rank}": dict(rank=rank) for rank in (8, 64)},
    "joint, guides 0 1 2": dict(target_layers=(0, 1, 2)),
    "joint, seed 1": dict(seed=1),
    "distill, seed 1": dict(mode="distill", seed=1),
}  # fmt: skip


def run(name: str, changes: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant and predict its acceptance on the test rows."""
    from vllm_steer.pair import measure_directory
    from vllm_steer.train import TrainConfig, train

    layers = changes.get("target_layers", (1, 2, 3))
    config = TrainConfig(
        target=str(PAIR / "target"),
        drafter=str(PAIR / "drafter"),
        data=(str(args.data / "responses.jsonl"),),
        output=str(args.output / name.replace(", ", "_").replace(" ", "-")),
        cache=str(args.output / ("cache-" + "".join(map(str, layers)))),
        lr=3e-3,
        drafter_lr=3e-3,
        steps=args.steps,
        max_length=352,
        target_layers=layers,
        save_every=250,
    )
    config = dataclasses.replace(config, **changes)
    began = time.perf_counter()
    if not (Path(config.output) / "acceptance.json").exists():
        train(config)
    seconds = time.perf_counter() - began
    base = PAIR / "drafter" if config.mode == "steer" else config.output
    found = measure_directory(config.target, base, config.output, args.data / "test.jsonl", config.k)
    return {"variant": name, "changes": changes, "seconds": round(seconds, 1)} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with responses.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="where the trained variants go")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps of every variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.variants:
        rows.append(run(name, VARIANTS[name], args))
        efficiency = rows[-1]["block_efficiency"]
        print(f"{name:24} T=1 {efficiency['sampled']:.3f}, greedy {efficiency['greedy']:.3f}", flush=True)
        if args.json:
            write_report(args.json, steps=args.steps, rows=rows)


if __name__ == "__main__":
    main()
