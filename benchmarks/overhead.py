"""What steering costs: a steered engine with zero weights against stock `draft_model`, tokens per second.

Zero weights make both engines draft the same tokens and take the same number of steps, so the ratio of their speeds
is the cost of steering alone: states, guides, deltas, injection. Both engines live side by side in processes of their
own and answer in turn (A B B A ...), so drift of the machine hits both. Prints one ratio per batch size: the median
over rounds, and the lowest and highest.

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


def engine(pipe: Any, args: argparse.Namespace, adapter: Path | None) -> None:
    """Engine process: answers (batch size) with (tokens, seconds) until told to stop."""
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
        gpu_memory_utilization=0.4,
        seed=0,
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    pipe.send("ready")
    while batch := pipe.recv():
        prompts = [f"# module {i}\n{TEXT}" for i in range(batch)]
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        pipe.send((sum(len(o.outputs[0].token_ids) for o in outputs), seconds))


def start(args: argparse.Namespace, adapter: Path | None) -> Any:
    here, there = mp.get_context("spawn").Pipe()
    mp.get_context("spawn").Process(target=engine, args=(there, args, adapter), daemon=True).start()
    there.close()
    assert here.recv() == "ready"
    return here


def compare(stock: Any, steered: Any, batch: int, rounds: int) -> dict[str, Any]:
    """Interleaved runs of both engines on one batch size; the first run of each is thrown away."""
    speeds: dict[str, list[float]] = {"stock": [], "steered": []}
    pipes = {"stock": stock, "steered": steered}
    for i in range(rounds + 1):
        for name in ("stock", "steered") if i % 2 else ("steered", "stock"):
            pipes[name].send(batch)
            tokens, seconds = pipes[name].recv()
            if i:
                speeds[name].append(tokens / seconds)
    ratios = [b / a for a, b in zip(speeds["stock"], speeds["steered"], strict=True)]
    median = {name: round(statistics.median(values), 3) for name, values in speeds.items()}
    found = {"batch": batch, "tokens_per_s": median, "ratio": round(statistics.median(ratios), 4)}
    return found | {"ratio_low": round(min(ratios), 4), "ratio_high": round(max(ratios), 4), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", help="plain drafter; a zero adapter is made for it on the fly")
    parser.add_argument("--rank", type=int, default=None, help="rank of the zero steering (default: full rank)")
    parser.add_argument("--layers", default="all", help="steered drafter layers, e.g. 20,21,22 (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--k", type=int, default=5, help="draft length")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="enforce_eager: no torch.compile in either engine")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    os.environ.update(ENV)
    with tempfile.TemporaryDirectory() as folder:
        adapter = zero_adapter(args.target, args.drafter, args.rank, args.layers, Path(folder))
        stock, steered = start(args, None), start(args, adapter)
        results = []
        for batch in args.batch:
            results.append(compare(stock, steered, batch, args.rounds))
            r = results[-1]
            print(
                f"batch {batch}: stock {r['tokens_per_s']['stock']:.2f} tokens/s, steered "
                f"{r['tokens_per_s']['steered']:.2f}, ratio {r['ratio']:.3f} [{r['ratio_low']:.3f}, "
                f"{r['ratio_high']:.3f}] over {r['rounds']} rounds",
                flush=True,
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
