"""A benchmark's rows, pairs and speed per temperature, from the answers and clocks of its contenders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_steer.bench import block_counting, quality
from vllm_steer.bench.block_counting import Answer
from vllm_steer.bench.candidate import NONE, Settings

NEW_NAMES = {"tokens_per_block": "acceptance_length", "accepted_at": "acceptance_rates"}  # of rows written by 0.1.0


def with_new_names(results: dict[str, Any]) -> dict[str, Any]:
    """The contents of results.json, with keys of older versions renamed to today's."""
    parts = [
        part
        | {"rows": _renamed(part["rows"])}
        | {"categories": {name: one | {"rows": _renamed(one["rows"])} for name, one in part["categories"].items()}}
        for part in results["summary"]
    ]
    return results | {"summary": parts}


def _renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{NEW_NAMES.get(key, key): value for key, value in row.items()} for row in rows]


def summarise(settings: Settings, contenders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per temperature: rows and pairs over all prompts and per category, and each contender's speed."""
    found = []
    for place, temperature in enumerate(settings["temperature"]):
        runs = {c["name"]: c["runs"][place] for c in contenders}
        answers: dict[str, Sequence[Answer]] = {
            name: [Answer.from_dict(raw) for raw in run["answers"]] for name, run in runs.items()
        }
        k = {name: 0 if name == NONE else settings["k"] for name in runs}
        rows, pairs = block_counting.summarise(answers, k)
        for row in rows:
            row |= _speed(runs[row["name"]])
            if temperature == 0 and NONE in runs and row["name"] != NONE:
                row["answers_unlike_none"] = _unlike(runs[row["name"]], runs[NONE])
        categories = {}
        for category in block_counting.by_category(next(iter(answers.values()))):
            part: dict[str, Sequence[Answer]] = {
                name: block_counting.by_category(all_)[category] for name, all_ in answers.items()
            }
            categories[category] = dict(zip(("rows", "pairs"), block_counting.summarise(part, k), strict=True))
        if settings.get("judged"):
            _judge(rows, runs, contenders, temperature)
        found.append({"temperature": temperature, "rows": rows, "pairs": pairs, "categories": categories})
    return found


def _judge(
    rows: list[dict[str, Any]], runs: dict[str, Any], contenders: list[dict[str, Any]], temperature: float
) -> None:
    """Add to each row what its answers are worth, and what it gave up."""
    given_up = {c["name"]: c["identity"].get("lenience") for c in contenders}
    exact = next((name for name in runs if given_up[name] is None), None)
    greedy = runs[exact]["answers"] if exact is not None and temperature == 0 else None
    for row in rows:
        row |= {"lenience": given_up[row["name"]]} | quality.summarise(runs[row["name"]]["answers"], greedy)


def _speed(run: dict[str, Any]) -> dict[str, Any]:
    clock = run["clock"]
    return {
        "tokens_per_second": clock["decode_tokens"] / clock["decode_seconds"] if clock["decode_seconds"] else None,
        "tokens_per_second_with_prefill": (clock["decode_tokens"] + clock["prefill_tokens"])
        / (clock["decode_seconds"] + clock["prefill_seconds"]),
        "drafting_share": run["drafting_share"],
    }


def _unlike(run: dict[str, Any], none: dict[str, Any]) -> int:
    """Answers that are not the target's own, token by token."""
    pairs = zip(run["answers"], none["answers"], strict=True)
    return sum(a["tokens_sha256"] != b["tokens_sha256"] for a, b in pairs)
