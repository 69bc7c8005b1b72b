"""What the plugin does on other releases of vLLM, each installed into an environment of its own by the Makefile.

    python tests/support/versions.py 0.32.0 0.31.0:2.13.0 0.25.1:2.11.0 --output versions.json

A release is VLLM or VLLM:TORCH (CPU builds), or the path of a Python that has one and this plugin. In each environment
real engines answer two prompts of the tiny pair, each in a process of its own: the target alone, then

    plain      an unsteered drafter: must answer like the target, whatever the release
    steered    a steered drafter: must answer like the target and be steered, or be refused with our sentence
    disabled   the same with STEER_DISABLE=1: must answer like the target
    broken     a plain drafter while the plugin cannot start: must answer like the target
    served     a plain drafter behind `vllm serve`, which loads more groups of plugins: the same; then broken too

The exit code is 1 if one of them does something else. An environment that is there already is used again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from engines import ENV, runner_env
from repository import ROOT

PAIR = ROOT / "examples" / "tiny_pair"
SERVED = {"STEER_TEST_SERVED": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
BROKEN = {"STEER_TEST_BROKEN": "1"}
CASES = {
    "alone": (None, {}),
    "plain": ("drafter", {}),
    "steered": ("steered", {}),
    "disabled": ("steered", {"STEER_DISABLE": "1"}),
    "broken": ("drafter", BROKEN),
    "served": ("drafter", SERVED),
    "served, broken": ("drafter", SERVED | BROKEN),
}
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "gpu_memory_utilization": 0.3}
NEW = 32
REFUSALS = ("vllm-steer works with", "has no place for steering")


def answer(drafter: str | None) -> dict[str, Any]:
    """In the environment of a release: the tokens of one engine, and every seam."""
    import vllm

    spec = drafter and {"model": str(PAIR / drafter), "num_speculative_tokens": 5}
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    prompts = [json.loads(line)["prompt"] for line in lines]
    if os.environ.get("STEER_TEST_SERVED"):
        return {"vllm": vllm.__version__, "tokens": answer_of_a_server(spec, prompts)}
    llm = vllm.LLM(str(PAIR / "target"), speculative_config=spec, enforce_eager=True, **ENGINE)
    outs = llm.generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=NEW))
    found = {"vllm": vllm.__version__, "tokens": [list(o.outputs[0].token_ids) for o in outs]}
    if not os.environ.get("STEER_TEST_BROKEN"):
        from vllm_steer.serving import patching

        found["seams"] = patching.ways()
    return found


def answer_of_a_server(spec: dict[str, Any] | None, prompts: list[str]) -> list[list[int]]:
    sys.path.append(str(ROOT / "examples"))
    from server import serve

    options = [f"--{key.replace('_', '-')}={value}" for key, value in ENGINE.items()]
    tokens = []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with serve(PAIR / "target", log, "--enforce-eager", *options, speculative=spec) as server:
            for prompt in prompts:
                body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
                head = {"Content-Type": "application/json"}
                request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), head)
                with urllib.request.urlopen(request, timeout=300) as reply:
                    tokens.append(json.loads(reply.read())["choices"][0]["token_ids"])
        print(log.read_text(errors="replace"))
    return tokens


def install(release: str, scratch: Path) -> Path:
    """The Python of an environment with this release."""
    version, _, torch = release.partition(":")
    pins = [f"VLLM={version}", *([f"TORCH={torch}"] if torch else [])]
    subprocess.run(["make", "install", f"VENV={scratch / version}", *pins], cwd=ROOT, check=True)
    return scratch / version / "bin" / "python"


def run_case(python: Path, case: str) -> dict[str, Any]:
    """`answer` in a process of `python`, and whether it said that it steers; or {"error": the end of its output}."""
    drafter, more = CASES[case]
    env = os.environ | ENV | runner_env("v1") | more
    with tempfile.TemporaryDirectory() as scratch:
        if "STEER_TEST_BROKEN" in more:  # in every process, before vLLM asks for its plugins
            (Path(scratch) / "sitecustomize.py").write_text("import sys\n\nsys.modules['wrapt'] = None\n")
            env["PYTHONPATH"] = os.pathsep.join(p for p in (scratch, env.get("PYTHONPATH", "")) if p)
        result = Path(scratch) / "result.json"
        command = [python, __file__, "--answer", drafter or "", "--to", result]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        text = done.stdout + done.stderr
        found = json.loads(result.read_text()) if done.returncode == 0 else {}
    if not found:
        refused = next((line.strip() for line in text.splitlines() if any(r in line for r in REFUSALS)), None)
        found = {"refused": refused} if refused else {"error": text[-1500:]}
    broken = "could not start" in text
    if broken != ("STEER_TEST_BROKEN" in more):
        found = {"error": f"the plugin {'could not start' if broken else 'was not broken'}\n{text[-1500:]}"}
    return found | {"proof": "steering is on" in text}


def judge(cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Each case's outcome: "as the target", "steered, as the target", "refused: ...", or "WRONG: ..."."""
    alone = cases["alone"].get("tokens")
    outcomes = {}
    for case, found in cases.items():
        if case == "steered" and found.get("refused"):
            outcomes[case] = f"refused: {found['refused']}"
        elif alone is None or found.get("tokens") != alone:
            outcomes[case] = f"WRONG: {found.get('error') or found.get('refused') or 'other tokens than the target'}"
        elif found["proof"] != (case == "steered"):
            outcomes[case] = f"WRONG: {'steered' if found['proof'] else 'not steered'}"
        else:
            outcomes[case] = "steered, as the target" if found["proof"] else "as the target"
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", metavar="VLLM[:TORCH]")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "vllm-steer-versions")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--note", help="what a reader of it must know")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.to:
        args.to.write_text(json.dumps(answer(args.answer or None)))
        return 0
    report = {}
    for release in args.releases:
        python = Path(release) if "/" in release else install(release, args.scratch)
        cases = {case: run_case(python, case) for case in CASES}
        version = cases["plain"].get("vllm", release)
        report[version] = {"outcomes": judge(cases), "seams": cases["plain"].get("seams")}
        print(json.dumps({version: report[version]}, indent=2), flush=True)
    if args.output:
        day = datetime.date.today().isoformat()
        given = [os.path.join("ENV", *Path(r).parts[-2:]) if "/" in r else r for r in args.releases]
        written = {"date": day, "command": " ".join(["python tests/support/versions.py", *given]), "releases": report}
        written |= {"note": args.note} if args.note else {}
        args.output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return int(any(o.startswith("WRONG") for found in report.values() for o in found["outcomes"].values()))


if __name__ == "__main__":
    sys.exit(main())
