"""What it gains that sampled drafts follow a request's top-k and top-p: acceptance length without and with.

Answers to the tiny pair's held-out prompts at T=1, drafts sampled (`draft_sample_method: probabilistic`), by V1. One
engine for each drafter and for `filter_drafts` off and on; every setting answers the same prompts with the same seeds.
Acceptance length is tokens per block, the target's own included, with a 95 % bootstrap interval over answers.

    python benchmarks/draft_filters.py --json benchmarks/results/draft_filters_tiny.json
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from record import ENV, interval, write_report

PAIR = Path(__file__).parents[1] / "examples" / "tiny_pair"
SETTINGS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 20": {"top_k": 20},
    "top_k 1": {"top_k": 1},
}
K = 5


def build(drafter: str, filtered: bool) -> Any:
    """One engine of the tiny pair."""
    from vllm import LLM

    return LLM(
        str(PAIR / "target"),
        speculative_config={
            "model": str(PAIR / drafter),
            "num_speculative_tokens": K,
            "draft_sample_method": "probabilistic",
        },
        additional_config={"vllm_steer": {"filter_drafts": filtered}},
        dtype="float32",
        max_model_len=256,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        per_request_spec_decode_metrics="detailed",
        seed=0,
    )


def measure(llm: Any, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    """One row for each setting."""
    from vllm_steer.serving import probe

    rows = []
    for name, sampling in SETTINGS.items():
        answers, _ = probe.drive(llm, prompts, batch=16, temperature=1.0, max_tokens=tokens, seed=0, sampling=sampling)
        pairs = [(sum(a.accepted), len(a.accepted)) for a in answers if a.accepted]
        rows.append(
            {
                "sampling": name,
                "acceptance_length": round(acceptance_length(pairs), 3),
                "interval_95": interval(pairs, acceptance_length, 3),
                "blocks": sum(blocks for _, blocks in pairs),
            }
        )
    return rows


def acceptance_length(pairs: list[tuple[int, int]]) -> float:
    """Tokens per block of (accepted drafts, blocks) pairs."""
    return 1 + sum(accepted for accepted, _ in pairs) / sum(blocks for _, blocks in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per answer")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    os.environ.update(ENV)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[: args.prompts]
    prompts = [tokenizer.encode(json.loads(line)["prompt"])[:100] for line in lines]
    results = []
    for drafter in ("drafter", "steered"):
        for filtered in (False, True):
            llm = build(drafter, filtered)
            for row in measure(llm, prompts, args.tokens):
                results.append({"drafter": drafter, "filter_drafts": filtered} | row)
                print(json.dumps(results[-1]), flush=True)
            llm.llm_engine.engine_core.shutdown()
            del llm
    if args.json:
        write_report(args.json, runner="V1, eager", k=K, temperature=1.0, prompts=len(prompts), results=results)


if __name__ == "__main__":
    main()
