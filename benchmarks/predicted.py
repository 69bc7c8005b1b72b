"""Predicted acceptance of several checkpoints on the same rows, each compared with the first: points of a curve.

Teacher forced, without an engine (vllm_steer/training/acceptance.py). `overlap` is the mean of sum min(p, q) over the
offsets 1 to k, what sampling at temperature 1 accepts; `agreement` how often both choose the same token. Differences
have 95 % bootstrap intervals over rows. The target's states are read once.

    python benchmarks/predicted.py --target TARGET --data held.jsonl --json curve.json \
        --drafters plain=DRAFTER adapter=ADAPTER+DRAFTER distilled=DISTILLED
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import interval, write_report
from tqdm import tqdm

from vllm_steer.bench.candidate import Contender
from vllm_steer.data.dataset import collate, read_rows
from vllm_steer.drafters.models import load_model
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import default_target_layers
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.training.acceptance import chances, predicted
from vllm_steer.training.config import PRECISIONS
from vllm_steer.training.losses import rejection
from vllm_steer.training.pair import Pair, read_target


def rows_of(contender: Contender, target: Any, batches: list[dict[str, torch.Tensor]], k: int) -> list[dict[str, Any]]:
    """What is predicted for every row alone, and last for all of them together."""
    assert contender.drafter is not None
    small = load_model(contender.drafter, target.dtype).eval()
    steering = contender.steering
    module = None
    if steering is not None:
        module = checkpoint.load_for(steering.parent, target.config, small.config).to(target.dtype)
        assert module.config.target_layer_ids == default_target_layers(target.config.num_hidden_layers)
    pair = Pair(small, module, target, rejection).eval()
    parts = [chances(pair, batch, k) for batch in tqdm(batches, desc=contender.name)]
    return [*(predicted([part], k) for part in parts), predicted(parts, k)]


def mean(pairs: Sequence[tuple[float, float]]) -> float:
    """The mean difference of two columns."""
    return sum(one - other for one, other in pairs) / len(pairs)


def compared(found: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean differences to the first checkpoint, row by row; every row has as many positions."""
    out: dict[str, Any] = {}
    for name in ("overlap", "agreement"):
        columns = [[sum(row[name]) / len(row[name]) for row in each[:-1]] for each in (found, first)]
        pairs = list(zip(*columns, strict=True))
        out[f"{name}_minus_first"] = round(mean(pairs), 4)
        out[f"{name}_minus_first_95"] = interval(pairs, mean, 4)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True, help="JSONL rows that nothing was trained on, of one length")
    parser.add_argument("--drafters", nargs="+", required=True, metavar="NAME=DRAFTER", help="as in vllm-steer bench")
    parser.add_argument("--k", type=int, default=5, help="drafts per block")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contenders = [Contender.parse(text) for text in args.drafters]
    target = load_model(args.target, PRECISIONS[args.precision]).eval()
    layers = default_target_layers(target.config.num_hidden_layers)
    rows = read_rows(args.data, load_tokenizer(args.target, str(contenders[0].drafter)), 1 << 20)
    batches = [collate([row]) for row in rows]
    with torch.no_grad():
        batches = [batch | read_target(target, batch, layers) for batch in tqdm(batches, desc="target")]
    first: list[dict[str, Any]] = []
    table = []
    print(
        "| | length, T=1 | length, greedy | overlap over the first | agreement over the first |\n|---|---|---|---|---|"
    )
    for contender in contenders:
        found = rows_of(contender, target, batches, args.k)
        first = first or found
        row = found[-1] | compared(found, first)
        length, (low, high) = row["acceptance_length"], row["overlap_minus_first_95"]
        least, most = row["agreement_minus_first_95"]
        print(f"| {contender.name} | {length['sampled']:.3f} | {length['greedy']:.3f} | "
              f"{row['overlap_minus_first']:+.4f} [{low:+.4f}, {high:+.4f}] | "
              f"{row['agreement_minus_first']:+.4f} [{least:+.4f}, {most:+.4f}] |", flush=True)  # fmt: skip
        table.append({"name": contender.name, "identity": contender.identity()} | row)
    if args.json:
        given = {name: getattr(args, name) for name in ("k", "precision")}
        write_report(
            args.json, rows=table, data={"rows": len(rows), "tokens": sum(len(row.ids) for row in rows)}, **given
        )


if __name__ == "__main__":
    main()
