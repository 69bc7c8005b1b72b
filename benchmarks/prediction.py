"""Is the predicted number of acceptance length what vLLM then measures? One table, from a finished `vllm-steer bench`.

The prediction (vllm_steer/training/acceptance.py: `measure`) reads responses of the target to the bench's prompts, one
file greedy and one sampled at temperature 1; the measurement speculated through the same prompts.

    vllm-steer generate --model TARGET --prompts heldout.jsonl --max-tokens 128 --temperature 0 --output greedy.jsonl
    vllm-steer generate --model TARGET --prompts heldout.jsonl --max-tokens 128 --output sampled.jsonl
    python benchmarks/prediction.py --bench BENCH --greedy greedy.jsonl --sampled sampled.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from record import write_report

from vllm_steer.bench import summary
from vllm_steer.training.acceptance import measure_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="output of vllm-steer bench at temperatures 0 and 1")
    parser.add_argument("--greedy", type=Path, required=True, help="the target's greedy responses")
    parser.add_argument("--sampled", type=Path, required=True, help="its responses at temperature 1")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = json.loads((args.bench / "results.json").read_text(encoding="utf-8"))
    settings = bench["settings"]
    measured = {
        (run["temperature"], row["name"]): (row["acceptance_length"], row["interval_95"])
        for run in summary.with_new_names(bench)["summary"]
        for row in run["rows"]
    }
    rows = []
    print("| drafter | temperature | predicted | vLLM | predicted / vLLM |\n|---|---|---|---|---|")
    for contender in bench["contenders"]:
        name, where = contender["name"], contender["identity"]
        if where["drafter"] is None:  # no speculation
            continue
        for temperature, kind, data in ((0.0, "greedy", args.greedy), (1.0, "sampled", args.sampled)):
            found = measure_directory(
                settings["target"], where["drafter"], where["adapter"] or where["drafter"], data, settings["k"]
            )
            predicted, (actual, (low, high)) = found["acceptance_length"][kind], measured[temperature, name]
            rows.append({"drafter": name, "temperature": temperature, "predicted": predicted, "measured": actual,
                         "measured_interval_95": [low, high], "positions": found["positions"]})  # fmt: skip
            print(f"| {name} | {temperature:g} | {predicted:.3f} | {actual:.3f} [{low:.3f}, {high:.3f}] | "
                  f"{predicted / actual:.3f} |", flush=True)  # fmt: skip
    if args.json:
        write_report(args.json, rows=rows)


if __name__ == "__main__":
    main()
