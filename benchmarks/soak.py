"""Soak a steered server: concurrent clients, ragged requests, disconnects, a tiny KV cache; every answer is checked.

In order:
    alone     `vllm serve TARGET` answers every prompt greedily: what must come back
    soak      `vllm serve TARGET` with the steered drafter and a KV cache for a few requests; each client sends request
              after request, a random prompt and length, streamed, and leaves some of them after a random token
    settled   nothing may be running or waiting, and no KV block may be held

Every token that arrived must be the target's own. Memory is that of all processes of the server, once a second; growth
is a straight line through what follows the warm-up, the first half.

    python benchmarks/soak.py examples/tiny_pair/target examples/tiny_pair/steered examples/tiny_pair/heldout.jsonl \
        --requests 2000 --clients 16 --json soak.json --plot soak.png

`--stock` takes a plain drafter instead: what of the memory's growth is vLLM's own. `--runner v2` without a GPU runs on
Triton's interpreter (`make triton`), slowly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from record import write_report

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("examples", "tests/support")]
from engines import server_env  # noqa: E402
from server import Server, serve  # noqa: E402

LONGEST = 128  # new tokens of a request, at most
WARM_UP = 0.5  # share of the run in which memory may grow
GAUGES = {"running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting",
          "kv": "vllm:kv_cache_usage_perc", "preempted": "vllm:num_preemptions_total"}  # fmt: skip


@dataclass
class Tally:
    """What the clients saw."""

    whole: int = 0
    left: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.whole + self.left + len(self.wrong) + len(self.errors)


def gauges(server: Server) -> dict[str, float]:
    """Requests running and waiting, share of the KV cache held, preemptions so far."""
    samples = server.metrics()
    return {key: sum(sample.value for sample in samples if sample.name == wanted) for key, wanted in GAUGES.items()}


def resident(server: Server) -> float:
    """Memory of the server's processes in MiB (all of its session)."""
    total = 0
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and os.getsid(int(process.name)) == server.process.pid:
                total += int((process / "statm").read_text().split()[1])
        except (OSError, ProcessLookupError):
            continue  # it ended just now
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


async def stream(client: Any, prompt: list[int], tokens: int, leave: int | None) -> list[int]:
    """Token ids of one greedy answer; with `leave`, of an answer given up after so many."""
    found: list[int] = []
    answer = await client.completions.create(
        model="model", prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    async for chunk in answer:
        for choice in chunk.choices:
            found += choice.token_ids or []
        if leave is not None and len(found) >= leave:
            await answer.close()  # closes the connection: the server notices and aborts
            break
    return found


async def one(client: Any, prompts: list[list[int]], want: list[list[int]], args: Any, rng: random.Random, t: Tally):
    """One request: made up, sent, checked."""
    i, tokens = rng.randrange(len(prompts)), rng.randint(1, LONGEST)
    leave = rng.randint(1, tokens) if rng.random() < args.abort else None
    try:
        found = await stream(client, prompts[i], tokens, leave)
    except Exception as error:  # any failure is one too many; it is told at the end
        t.errors.append(f"prompt {i}, {tokens} tokens: {type(error).__name__}: {error}")
        return
    complete = len(found) == tokens if leave is None else leave <= len(found) <= tokens
    if not complete or found != want[i][: len(found)]:
        t.wrong.append({"prompt": i, "tokens": tokens, "leave": leave, "found": found})
    elif leave is None:
        t.whole += 1
    else:
        t.left += 1


async def soak(server: Server, prompts: list[list[int]], want: list[list[int]], args: Any) -> tuple[Tally, list[dict]]:
    from openai import AsyncOpenAI
    from tqdm import tqdm

    client = AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=600, max_retries=0)
    tally, watched, began = Tally(), [], time.monotonic()
    bar = tqdm(total=args.requests, unit="request")
    queue = iter(range(args.requests))

    async def work(number: int) -> None:
        rng = random.Random(f"{args.seed}:{number}")
        for _ in queue:
            await one(client, prompts, want, args, rng, tally)
            bar.update()
            bar.set_postfix(wrong=len(tally.wrong), errors=len(tally.errors), refresh=False)

    async def watch() -> None:
        while True:
            now = await asyncio.to_thread(lambda: {"memory_mib": round(resident(server), 1)} | gauges(server))
            watched.append({"second": round(time.monotonic() - began, 1), "requests": tally.done} | now)
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(work(number) for number in range(args.clients)))
    bar.close()
    await client.close()
    for _ in range(60):  # aborts reach the engine a step later
        if not any(gauges(server)[key] for key in ("running", "waiting", "kv")):
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(2)
    watcher.cancel()
    return tally, watched


def growth(watched: list[dict[str, Any]], requests: int) -> float:
    """MiB per 1,000 requests after the warm-up: the slope of a straight line."""
    import numpy as np

    later = [w for w in watched if w["requests"] >= WARM_UP * requests]
    return 1000 * float(np.polyfit([w["requests"] for w in later], [w["memory_mib"] for w in later], 1)[0])


def plot(path: Path, watched: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(8, 6))
    for axis, key, label in zip(
        axes, ("memory_mib", "running", "kv"), ("memory, MiB", "running", "KV used"), strict=True
    ):
        axis.plot([w["requests"] for w in watched], [w[key] for w in watched], linewidth=1)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("requests answered")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("drafter", type=Path, help="steered drafter; with --stock a plain one")
    parser.add_argument("prompts", type=Path, help='JSONL of {"prompt": text}')
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16, help="requests in flight")
    parser.add_argument("--abort", type=float, default=0.25, help="share of requests that are left")
    parser.add_argument("--limit", type=int, default=96, help="prompts used")
    parser.add_argument("--kv-blocks", type=int, default=48, help="KV blocks of 32 tokens in all")
    parser.add_argument("--k", type=int, default=5, help="drafts per block")
    parser.add_argument("--tree", help="draft trees: children of every node by depth, e.g. 4,1,1,1,1 (--k 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1", help="vLLM's model runner")
    parser.add_argument("--stock", action="store_true", help="do not steer")
    parser.add_argument("--args", nargs=argparse.REMAINDER, default=[], help="further options of `vllm serve`, last")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    from vllm_steer.common.tree_shape import TreeShape
    from vllm_steer.data.prompts import encode_prompt, read_prompts
    from vllm_steer.drafters.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(args.target)
    found = read_prompts(str(args.prompts))[: args.limit]
    prompts = [encode_prompt(tokenizer, prompt.prompt, tools=prompt.tools) for prompt in found]
    common = ("--served-model-name", "model", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager",
              "--gpu-memory-utilization", "0.3", "--block-size", "32", *args.args)  # fmt: skip
    tiny = ["--num-gpu-blocks-override", str(args.kv_blocks), "--max-num-seqs", "8"]
    if args.tree:
        tiny += ["--additional-config", json.dumps({"vllm_steer": {"tree": list(TreeShape.parse(args.tree).widths)}})]
    with tempfile.TemporaryDirectory() as folder:
        env = server_env(args.runner, Path(folder))
        with serve(args.target, Path(folder) / "alone.log", *common, env=env) as server:
            want = asyncio.run(alone(server, prompts))
        spec = {"model": str(args.drafter), "num_speculative_tokens": args.k}
        with serve(args.target, Path(folder) / "soak.log", *common, *tiny, speculative=spec, env=env) as server:
            if bool(server.proof_of_life()) == args.stock:
                sys.exit("the server steers, --stock" if args.stock else "the server does not steer")
            began = time.monotonic()
            tally, watched = asyncio.run(soak(server, prompts, want, args))
            seconds, counters = time.monotonic() - began, server.counters()
            alive = server.process.poll() is None
    last, grown = watched[-1], growth(watched, args.requests)
    held = {key: last[key] for key in ("running", "waiting", "kv")}
    figures = {
        "requests": tally.done, "whole": tally.whole, "left": tally.left, "wrong": len(tally.wrong),
        "errors": len(tally.errors), "seconds": round(seconds), "preemptions": last["preempted"],
        "acceptance_length": round(1 + counters["accepted"] / counters["drafts"], 3), "held_at_the_end": held,
        "memory_mib": [watched[0]["memory_mib"], last["memory_mib"]], "growth_mib_per_1000_requests": round(grown, 2),
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    for text in [*tally.errors[:5], *map(json.dumps, tally.wrong[:5])]:
        print(text[:500], file=sys.stderr)
    if args.json:
        write_report(args.json, **figures, watched=watched[:: 1 + len(watched) // 250])
    if args.plot:
        plot(args.plot, watched)
    good = alive and not tally.wrong and not tally.errors and not any(held.values()) and tally.done == args.requests
    return 0 if good else 1


async def alone(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    """The target's own greedy answers, LONGEST tokens each."""
    from openai import AsyncOpenAI

    gate = asyncio.Semaphore(8)
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=600, max_retries=0) as client:

        async def ask(prompt: list[int]) -> list[int]:
            async with gate:
                return await stream(client, prompt, LONGEST, None)

        return list(await asyncio.gather(*map(ask, prompts)))


if __name__ == "__main__":
    sys.exit(main())
