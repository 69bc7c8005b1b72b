"""Log, train, swap: adapt a running server's steering to the traffic it gets, without a restart.

    python examples/adapt.py                    the tiny pair, trained on Python, gets C
    python examples/adapt.py --work DIR         keep the log and the adapter there

1. serve the pair with its adapter and the live switch, and measure acceptance on C and on Python it has not seen
2. ask for completions of other C files, and log them as a gateway would: {"request", "response"}, one a line
3. `vllm-steer train --mode steer` on the log
4. load the adapter into the running server, and measure again; then roll back by name

C is what Python's own headers have (PSF licence). Acceptance is from the server's /metrics. Exit code 0 only if the
greedy text of every answer is the same under both adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from server import Server, serve

PAIR = Path(__file__).resolve().parent / "tiny_pair"
NAME, SERVED = "traffic", "tiny"  # of the new adapter, and of the model
AT_ONCE = 8
LENGTH = 220  # characters of a prompt
SWITCH = ("--worker-extension-cls", "vllm_steer.serving.scale.Switch")
OPTIONS = ("--served-model-name", SERVED, "--max-model-len", "512", "--max-num-seqs", str(AT_ONCE))


@dataclass
class Sizes:
    """How much is asked and trained."""

    logged: int = 480
    measured: int = 48
    tokens: int = 96
    steps: int = 500


def c_prompts(count: int, held_out: bool) -> list[str]:
    """Beginnings of C declarations: from every fourth of Python's headers, or from the others."""
    files = sorted(Path(sysconfig.get_path("include")).rglob("*.h"))
    if not files:
        raise SystemExit("there are no C headers of Python here: install its development files (python3-dev)")
    found = []
    for file in (file for i, file in enumerate(files) if (i % 4 == 0) == held_out):
        text = file.read_text(encoding="utf-8", errors="replace")
        starts = [i + 1 for i, char in enumerate(text) if char == "\n" and text[i + 1 : i + 2].isalpha()]
        found += [text[start : start + LENGTH] for start in starts if start + 2 * LENGTH < len(text)]
    return random.Random(0).sample(found, count)


def python_prompts(count: int) -> list[str]:
    """The pair's own held-out prompts."""
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def complete(server: Server, prompts: list[str], tokens: int, temperature: float) -> list[dict[str, Any]]:
    """One exchange for each prompt, as a gateway sees it."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def ask(i: int) -> dict[str, Any]:
        request = {"model": SERVED, "prompt": prompts[i], "max_tokens": tokens, "temperature": temperature, "seed": i}
        return {"request": request, "response": client.completions.create(**request).model_dump(mode="json")}

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, range(len(prompts))))


def measure(server: Server, prompts: list[str], tokens: int) -> tuple[float, list[str]]:
    """Acceptance length by the server's counters, and the greedy texts."""
    before = server.counters()
    texts = [exchange["response"]["choices"][0]["text"] for exchange in complete(server, prompts, tokens, 0.0)]
    after = server.counters()
    return 1 + (after["accepted"] - before["accepted"]) / (after["drafts"] - before["drafts"]), texts


def train(log: Path, output: Path, steps: int) -> None:
    """An adapter for the pair's drafter, on the log."""
    command = [sys.executable, "-m", "vllm_steer.cli", "train", "--mode", "steer", "--loss", "kl", "--lr", "3e-3"]
    command += ["--target", str(PAIR / "target"), "--drafter", str(PAIR / "drafter"), "--log-model", SERVED]
    command += ["--data", str(log), "--steps", str(steps), "--target-layers", "1", "2", "3", "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def adapt(work: Path, sizes: Sizes, env: dict[str, str] | None = None, *options: str) -> dict[str, Any]:
    """The loop; returns acceptance lengths by traffic and adapter, and whether all greedy texts were the same."""
    traffic = {"C": c_prompts(sizes.measured, held_out=True), "Python": python_prompts(sizes.measured)}
    spec = {"model": str(PAIR / "drafter"), "num_speculative_tokens": 5, "draft_sample_method": "probabilistic"}
    own = {"vllm_steer": {"adapter": str(PAIR / "adapter"), "adapters": str(work / "adapters")}}
    (work / "adapters").mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    texts: dict[str, dict[str, list[str]]] = {}
    with serve(
        PAIR / "target", work / "server.log", *OPTIONS, *SWITCH, *options,
        speculative=spec, additional=own, env={"VLLM_SERVER_DEV_MODE": "1"} | (env or {}),
    ) as server:  # fmt: skip

        def look(adapter: str) -> None:
            for name, prompts in traffic.items():
                length, said = measure(server, prompts, sizes.tokens)
                found.setdefault(name, {})[adapter] = length
                texts.setdefault(name, {})[adapter] = said
                print(f"{name}, {adapter}: {length:.3f} tokens per block", flush=True)

        look("initial")
        print(f"logging {sizes.logged} exchanges", flush=True)
        exchanges = complete(server, c_prompts(sizes.logged, held_out=False), sizes.tokens, 1.0)
        (work / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in exchanges), encoding="utf-8")
        print(f"training {sizes.steps} steps on the log", flush=True)
        train(work / "log.jsonl", work / "adapters" / NAME, sizes.steps)
        for name in (NAME, "initial"):
            print(f"swap: {server.steer(adapter=name)}", flush=True)
            if name == NAME:
                look(name)
    same = all(said["initial"] == said[NAME] for said in texts.values())
    return found | {"same_text": same}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="directory for the log and the adapter (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="of training (default: %(default)s)")
    parser.add_argument("--logged", type=int, default=Sizes.logged, help="exchanges to log (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = adapt(args.work or Path(scratch), Sizes(logged=args.logged, steps=args.steps))
    print(json.dumps(found, indent=2))
    return 0 if found["same_text"] else 1


if __name__ == "__main__":
    sys.exit(main())
