"""Serve a pair three times with the real `vllm serve` (target alone, plain drafter, steered drafter) and compare.

    python examples/demo.py                     the tiny pair of this repository, held-out prompts
    python examples/demo.py --pair qwen         Qwen2.5-Coder 1.5B / 0.5B, chat
    python examples/demo.py --pair DIR          your own: DIR/target, DIR/drafter, and DIR/steered or DIR/adapter
    python examples/demo.py --blocks            with the pair's block drafters as well: DIR/dflash, DIR/treeflash

Every answer is streamed through the `openai` client, one request at a time. Acceptance is read from the server's own
/metrics. Exit code 0 only if the steered server says that it steers and greedy text is the same in all of them.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError
from server import Server, ServerError, can_compile, has_gpu, serve

from vllm_steer.common.errors import SteeringError

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny_pair"
QWEN = Path.home() / ".cache" / "vllm-steer" / "qwen_pair"  # where qwen_pair/assemble.py writes
ZERO_RANK = 64
UNSPECULATED = "no speculation"
BLOCKS = {"DFlash, bigram": "dflash", "TreeFlash": "treeflash"}  # a drafter each, in a directory of the pair
WARM_UP = "Hello, this is the warm-up."
QUESTIONS = (
    "Write a Python function that merges two sorted lists.",
    "Write a Python class for a stack with push, pop and peek.",
    "Explain what this does: [x for row in m for x in row]",
    "Write a regular expression that matches an ISO date, and test it in Python.",
    "Write a bash loop that renames every .jpeg file to .jpg.",
    "Write a SQL query for the three best-paid employees of each department.",
)


@dataclass(frozen=True)
class Pair:
    """What is served: directories, prompts, and sizes that suit them."""

    target: Path
    drafter: Path
    steered: Path  # a steered drafter, or an adapter for `drafter`
    note: str  # what the steering is, for the reader
    prompts: tuple[str, ...]
    chat: bool
    max_model_len: int

    @property
    def adapter(self) -> bool:
        return not (self.steered / "config.json").is_file()


@dataclass
class Row:
    """What one server did."""

    name: str
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    start_seconds: float = 0.0
    acceptance_length: float = 1.0  # tokens per target forward
    acceptance: list[float] = field(default_factory=list)  # by draft position
    drafts: int = 0
    proof: str | None = None


def find_pair(name: str, scratch: Path) -> Pair:
    """Turn --pair into directories; assembles the Qwen pair where it is missing."""
    root = {"tiny": TINY, "qwen": QWEN}.get(name, Path(name))
    if name == "qwen" and not ((root / "target").is_dir() and (root / "drafter").is_dir()):
        print(f"the Qwen pair is not in {root}: assembling it once (about 1.6 GB to fetch, 5 minutes)", flush=True)
        subprocess.run([sys.executable, str(HERE / "qwen_pair" / "assemble.py"), "--out", str(root)], check=True)
    for part in ("target", "drafter"):
        if not (root / part / "config.json").is_file():
            raise ServerError(
                f"{root / part} is not a model directory: --pair takes tiny, qwen or a directory with one"
            )
    found = [root / part for part in ("steered", "adapter") if (root / part / "steering" / "config.json").is_file()]
    chat = not (root / "heldout.jsonl").is_file()
    if found:
        steered, note = found[0], f"trained steering from {found[0]}"
    else:
        steered = zero_adapter(root, scratch)
        note = f"no trained steering in {root}: a zero one of rank {ZERO_RANK}, so it must draft like the plain drafter"
    prompts = QUESTIONS
    if not chat:
        from vllm_steer.data.prompts import read_prompts

        prompts = tuple(found.prompt for found in read_prompts(str(root / "heldout.jsonl")))
    return Pair(root / "target", root / "drafter", steered, note, prompts, chat, max_model_len=2048 if chat else 1024)


def zero_adapter(root: Path, scratch: Path) -> Path:
    """An untrained steering for the pair in `root`: every delta is zero."""
    from vllm_steer.drafters.models import read_model_config
    from vllm_steer.drafters.steered import checkpoint
    from vllm_steer.drafters.steered.config import SteeringConfig
    from vllm_steer.drafters.steered.module import Steering

    configs = (read_model_config(root / part) for part in ("target", "drafter"))
    settings = SteeringConfig.for_models(*configs, rank=ZERO_RANK)
    print(f"writing a zero steering of rank {ZERO_RANK} ...", flush=True)
    checkpoint.save(scratch / "zero", Steering(settings))
    return scratch / "zero"


def ask(client: OpenAI, pair: Pair, prompt: str, args: argparse.Namespace, echo: bool) -> tuple[str, int]:
    """Stream one answer; returns its text and how many tokens it has."""
    common: dict[str, Any] = dict(
        model=str(pair.target),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=0,
        stream=True,
        stream_options={"include_usage": True},
    )
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
            text += piece
            if echo:
                print(piece.replace("\n", "\n  | "), end="", flush=True)
    return text, tokens


def measure(server: Server, name: str, pair: Pair, args: argparse.Namespace) -> Row:
    """Ask every prompt in turn and read the counters before and after."""
    row = Row(name, start_seconds=server.seconds, proof=server.proof_of_life())
    client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=args.timeout, max_retries=0)
    ask(client, pair, WARM_UP, args, echo=False)
    before = server.counters() if name != UNSPECULATED else None
    for number, prompt in enumerate(pair.prompts[: args.prompts], 1):
        if number == 1:
            print(f"  {prompt[-300:]!r}\n  | ", end="", flush=True)
        elif sys.stdout.isatty():
            print(f"\r  prompt {number} of {args.prompts}", end="", flush=True)
        began = time.monotonic()
        text, tokens = ask(client, pair, prompt, args, echo=number == 1)
        row.seconds += time.monotonic() - began
        row.tokens += tokens
        row.texts.append(text)
        if number == 1:
            print()
    if before is not None:
        count(row, before, server.counters())
    print(f"\r  {len(row.texts)} answers, {row.tokens} tokens, {row.tokens / row.seconds:.1f} tokens/s")
    return row


def count(row: Row, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fill in what was drafted and accepted between two readings of a server's counters."""
    row.drafts = after["drafts"] - before["drafts"]
    if row.drafts:
        row.acceptance_length = 1 + (after["accepted"] - before["accepted"]) / row.drafts
        at = zip(before["per_position"], after["per_position"], strict=True)
        row.acceptance = [(b - a) / row.drafts for a, b in at]


def run(name: str, pair: Pair, args: argparse.Namespace, logs: Path) -> Row:
    """Start one of the servers, measure it, stop it."""
    steered = name == "steered drafter"
    drafter = pair.steered if steered and not pair.adapter else pair.drafter
    speculative = {"model": str(drafter), "num_speculative_tokens": args.k} if name != UNSPECULATED else None
    if name in BLOCKS:
        speculative = {"method": "dflash", "model": str(pair.target.parent / BLOCKS[name])}
        speculative["num_speculative_tokens"] = args.k
    additional = {"vllm_steer": {"adapter": str(pair.steered)}} if steered and pair.adapter else None
    options = ["--dtype", "float32", "--max-model-len", str(pair.max_model_len), "--max-num-seqs", "8"]
    if not has_gpu():
        options += ["--gpu-memory-utilization", "0.5"]  # there it is a share of the machine's memory
        options += [] if can_compile() else ["--enforce-eager"]
    shown = [f"--speculative-config '{json.dumps(speculative)}'"] if speculative else []
    shown += [f"--additional-config '{json.dumps(additional)}'"] if additional else []
    print(f"\n== {name}: vllm serve {pair.target} {' '.join(options + shown)}", flush=True)

    def waiting(seconds: float) -> None:
        if sys.stdout.isatty():
            print(f"\r  starting ({'/-|'[int(seconds) % 3]} {seconds:.0f} s)", end="", flush=True)

    log = logs / f"{name.replace(' ', '-')}.log"
    with serve(
        pair.target,
        log,
        *options,
        speculative=speculative,
        additional=additional,
        timeout=args.timeout,
        waiting=waiting,
    ) as server:
        print(f"\r  ready after {server.seconds:.0f} s")
        if steered:
            print(f"  vllm.steer: {server.proof_of_life() or 'NOT STEERED'}")
        return measure(server, name, pair, args)


def report(rows: list[Row], k: int) -> None:
    """Print the table."""
    print(f"\n{'':16} {'acceptance':>10}   {'acceptance rate at draft position':<{6 * k}} {'tokens':>7}")
    print(f"{'':16} {'length':>10}   {''.join(f'{i:<6}' for i in range(1, k + 1))} {'per s':>7}")
    for row in rows:
        accepted = "".join(f"{share:<6.2f}" for share in row.acceptance) or "-"
        print(f"{row.name:16} {row.acceptance_length:>10.2f}   {accepted:<{6 * k}} {row.tokens / row.seconds:>7.1f}")


def verdict(rows: list[Row], greedy: bool) -> list[str]:
    """What is wrong with the result; empty when nothing is."""
    alone, _, steered = rows[:3]
    wrong = [] if steered.proof else ["the steered server never said that steering is on"]
    if steered.drafts == 0:
        wrong.append("the steered server drafted nothing")
    if not greedy:
        print("\nsampled text differs from run to run, so it is not compared (--temperature 0 compares it)")
        return wrong
    for row in rows[1:]:
        differ = [i for i, (a, b) in enumerate(zip(alone.texts, row.texts, strict=True), 1) if a != b]
        if differ:
            wrong.append(f"{row.name}: text differs from no speculation for prompts {differ}")
    if not wrong:
        print(f"\nsame text from all {len(rows)} servers for all {len(alone.texts)} prompts: yes")
    return wrong


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="tiny", help="tiny, qwen, or a directory (default: tiny)")
    parser.add_argument("--blocks", action="store_true", help="serve the pair's block drafters as well")
    parser.add_argument("--k", type=int, default=5, help="draft tokens per block (default: 5)")
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


def main() -> int:
    """Run the servers; returns the exit code."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    logs = Path(tempfile.mkdtemp(prefix="vllm-steer-demo-"))
    try:
        pair = find_pair(args.pair, logs)
        args.prompts = min(args.prompts or (3 if pair.chat else 12), len(pair.prompts))
        args.max_tokens = args.max_tokens or (64 if pair.chat else 48)
        print(f"pair: {args.pair}; {pair.note}\nserver logs: {logs}")
        if not has_gpu() and not can_compile():
            print("no C++ compiler or no Python headers here: vLLM runs with --enforce-eager, not compiled")
        names = [UNSPECULATED, "plain drafter", "steered drafter"]
        if args.blocks:
            names += [name for name, part in BLOCKS.items() if (pair.target.parent / part / "config.json").is_file()]
        rows = [run(name, pair, args, logs) for name in names]
    except (ServerError, SteeringError, OpenAIError, OSError, subprocess.CalledProcessError) as error:
        print(f"\ndemo failed: {error}\nserver logs: {logs}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; server logs: {logs}", file=sys.stderr)
        return 130
    report(rows, args.k)
    if args.pair == "tiny":
        print("\nThis target costs hardly more per token than its drafter: drafting cannot pay in tokens/s here.")
        print("Acceptance length is what carries over to a large target.")
    if args.json:
        args.json.write_text(json.dumps({"k": args.k, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    wrong = verdict(rows, greedy=args.temperature == 0)
    for sentence in wrong:
        print(f"WRONG: {sentence}; server logs: {logs}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
