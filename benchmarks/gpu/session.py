"""What to run on the day a GPU is lent, in steps of ten minutes at most; each writes its results as it goes.

    PYTHONPATH=. python benchmarks/gpu/session.py --out DIR                       # every step this machine can run
    PYTHONPATH=. python benchmarks/gpu/session.py kernels train --pair DIR --out DIR
    PYTHONPATH=. python benchmarks/gpu/session.py --list --pair DIR --out DIR     # the commands; why some are skipped

    kernels   the kernels against float64, launches and waits of a round, times        needs torch alone
    parity    tests of drafts and losslessness, both runners, eager and compiled       needs a vLLM of patching.RELEASES
    cost      unsteered, scale 0, steered; batches; with and without graphs            needs that vLLM and --pair
    train     an adapter on DIR/responses.jsonl (2M tokens are meant), then bench      needs --pair, for bench that vLLM

A step that cannot run is skipped by name, with the reason. Wheels that the machine lacks travel in pieces: carry.py.
The exit code is 1 if a step fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import write_report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 600  # seconds for one command


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other; what they need beyond torch."""

    commands: tuple[str, ...]
    vllm: bool = False
    pair: bool = False


def steps(pair: Path | None, out: Path) -> dict[str, Step]:
    """Every step, by name."""
    python, cli = shlex.quote(sys.executable), f"{shlex.quote(sys.executable)} -m vllm_steer.cli"
    folder = pair or HERE  # without a pair these steps are skipped
    target, drafter, data, where = (
        shlex.quote(str(p)) for p in (folder / "target", folder / "drafter", folder / "responses.jsonl", out)
    )
    pytest = f"{python} -m pytest -q -m 'not real_pair' --junitxml {where}"
    return {
        "kernels": Step(
            (
                f"{python} {HERE}/kernels.py --out {where}/gpu_kernels.json",
                f"{pytest}/gpu_round.xml tests/unit/serving/test_injection.py -m gpu",
            )
        ),
        "parity": Step(
            (
                f"{pytest}/gpu_parity.xml tests/engine/test_parity.py -k 'drafts_are_those or compiled'",
                f"{pytest}/gpu_lossless.xml tests/engine/test_lossless.py",
            ),
            vllm=True,
        ),
        "trees": Step(
            (f"{pytest}/gpu_trees.xml tests/engine/test_trees.py",),
            vllm=True,
        ),
        "cost": Step(
            (f"{python} {HERE}/cost.py {target} {drafter} --out {where}/gpu_cost.json",),
            vllm=True,
            pair=True,
        ),
        "train": Step(
            (
                f"{cli} train --target {target} --drafter {drafter} --data {data} --mode steer "
                f"--rank 64 --precision bfloat16 --batch-size 16 --steps 2000 --save-every 500 "
                f"--output {where}/adapter",
                f"{cli} bench --target {target} --drafters plain={drafter} adapter={where}/adapter+{drafter} "
                f"--prompts builtin --split test --max-tokens 128 --output {where}/bench",
            ),
            pair=True,
        ),
    }


def why_not(step: Step, pair: Path | None) -> str | None:
    """Why a step cannot run on this machine; None: it can."""
    from vllm_steer.serving import patching

    if step.pair and pair is None:
        return "no --pair: examples/qwen_pair/assemble.py makes one"
    if step.vllm:
        try:
            version = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            return "vLLM is not installed here: carry.py brings its wheel"
        if not patching.known(version):
            return f"vLLM {version} is here, {patching.WORKS_WITH} is needed"
    return None


def run(name: str, step: Step, out: Path) -> dict[str, object]:
    """Run a step's commands in the repository's root; stops at the first that fails or runs for more than LIMIT."""
    began, codes = time.monotonic(), []
    with (out / f"{name}.log").open("a", encoding="utf-8") as log:
        for command in step.commands:
            print(f"[{name}] {command}", flush=True)
            try:
                done = subprocess.run(command, shell=True, cwd=ROOT, stdout=log, stderr=log, timeout=LIMIT, check=False)
                codes.append(done.returncode)
            except subprocess.TimeoutExpired:
                codes.append(124)
            if codes[-1]:
                print(f"[{name}] failed with {codes[-1]}: {log.name}", flush=True)
                break
    return {"commands": list(step.commands), "exit_codes": codes, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all that can run")
    parser.add_argument(
        "--pair", type=Path, help="directory with target/ and drafter/, for `train` responses.jsonl too"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for results and logs")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    args = parser.parse_args()
    known = steps(args.pair, args.out)
    if unknown := set(args.steps) - known.keys():
        parser.error(f"unknown step {', '.join(sorted(unknown))}; allowed are {', '.join(known)}")
    report: dict[str, object] = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.steps or known:
        reason = why_not(known[name], args.pair)
        if reason is not None:
            print(f"[{name}] skipped: {reason}", flush=True)
            report[name] = {"skipped": reason}
        elif args.list:
            print("\n".join(f"[{name}] {command}" for command in known[name].commands))
        else:
            report[name] = run(name, known[name], args.out)
            write_report(args.out / "session.json", steps=report)  # as it goes: a machine may be taken away
    return int(any(any(found.get("exit_codes", ())) for found in report.values()))


if __name__ == "__main__":
    raise SystemExit(main())
