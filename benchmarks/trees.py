"""RSD's claim on Hugging Face models: chains, independent drafts and trees, at equal costs for target or drafter.

Acceptance length (tokens per block, the target's own included), with a 95 % bootstrap interval over prompts; `row
tokens` are what the target reads in a round if a tree is served as rows, `passes` what the drafter makes. Greedy output
is compared with the target's, token by token.

    python benchmarks/trees.py TARGET plain=DRAFTER steered=STEERED --prompts FILE.jsonl --json trees.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from record import interval, length, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.decoding import tree
from vllm_steer.decoding.tree import Adaptive, Beam, Branching
from vllm_steer.drafters.steered import checkpoint

ONES = (1,) * 4
WAYS: dict[str, tuple[tree.Tree, str]] = {
    "chain of 5": (Branching((1, 1, 1, 1, 1)), "recursive"),
    "chain of 11": (Branching((1,) * 11), "recursive"),
    "chain of 23": (Branching((1,) * 23), "recursive"),
    "independent, 4 of 5": (Branching((4, *ONES)), "independent"),
    "RSD-C 4,1,1,1,1": (Branching((4, *ONES)), "recursive"),
    "RSD-C 2,2,1,1,1": (Branching((2, 2, 1, 1, 1)), "recursive"),
    "RSD-S 2 of 5": (Beam(2, 5), "recursive"),
    "RSD-S 3 of 5": (Beam(3, 5), "recursive"),
    "RSD-S 4 of 5": (Beam(4, 5), "recursive"),
    "RSD-S 4 of 5, whole paths": (Beam(4, 5, whole=True), "recursive"),
    "coupled 4,1,1,1,1": (Branching((4, *ONES)), "coupled"),
    "adaptive, 2 rows of 5": (Adaptive(2, 5), "coupled"),
    "adaptive, 4 rows of 5": (Adaptive(4, 5), "coupled"),
    "adaptive, 8 rows of 5": (Adaptive(8, 5), "coupled"),
    "RSD-C 4,2,1,1,1": (Branching((4, 2, 1, 1, 1)), "recursive"),
}


def measure(models: tuple[Any, Any, Any], prompts: list[list[int]], way: str, args: Any, temperature: float) -> dict:
    """One row: a way of drafting, over all prompts."""
    shape, verification = WAYS[way]
    target, drafter, steering = models
    pairs, rows, answers = [], [], []
    for seed, prompt in enumerate(prompts):
        found = tree.generate(
            target, drafter, prompt, shape, steering, max_new_tokens=args.tokens, temperature=temperature,
            verification=verification, seed=seed,
        )  # fmt: skip
        pairs.append((sum(block.tokens for block in found.blocks), len(found.blocks)))
        rows += [block.row_tokens for block in found.blocks]
        answers.append(found.tokens)
    return {
        "way": way,
        "acceptance_length": round(length(pairs), 3),
        "interval_95": interval(pairs, length, 3),
        "row_tokens": round(sum(rows) / len(rows), 1),
        "passes": shape.depth,
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafters", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per answer")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="some of the rows only")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
    tokenizer, target = AutoTokenizer.from_pretrained(args.target), load(args.target)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.count]
    prompts = [tokenizer.encode(json.loads(line)["prompt"])[:200] for line in lines]
    results = []
    for name, path in (word.split("=", 1) for word in args.drafters):
        steering = checkpoint.load(path) if checkpoint.has_steering(path) else None
        models = target, load(path), steering
        for temperature in args.temperatures:
            known = None
            for way in args.ways:
                shape, verification = WAYS[way]
                if temperature == 0 and verification != "recursive" and not isinstance(shape, Adaptive):
                    continue  # greedy trees have one kind of draft
                if temperature > 0 and getattr(shape, "whole", False):
                    continue
                row = measure(models, prompts, way, args, temperature)
                answers = row.pop("answers")
                known = known or answers
                assert temperature > 0 or answers == known, "another text than the chain's"
                results.append({"drafter": name, "temperature": temperature} | row)
                print(json.dumps(results[-1]), flush=True)
    if args.json:
        write_report(args.json, loop="Hugging Face", prompts=len(prompts), tokens=args.tokens, results=results)


if __name__ == "__main__":
    main()
