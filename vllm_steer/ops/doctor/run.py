"""`vllm-steer doctor`: what would keep a drafter from being steered here, and whether a running server steers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable

from vllm_steer.common.errors import SteeringError, require_at_least
from vllm_steer.common.options import flag
from vllm_steer.common.redaction import redact
from vllm_steer.ops.doctor.findings import FAIL, OK, SKIPPED, WARNING, Case, Finding, python_packages

ABSENT = {
    "vllm": "vLLM is not there",
    "checkpoint": "no CHECKPOINT was given",
    "config": "no checkpoint was read",
    "target_config": "no target was read: give --target",
    "drafter_config": "no drafter was read: give --drafter",
    "engine": "vLLM did not accept the pair",
    "url": "no --url was given",
    "served": "the server does not answer",
}

PAIR = ("config", "target_config", "drafter_config")
Check = Callable[[Case], Iterable[Finding]]


def all_checks() -> list[tuple[str, Check, tuple[str, ...]]]:
    """Name of every check, the check, and what it needs of the case, in an order that gives it to them."""
    from vllm_steer.ops.doctor import checks
    from vllm_steer.ops.doctor import server as server_checks

    return [
        ("vllm", checks.vllm_version, ()),
        ("plugin", checks.plugin, ()),
        ("kill switch", checks.kill_switch, ()),
        ("seams", checks.seam_places, ("vllm",)),
        ("checkpoint", checks.steering_weights, ("checkpoint",)),
        ("drafter", checks.drafter, ("config",)),
        ("target", checks.target, ("config",)),
        ("tokenizer", checks.vocabulary, PAIR),
        ("context", checks.context_length, (*PAIR, "vllm")),
        ("dtype", checks.dtypes, PAIR),
        ("quantization", checks.quantization, PAIR),
        ("tensor parallel", checks.tensor_parallel, ("config",)),
        ("hidden states", checks.hidden_states, ("target_config", "vllm")),
        ("front end", checks.front_end, (*PAIR, "vllm")),
        ("draft tree", checks.draft_tree, ("engine",)),
        ("draft launches", checks.draft_launches, ("engine",)),
        ("memory", checks.memory, ("engine",)),
        ("server", server_checks.server, ("url",)),
        ("steering", server_checks.is_steering, ("url", "served")),
        ("acceptance", server_checks.acceptance, ("url", "served")),
    ]


def examine(case: Case) -> list[Finding]:
    """Run every check whose inputs are there, in order. A check that raises has failed; the others still run."""
    findings = list(python_packages(case))
    if any(f.status == FAIL for f in findings):
        return findings  # no other check works without them
    for name, check, needs in all_checks():
        if missing := [need for need in needs if getattr(case, need) is None]:
            findings.append(Finding(name, SKIPPED, ABSENT[missing[0]]))
            continue
        try:
            findings += check(case)
        except SteeringError as error:
            findings.append(Finding(name, FAIL, str(error)))
        except Exception as error:
            seen = f"the check itself failed ({type(error).__name__}: {error})"
            findings.append(Finding(name, FAIL, seen, "please report it, with this line"))
    return findings


def redact_finding(found: Finding) -> Finding:
    """The finding with secrets masked: an address or an error message may contain one."""
    return dataclasses.replace(
        found, seen=redact(found.seen, paths=True), remedy=found.remedy and redact(found.remedy, paths=True)
    )


def text(findings: list[Finding]) -> str:
    """One line for each check: mark, name, what was seen: the remedy. Checks skipped for one reason share a line."""
    lines, width = [], max(len(f.name) for f in findings)
    for _, group in itertools.groupby(findings, lambda f: f.seen if f.status == SKIPPED else id(f)):
        first, *others = group
        seen = first.seen + (f": {first.remedy}" if first.remedy else "")
        seen += f" (and so: {', '.join(f.name for f in others)})" if others else ""
        lines.append(f"{first.status:<8} {first.name:<{width}} {' '.join(seen.split())}")
    return "\n".join([*lines, summary(findings)])


def summary(findings: list[Finding]) -> str:
    """The last line: the verdict, and how many of each."""
    counts = Counter(f.status for f in findings)
    verdict = {FAIL: "something is wrong", WARNING: "it will work, with warnings", OK: "all is well"}
    worst = next(status for status in verdict if counts[status] or status == OK)
    return f"{verdict[worst]}: " + ", ".join(f"{counts[s]} {s}" for s in (OK, WARNING, FAIL, SKIPPED) if counts[s])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer doctor`."""
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="steered checkpoint or adapter")
    parser.add_argument("--target", help="directory or hub id (default: the one recorded in the checkpoint)")
    parser.add_argument("--drafter", help="base drafter of an adapter (default: the one recorded in it)")
    parser.add_argument("--tree", metavar="W,W,...", help="a draft tree to serve, as of `vllm-steer serve --tree`")
    parser.add_argument("--tree-rows", type=int, metavar="L", help="an adaptive one, as of `serve --tree-rows`")
    parser.add_argument("--url", help="address of a running server to look at, too")
    for name, text in (
        ("max_num_seqs", "requests at once to plan memory for (default: vLLM's)"),
        ("tensor_parallel_size", "GPUs to share a model (default: 1)"),
        ("max_model_len", "context length to serve (default: the target's)"),
    ):
        parser.add_argument(flag(name), type=int, help=text)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """`vllm-steer doctor`: print every finding; 1 if any check failed, else 0. Only the report goes to stdout."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Case) if getattr(args, f.name, None) is not None}
    for name in ("max_num_seqs", "tensor_parallel_size", "max_model_len"):
        require_at_least(flag(name), given.get(name, 1), 1)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # each check reports what vLLM says
    with contextlib.redirect_stdout(sys.stderr):
        findings = [redact_finding(found) for found in examine(Case(**given))]
    failed = any(f.status == FAIL for f in findings)
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print(text(findings))
    return int(failed)
