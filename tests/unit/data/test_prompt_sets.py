"""The built-in prompt sets: every line well formed, the split as documented, nothing said twice."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import vllm_steer

FOLDER = Path(vllm_steer.__file__).parent / "data/prompt_sets"
NAMES = ("chat", "code", "math", "summarise", "instructions")
SPLITS = ["train", "train", "test", "train", "train", "validation", "train", "test", "train", "train"]  # by index % 10
SHINGLE = 5  # words

Prompt = str | list[dict[str, str]]


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def shingles(prompt: Prompt) -> set[tuple[str, ...]]:
    """Runs of five words, case and punctuation aside; a shorter prompt is one run."""
    words = re.findall(r"\w+", text(prompt).lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def close_pairs(prompts: dict[str, Prompt], limit: float) -> dict[tuple[str, str], float]:
    """Pairs of prompts whose shingle sets have a Jaccard index of at least `limit`."""
    sets = {name: shingles(prompt) for name, prompt in prompts.items()}
    holders = defaultdict(list)
    for name, runs in sets.items():
        for run in runs:
            holders[run].append(name)
    shared = Counter((a, b) for names in holders.values() for i, a in enumerate(names) for b in names[i + 1 :])
    index = {(a, b): n / (len(sets[a]) + len(sets[b]) - n) for (a, b), n in shared.items()}
    return {pair: value for pair, value in index.items() if value >= limit}


def test_these_are_all_the_sets() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_lines(name: str) -> None:
    read = rows(name)
    assert len(read) >= 100
    for i, row in enumerate(read):
        assert list(row) == ["id", "split", "prompt"]
        assert row["id"] == f"{name}-{i:03d}"
        assert row["split"] == SPLITS[i % 10], row["id"]
        # Control characters and Unicode line ends break readers that split lines as str.splitlines does.
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd]", text(row["prompt"])), row["id"]
        if isinstance(row["prompt"], str):
            assert name == "code" and row["prompt"].strip() and row["prompt"].endswith("\n"), row["id"]
        else:
            check_messages(row["prompt"], row["id"])


def check_messages(messages: list[dict[str, str]], where: str) -> None:
    """An optional system message, then user and assistant in turn, the user last, nobody silent."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns and turns == [("user", "assistant")[i % 2] for i in range(len(turns))], where
    assert turns[-1] == "user", where
    for message in messages:
        assert set(message) == {"role", "content"}, where
        assert message["content"] and message["content"] == message["content"].strip(), where


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_the_splits(name: str) -> None:
    read = rows(name)
    count = Counter(row["split"] for row in read)
    assert set(count) == {"train", "validation", "test"}
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert count[split] / len(read) == pytest.approx(share, abs=0.02)


def test_nothing_is_said_twice() -> None:
    prompts = {row["id"]: row["prompt"] for name in NAMES for row in rows(name)}
    assert close_pairs(prompts, limit=0.2) == {}


def test_a_repeated_prompt_would_be_found() -> None:
    first, second = (row["prompt"] for row in rows("math")[:2])
    reworded = text(first).replace(" ", "\n").upper() + " Show the steps."
    found = close_pairs({"a": first, "b": second, "c": [{"role": "user", "content": reworded}]}, limit=0.2)
    assert set(found) == {("a", "c")}


def test_every_kind_is_in_every_split() -> None:
    for split in ("train", "validation", "test"):
        code = Counter(type(row["prompt"]) for row in rows("code") if row["split"] == split)
        assert abs(code[str] - code[list]) <= 1, split
        chat = [row["prompt"] for row in rows("chat") if row["split"] == split]
        assert any(len(prompt) == 1 for prompt in chat), split
        assert any(message["role"] == "assistant" for prompt in chat for message in prompt), split
        assert any(prompt[0]["role"] == "system" for prompt in chat), split


def test_summaries_have_something_to_summarise() -> None:
    for row in rows("summarise"):
        words = max(len(message["content"].split()) for message in row["prompt"] if message["role"] == "user")
        assert 100 <= words <= 300, row["id"]


def test_word_problems_give_quantities_and_ask_for_one() -> None:
    for row in rows("math"):
        prompt = text(row["prompt"])
        assert len(prompt.split()) >= 8 and prompt.endswith((".", "?")), row["id"]
        assert "?" in prompt or re.search(r"\b(Find|Give)\b", prompt), row["id"]
