"""Tokens per block of several drafters of one target, on held-out prompts, greedy and sampled, in vLLM (V1).

    python benchmarks/acceptance.py examples/tiny_pair --drafters drafter distilled steered

Counts are vLLM's own (1 + accepted / drafts); no prefix cache and no preemption, so no placeholder drafts are in them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
from pathlib import Path
from typing import Any

from record import ENV, write_report


def measure(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """One engine: a row per temperature."""
    from vllm import LLM, SamplingParams

    path = args.pair / name
    adapter = not (path / "config.json").is_file()
    lines = (args.pair / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    llm = LLM(
        str(args.pair / "target"),
        speculative_config={
            "model": str(args.pair / "drafter" if adapter else path),
            "num_speculative_tokens": args.k,
            "draft_sample_method": "probabilistic",
        },
        additional_config={"vllm_steer": {"adapter": str(path)}} if adapter else {},
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        disable_log_stats=False,
        seed=0,
    )
    before = dict.fromkeys(("drafts", "accepted"), 0) | {"per_position": [0] * args.k}
    rows = []
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(temperature=temperature, max_tokens=args.tokens, ignore_eos=True)
        llm.generate([json.loads(line)["prompt"] for line in lines], sampling, use_tqdm=False)
        now = counters(llm)
        drafts = now["drafts"] - before["drafts"]
        shares = [(b - a) / drafts for a, b in zip(before["per_position"], now["per_position"], strict=True)]
        efficiency = 1 + (now["accepted"] - before["accepted"]) / drafts
        rows.append({"drafter": name, "temperature": temperature, "blocks": drafts})
        rows[-1] |= {"tokens_per_block": round(efficiency, 3), "accepted_at": [round(x, 3) for x in shares]}
        before = now
    return rows


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's speculation counters so far."""
    found = {m.name: m for m in llm.get_metrics()}
    return {
        "drafts": found["vllm:spec_decode_num_drafts"].value,
        "accepted": found["vllm:spec_decode_num_accepted_tokens"].value,
        "per_position": list(found["vllm:spec_decode_num_accepted_tokens_per_pos"].values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path, help="directory with target/, drafter/, heldout.jsonl and the drafters")
    parser.add_argument("--drafters", nargs="+", default=["drafter", "adapter", "distilled", "steered"])
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    os.environ.update(ENV)
    rows: list[dict[str, Any]] = []
    for name in args.drafters:
        with mp.get_context("spawn").Pool(1) as pool:
            rows += pool.apply(measure, (args, name))
        for row in rows[-2:]:
            shares = " ".join(f"{x:.2f}" for x in row["accepted_at"])
            print(
                f"{name:10} T={row['temperature']:g}: {row['tokens_per_block']:.3f} tokens per block; {shares}",
                flush=True,
            )
    if args.json:
        write_report(args.json, runner="V1, eager", rows=rows)


if __name__ == "__main__":
    main()
