"""Counts blocks of speculative decoding: what a block is, what is excluded, and intervals over prompts.

A block is one engine step of one request after its prefill: the drafts the target accepted, and one token of its own.

- The first token comes from the prefill and is not a block.
- A block cut by the length limit would look shorter than it is. More tokens are therefore requested than are counted
  (`tokens_to_ask`), and only blocks that start before `max_tokens` count, each of them whole.
- A block ended by a stop token counts the tokens it produced. Drafts after an accepted stop token were neither
  accepted nor rejected and are in no denominator.
- A sequence without a block is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vllm_steer.common.errors import SteeringError

DRAWS = 10_000  # bootstrap samples
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Answer:
    """The counted blocks of one answer."""

    id: str
    category: str | None
    blocks: tuple[int, ...]  # tokens each block delivered: accepted drafts + 1, fewer where the sequence stopped
    stopped_on_draft: bool = False  # the last block ends with an accepted draft: the stop token itself was drafted

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the blocks in one string; `from_dict` is its inverse."""
        return dataclasses.asdict(self) | {"blocks": " ".join(map(str, self.blocks))}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Answer:
        """From `to_dict`; other keys are ignored."""
        blocks = tuple(int(word) for word in raw["blocks"].split())
        return cls(raw["id"], raw["category"], blocks, raw["stopped_on_draft"])


def tokens_to_ask(max_tokens: int, k: int) -> int:
    """New tokens to ask the engine for, so that no block that starts before `max_tokens` is cut: k + 1 more."""
    return max_tokens + k + 1


def count(
    id: str,
    category: str | None,
    steps: Sequence[int],
    *,
    max_tokens: int,
    k: int,
    drafts: int | None = None,
    accepted: Sequence[int] = (),
    drafted: Sequence[int] = (),
    stopped: bool = False,
) -> Answer:
    """Count one answer.

    Args:
        steps: tokens delivered by each engine step of the request, the prefill's first.
        max_tokens: only blocks that start before this many tokens count.
        k: drafts per block, of a tree its depth; 0 without speculation.
        drafts: draft tokens per block by vLLM's count, of a tree those of all rows; None: k.
        accepted, drafted: vLLM's record of each step but the first: drafts accepted, also those after a stop token,
            and drafts verified. Empty if k is 0.
        stopped: whether the answer ended by itself (end of sequence), not by its length.

    Raises SteeringError when they contradict each other: then a step was not a block of so many drafts.
    """
    check(id, steps, accepted, drafted, k if drafts is None else drafts)
    blocks, start = [], steps[0]
    for tokens in steps[1:]:
        if start >= max_tokens:
            break
        blocks.append(tokens)
        start += tokens
    whole = len(blocks) == len(steps) - 1
    return Answer(id, category, tuple(blocks), bool(whole and blocks and k and stopped and accepted[-1] >= blocks[-1]))


def check(id: str, steps: Sequence[int], accepted: Sequence[int], drafted: Sequence[int], drafts: int) -> None:
    """Raise SteeringError unless the first step is the prefill's, and each other a block as vLLM recorded it."""
    why = None
    if not steps or steps[0] != 1:
        why = f"its first step delivered {steps[0] if steps else 0} tokens, not the one of the prefill"
    elif drafts == 0 and any(tokens != 1 for tokens in steps):
        why = "a step without drafts delivered more than one token"
    elif drafts and len(accepted) != len(steps) - 1:
        why = f"{len(steps) - 1} steps after the prefill, but {len(accepted)} drafted blocks by vLLM's own count"
    elif drafts and any(tokens != 1 + a for tokens, a in zip(steps[1:-1], accepted, strict=False)):
        why = "a step delivered another number of tokens than vLLM accepted"
    elif drafts and accepted and steps[-1] > 1 + accepted[-1]:
        why = f"its last step delivered {steps[-1]} tokens of {accepted[-1]} accepted drafts and one"
    elif any(n != drafts for n in drafted):
        why = f"a block had {next(n for n in drafted if n != drafts)} drafts instead of {drafts}"
    if why:
        raise SteeringError(
            f"the blocks of prompt {id!r} cannot be counted: {why}. Blocks are cut when max_num_batched_tokens is "
            "below --batch times the drafts of a block and one: raise it in --engine, or lower --batch; leave out "
            "other options of --engine"
        )


def acceptance_length(answers: Sequence[Answer]) -> float | None:
    """Tokens per block, the target's own included: ratio of sums. None when there is no block."""
    blocks = sum(len(answer.blocks) for answer in answers)
    return sum(sum(answer.blocks) for answer in answers) / blocks if blocks else None


def per_position(answers: Sequence[Answer], k: int) -> list[float | None]:
    """Share of blocks whose draft i was accepted, i = 1..k; None where no block reached it."""
    accepted, judged = [0] * k, [0] * k
    for answer in answers:
        for i, tokens in enumerate(answer.blocks):
            on_draft = answer.stopped_on_draft and i == len(answer.blocks) - 1
            for position in range(tokens if on_draft else k):
                judged[position] += 1
                accepted[position] += on_draft or position < tokens - 1
    return [a / n if n else None for a, n in zip(accepted, judged, strict=True)]


def table(answers: Sequence[Answer]) -> np.ndarray:
    """Tokens and blocks of each answer, float64 [n, 2]."""
    return np.array([(sum(answer.blocks), len(answer.blocks)) for answer in answers], dtype=np.float64)


def resample(n: int, seed: int = 0) -> np.ndarray:
    """How often each of n prompts is in each bootstrap sample, [DRAWS, n]; shared by all rows, which pairs them."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)


def interval(draws: np.ndarray) -> list[float] | None:
    """95 % percentile interval of bootstrap draws; None when a tenth or more of them had no block."""
    known = draws[np.isfinite(draws)]
    return None if len(known) < 0.9 * len(draws) else [float(x) for x in np.quantile(known, INTERVAL)]


def summarise(
    measured: dict[str, Sequence[Answer]], k: dict[str, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows per configuration, and per pair of speculating configurations, over the same prompts.

    Args:
        measured: answers by configuration, prompt by prompt in one order.
        k: drafts per block by configuration; 0 for the one without speculation, which is in no pair.

    Intervals resample prompts, the same ones for every configuration; fewer than two prompts have none.
    """
    first = next(iter(measured.values()))
    assert all([a.id for a in answers] == [a.id for a in first] for answers in measured.values()), "other prompts"
    weights = resample(len(first)) if len(first) > 1 else None
    draws: dict[str, np.ndarray | None] = {}
    values: dict[str, float | None] = {}
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for name, answers in measured.items():
        draws[name] = ratios = _ratios(weights, answers)
        values[name] = acceptance_length(answers)
        rows.append(
            {
                "name": name,
                "prompts": len(answers),
                "blocks": sum(len(answer.blocks) for answer in answers),
                "acceptance_length": values[name],
                "interval_95": None if ratios is None else interval(ratios),
                "acceptance_rates": per_position(answers, k[name]),
            }
        )
    known = {name: value for name, value in values.items() if k[name] and value is not None}
    for base, name in combinations(known, 2):
        pairs.append({"name": name, "minus": base} | _compare(known[name], known[base], draws[name], draws[base]))
    return rows, pairs


def _ratios(weights: np.ndarray | None, answers: Sequence[Answer]) -> np.ndarray | None:
    """Tokens per block in every bootstrap sample, [DRAWS]; not finite where a sample has no block."""
    if weights is None:
        return None
    sums = weights @ table(answers)
    with np.errstate(invalid="ignore"):
        return sums[:, 0] / sums[:, 1]


def _compare(a: float, b: float, draws_a: np.ndarray | None, draws_b: np.ndarray | None) -> dict[str, Any]:
    return {
        "difference": a - b,
        "difference_95": None if draws_a is None or draws_b is None else interval(draws_a - draws_b),
        "ratio": a / b,
        "ratio_95": None if draws_a is None or draws_b is None else interval(draws_a / draws_b),
    }


def by_category(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by category, in order of appearance; answers without a category are left out."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.category is not None:
            found.setdefault(answer.category, []).append(answer)
    return found
