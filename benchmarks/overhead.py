"""What steering costs: a steered engine with zero weights against stock `draft_model`, tokens per second.

Zero weights make both engines draft the same tokens and take the same number of steps, so the ratio of their speeds
is the cost of steering alone: states, guides, deltas, injection. The engines take turns, stock, steered, steered,
stock, each in a process of its own (two of a real pair do not fit into one small machine), so slow drift of the
machine hits both. Prints one ratio per batch size, from the median of each turn, and the ratio of either half.

    python benchmarks/overhead.py TARGET DRAFTER --rank 64 --batch 1 8
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing as mp
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
TEXT = "def read_lines(path, limit=None):\n    "


def zero_adapter(target: str, drafter: str, rank: int | None, layers: str, directory: Path) -> Path:
    """An adapter over `drafter` whose deltas are all zero."""
    from transformers import AutoConfig

    from vllm_steer import checkpoint
    from vllm_steer.config import SteeringConfig, default_target_layers, drafter_shape, target_shape
    from vllm_steer.steering import Steering

    big, small = (AutoConfig.from_pretrained(path) for path in (target, drafter))
    steered = range(small.num_hidden_layers) if layers == "all" else map(int, layers.split(","))
    config = SteeringConfig(
        target_shape(target, big),
        drafter_shape(drafter, small),
        default_target_layers(big.num_hidden_layers),
        tuple(steered),
        rank,
    )
    checkpoint.save(directory, Steering(config))
    return directory


def turn(pipe: Any, args: argparse.Namespace, adapter: Path | None) -> None:
    """Engine process: send {batch: [tokens per second, one for each round]}."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.target,
        speculative_config={"model": args.drafter, "num_speculative_tokens": args.k},
        additional_config={"vllm_steer": {"adapter": str(adapter)}} if adapter else {},
        dtype=args.dtype,
        max_model_len=512,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=512,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    speeds: dict[int, list[float]] = {batch: [] for batch in args.batch}
    for batch in args.batch:
        prompts = [f"# module {i}\n{TEXT}" for i in range(batch)]
        for round_number in range(args.rounds + 1):
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            if round_number:  # the first is a warm-up
                speeds[batch].append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
    pipe.send(speeds)


def take_turn(args: argparse.Namespace, adapter: Path | None) -> dict[int, float]:
    """Median tokens per second for every batch size, from an engine of its own."""
    context = mp.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=turn, args=(there, args, adapter))
    process.start()
    there.close()
    try:
        speeds = here.recv()
    except EOFError:
        sys.exit("the engine process died: its output is above; if there is none, the machine ran out of memory")
    finally:
        process.join(60)
        process.kill()
    return {batch: statistics.median(values) for batch, values in speeds.items()}


def compare(args: argparse.Namespace, adapter: Path) -> list[dict[str, Any]]:
    """Stock, steered, steered, stock: one row per batch size."""
    a, b, c, d = (take_turn(args, which) for which in (None, adapter, adapter, None))
    rows = []
    for batch in args.batch:
        stock, steered = (a[batch] + d[batch]) / 2, (b[batch] + c[batch]) / 2
        halves = sorted((b[batch] / a[batch], c[batch] / d[batch]))
        rows.append(
            {
                "batch": batch,
                "stock_tokens_per_s": round(stock, 3),
                "steered_tokens_per_s": round(steered, 3),
                "ratio": round(steered / stock, 4),
                "ratio_of_halves": [round(x, 4) for x in halves],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", help="plain drafter; a zero adapter is made on the fly")
    parser.add_argument("--rank", type=int, default=None, help="rank of the zero steering (default: full rank)")
    parser.add_argument("--layers", default="all", help="steered drafter layers, e.g. 20,21,22 (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--k", type=int, default=5, help="draft length")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs per turn and batch size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="enforce_eager: no torch.compile in either engine")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    os.environ.update(ENV)
    with tempfile.TemporaryDirectory() as folder:
        adapter = zero_adapter(args.target, args.drafter, args.rank, args.layers, Path(folder))
        results = compare(args, adapter)
    for r in results:
        print(
            f"batch {r['batch']}: stock {r['stock_tokens_per_s']:.2f} tokens/s, steered "
            f"{r['steered_tokens_per_s']:.2f}, ratio {r['ratio']:.3f} (halves {r['ratio_of_halves'][0]:.3f}, "
            f"{r['ratio_of_halves'][1]:.3f})"
        )
    if args.json:
        import torch
        import vllm

        report = {
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "runner": "V1, CPU",
            "rank": args.rank or "full",
            "compiled": not args.eager,
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
