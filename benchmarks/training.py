"""What a training step costs: tokens per second and peak memory of each mode, beside a plain Hugging Face step.

The plain step is next-token training of the drafter alone on the same batches: what anybody's fine-tuning costs. Each
row runs in a process of its own, so that peak memory is its own; with --cache the states are computed beforehand.

    python benchmarks/training.py examples/tiny_pair/target examples/tiny_pair/drafter
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_report

ROWS = ("plain", "distill", "steer", "joint", "distill + cache", "steer + cache", "joint + cache", "top layer + cache")


def measure(args: argparse.Namespace, name: str, folder: str) -> dict[str, Any]:
    """Seconds per step after a few to warm up, and this process's peak memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_steer.training import pair, trainer

    torch.set_num_threads(args.threads)
    rng = random.Random(0)
    vocabulary = len(AutoTokenizer.from_pretrained(args.target))
    lines = [[rng.randrange(vocabulary) for _ in range(args.length)] for _ in range(40 + 8)]
    data = Path(folder) / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt_ids": x[:8], "response_ids": x[8:]}) + "\n" for x in lines))
    mode, _, cache = name.partition(" + ")
    stamps: list[float] = []
    if mode == "plain":
        model = AutoModelForCausalLM.from_pretrained(args.drafter, dtype=torch.float32).to(device())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for step in range(args.steps + 1):
            stamps.append(now())
            batch = torch.tensor(lines[step % 5 * args.batch :][: args.batch], device=model.device)
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        top = AutoModelForCausalLM.from_pretrained(args.drafter).config.num_hidden_layers - 1
        config = trainer.TrainConfig(
            target=args.target,
            drafter=args.drafter,
            data=(str(data),),
            output=str(Path(folder) / name),
            mode="steer" if mode == "top layer" else mode,
            steered_layers=(top,) if mode == "top layer" else None,
            rank=args.rank,
            batch_size=args.batch,
            steps=args.steps + 1,
            save_every=10 * args.steps,
            cache=str(Path(folder) / ("trunk" if mode == "top layer" else "states")) if cache else None,
        )
        sources = pair.guide_sources  # called once a forward, at its start

        def stamped(*given: Any) -> torch.Tensor:
            stamps.append(now())
            return sources(*given)

        pair.guide_sources = stamped
        trainer.train(config)
    seconds = sorted(b - a for a, b in itertools.pairwise(stamps))
    middle = seconds[len(seconds) // 2]
    with open("/proc/self/status", encoding="ascii") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    found = {"row": name, "tokens_per_s": round(args.batch * args.length / middle, 1), "peak_bytes": peak}
    return found | ({"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter")
    parser.add_argument("--rank", type=int, default=None, help="rank of the steering (default: full rank)")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows:
            with mp.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(measure, (args, name, folder)))
            ratio = results[-1]["tokens_per_s"] / results[0]["tokens_per_s"]
            memory = results[-1].get("peak_gpu_bytes", results[-1]["peak_bytes"]) / 2**30
            print(f"{name:18} {results[-1]['tokens_per_s']:8.0f} tokens/s ({ratio:.2f} of {args.rows[0]}), "
                  f"peak {memory:.2f} GiB", flush=True)  # fmt: skip
    if args.json:
        write_report(args.json, results=results)


if __name__ == "__main__":
    main()
