"""What rescores a drafted block best: nothing, a bigram or a small language model (arXiv 2404.09221), on Hugging Face.

Acceptance length (tokens per block, the target's own included) with a 95 % bootstrap interval over prompts, and its
ratio to the block drafter alone; the last row is the language model as a draft model, without a block. `passes` are
those of a model that a round makes one after the other, the target's not counted: a language model needs one for every
draft. The weights are tuned on the first prompts, which are not measured.

    python benchmarks/rescorers.py TARGET DFLASH --language-model LM --prompts FILE.jsonl --json rescorers.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import interval, length, write_report
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.common.identity import fingerprint
from vllm_steer.decoding import block, chain
from vllm_steer.decoding.block import NeuralRefinement, Refinement
from vllm_steer.drafters.block import checkpoint, ngram

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
TUNED_ON = 16
BLIND, BIGRAM, NEURAL, ALONE = "blind", "bigram", "language model", "language model alone"
Pairs = Sequence[tuple[int, int]]


class Case:
    """A target, what drafts for it, and what is asked of them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        load = lambda where: AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()  # noqa: E731
        self.target, self.small = load(args.target), load(args.language_model)
        self.drafter, self.counted = checkpoint.load(args.drafter), ngram.load(args.drafter)
        tokenizer = AutoTokenizer.from_pretrained(args.target)
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        self.prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]

    def generate(self, way: str, weight: float | None, prompt: list[int], temperature: float, seed: int) -> Any:
        """One prompt's Generation."""
        given: dict[str, Any] = {"k": self.args.k, "max_new_tokens": self.args.tokens, "temperature": temperature}
        given |= {"draft_sample": "probabilistic" if temperature else "greedy", "seed": seed}
        if way == ALONE:
            return chain.generate(self.target, self.small, prompt, **given)
        refine = {BIGRAM: lambda w: Refinement(self.counted, w), NEURAL: lambda w: NeuralRefinement(self.small, w)}
        own = None if weight is None else refine[way](weight)
        return block.generate(self.target, self.drafter, prompt, refinement=own, **given)

    def pairs(self, way: str, weight: float | None, temperature: float, prompts: list[list[int]]) -> Pairs:
        """(tokens, blocks) of each prompt."""
        found = []
        for seed, prompt in enumerate(tqdm(prompts, desc=f"{way}, {weight}, T={temperature:g}")):
            blocks = self.generate(way, weight, prompt, temperature, seed).blocks
            found.append((sum(each.tokens for each in blocks), len(blocks)))
        return found

    def tuned(self, way: str, temperature: float) -> float:
        """The weight with the longest blocks on the first prompts."""
        lengths = {w: length(self.pairs(way, w, temperature, self.prompts[:TUNED_ON])) for w in WEIGHTS}
        return max(lengths, key=lengths.__getitem__)


def ratio(pairs: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> float:
    """Of two ways, prompt by prompt."""
    one, other = zip(*pairs, strict=True)
    return length(list(one)) / length(list(other))


def measure(case: Case, temperature: float) -> list[dict[str, Any]]:
    """The rows of a table, each compared with the first."""
    measured, rows = case.prompts[TUNED_ON:], []
    for way, passes in {BLIND: 1, BIGRAM: 1, NEURAL: 1 + case.args.k, ALONE: case.args.k}.items():
        weight = case.tuned(way, temperature) if way in (BIGRAM, NEURAL) else None
        pairs = case.pairs(way, weight, temperature, measured)
        blind = rows[0]["pairs"] if rows else pairs
        over = list(zip(pairs, blind, strict=True))
        rows.append(
            {
                **{"way": way, "temperature": temperature, "weight": weight, "passes": passes, "pairs": pairs},
                **{"acceptance_length": round(length(pairs), 3), "interval_95": interval(pairs, length, 3)},
                **{"over_blind": round(ratio(over), 3), "over_blind_95": interval(over, ratio, 3)},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", help="a DFlash drafter with a bigram beside it")
    parser.add_argument("--language-model", required=True, help="a small model of the same tokenizer")
    parser.add_argument("--prompts", required=True, help=f"JSONL with `prompt`; {TUNED_ON} of them are tuned on")
    parser.add_argument("--k", type=int, default=5, help="drafts per block")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case, rows = Case(args), []
    print("| | temperature | weight | passes | acceptance length | over blind |\n|---|---|---|---|---|---|")
    for temperature in args.temperatures:
        for row in measure(case, temperature):
            low, high, least, most = (*row["interval_95"], *row["over_blind_95"])
            print(f"| {row['way']} | {temperature:g} | {row['weight']} | {row['passes']} | "
                  f"{row['acceptance_length']:.3f} [{low:.3f}, {high:.3f}] | "
                  f"{row['over_blind']:.3f} [{least:.3f}, {most:.3f}] |", flush=True)  # fmt: skip
            rows.append(row)
    if args.json:
        models = {name: getattr(args, name) for name in ("target", "drafter", "language_model")}
        write_report(
            args.json,
            rows=rows,
            prompts=len(case.prompts) - TUNED_ON,
            identities={name: fingerprint(path) for name, path in models.items()},
        )


if __name__ == "__main__":
    main()
