"""What steering costs on a GPU: tokens per second of the same pair unsteered, at scale 0 and steered, side by side.

    PYTHONPATH=. python benchmarks/gpu/cost.py TARGET DRAFTER --out gpu_cost.json         # a quarter of an hour
    PYTHONPATH=. python benchmarks/gpu/cost.py TARGET DRAFTER --dry-run                   # seconds: does it still run?

The steering is zero, so that all forms draft the same tokens in the same number of steps: the ratio is the cost alone.
Every engine is a process of its own; one row for each form, rank, batch, max_num_seqs, and graphs on or off. Engines of
one setting follow each other, and each answers every batch `--repeats` times, of which the fastest counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from overhead import TEXT, zero_adapter
from record import write_report

K = 5
DRAFT_GRAPHS = "steered, draft_graphs"  # V2: the drafter's decode passes as CUDA graphs
ANSWER = "RESULT "  # vLLM logs to standard output too


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """In a process of its own: one engine, every batch."""
    from vllm import LLM, SamplingParams

    steering = {"adapter": job["adapter"], "scale": float(job["form"] != "scale 0")}
    options = {} if job["form"] == "unsteered" else steering | {"draft_graphs": job["form"] == DRAFT_GRAPHS}
    llm = LLM(
        job["target"],
        speculative_config={"model": job["drafter"], "num_speculative_tokens": K},
        additional_config={"vllm_steer": options} if options else {},
        enforce_eager=not job["graphs"],
        max_num_seqs=job["max_num_seqs"],
        max_model_len=1024,
        enable_prefix_caching=False,
        gpu_memory_utilization=job["memory"],
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True)
    found = []
    for batch in job["batches"]:
        prompts = [f"# module {i}\n{TEXT}" for i in range(batch)]
        llm.generate(prompts, sampling, use_tqdm=False)  # warms up
        seconds, answers = [], []
        for _ in range(job["repeats"]):
            began = time.perf_counter()
            answers = [tuple(o.outputs[0].token_ids) for o in llm.generate(prompts, sampling, use_tqdm=False)]
            seconds.append(time.perf_counter() - began)
        rate = batch * job["tokens"] / min(seconds)
        found.append({"batch": batch, "tokens_per_s": round(rate, 2), "seconds": [round(s, 4) for s in seconds],
                      "answers": hash(tuple(sorted(answers)))})  # fmt: skip
    return found


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """`measure` in a new process of the runner that is asked for."""
    env = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(int(job["runner"] == "v2")), "PYTHONHASHSEED": "0"}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{job}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(ANSWER))[len(ANSWER) :])


def compare(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One row for each engine and batch; `ratio` is to the unsteered engine of the same setting."""
    rows = []
    ranks = [("full", None), ("64", 64)]
    adapters = {name: str(zero_adapter(args.target, args.drafter, rank, "all", scratch / name)) for name, rank in ranks}
    settings = itertools.product(args.runners, args.graphs, args.max_num_seqs)
    forms = [("unsteered", "64"), ("scale 0", "64"), *(("steered", name) for name in adapters)]
    for runner, graphs, most in settings:
        stock: dict[int, tuple[float, int]] = {}  # batch: its speed and its answers
        more = [(DRAFT_GRAPHS, "64")] if runner == "v2" and graphs == "on" else []
        for form, rank in [*forms, *more]:
            job = {"target": args.target, "drafter": args.drafter, "adapter": adapters[rank], "form": form,
                   "runner": runner, "graphs": graphs == "on", "max_num_seqs": most, "batches": args.batch,
                   "tokens": args.tokens, "repeats": args.repeats, "memory": args.memory}  # fmt: skip
            for found in run(job):
                this = found["tokens_per_s"], found.pop("answers")
                rate, answers = stock.setdefault(found["batch"], this)
                same = {"ratio": round(this[0] / rate, 4), "same_answers": this[1] == answers}
                setting = {"runner": runner, "graphs": graphs, "max_num_seqs": most, "form": form, "rank": rank}
                rows.append(setting | found | same)
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("drafter", nargs="?", help="plain drafter; zero adapters are made on the fly")
    parser.add_argument("--runners", nargs="+", default=["v1", "v2"])
    parser.add_argument("--graphs", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--max-num-seqs", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens per request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.85, help="vLLM's gpu_memory_utilization")
    parser.add_argument("--dry-run", action="store_true", help="V1, eager, two small batches: on a CPU too")
    parser.add_argument("--out", type=Path, help="also write the results here")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(ANSWER + json.dumps(measure(json.loads(args.job))), flush=True)
        return
    if args.dry_run:
        args.runners, args.graphs, args.max_num_seqs, args.batch = ["v1"], ["off"], [4], [1, 2]
        args.tokens, args.repeats, args.memory = 8, 1, 0.3
    with tempfile.TemporaryDirectory() as scratch:
        rows = compare(args, Path(scratch))
    if args.out:
        write_report(args.out, rows=rows)


if __name__ == "__main__":
    main()
