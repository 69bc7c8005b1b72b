"""split.py: held-out rows share no prompt with training rows, and a resumed run holds out what it did."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.split import (
    FILE,
    Row,
    check_control,
    describe,
    in_file_order,
    last_rows,
    split_of_run,
    split_rows,
    store,
)


def sampled(prompts: int, samples: int, categories: int = 1, seed: int = 0) -> list[Row]:
    """Rows in the order they finish: short responses first."""
    rng = random.Random(seed)
    rows = []
    for i in range(prompts):
        category = f"c{i % categories}" if categories > 1 else None
        for _ in range(samples):
            rows.append(Row((i, i, *[7] * rng.randint(1, 60)), 2, category))
    rows.sort(key=lambda row: len(row.ids))
    return [Row(row.ids, 2, row.category, number) for number, row in enumerate(rows)]


def prompts(rows: list[Row]) -> set[tuple[int, ...]]:
    return {row.prompt for row in rows}


@pytest.mark.parametrize(("count", "samples"), [(2, 1), (2, 50), (10, 1), (10, 30), (100, 4), (3000, 1), (500, 8)])
def test_prompts_are_held_out_whole(count: int, samples: int) -> None:
    rows = sampled(count, samples)
    training, held = split_rows(rows)
    assert not prompts(training) & prompts(held) and training and held
    assert sorted([*training, *held], key=lambda row: row.number) == rows
    wanted = min(64, max(1, len(rows) // 20))
    assert len(held) == max(samples, round(wanted / samples) * samples)


def test_the_order_of_the_file_does_not_matter() -> None:
    rows = sampled(100, 4)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert prompts(split_rows(rows)[1]) == prompts(split_rows(shuffled)[1])
    assert prompts(split_rows(rows, seed=1)[1]) != prompts(split_rows(rows)[1])


def test_held_out_responses_are_as_long_as_the_others() -> None:
    """The end of a file written as answers finish is its longest answers."""
    rows = sampled(1000, 1)
    mean = lambda rows: sum(len(row.ids) for row in rows) / len(rows)  # noqa: E731
    training, held = split_rows(rows)
    assert abs(mean(training) - mean(held)) < 6 < 20 < mean(last_rows(rows)[1]) - mean(training)


@pytest.mark.parametrize("categories", [2, 5, 20])
def test_categories_are_held_out_in_proportion(categories: int) -> None:
    rows = sorted(sampled(400, 1, categories), key=lambda row: row.category)
    found = Counter(row.category for row in split_rows(rows)[1])
    assert len(found) == categories and set(found.values()) == {20 // categories}


def test_rows_without_a_category_are_one(tmp_path: Path) -> None:
    rows = [Row((i,), 1, "rare" if i < 40 else None) for i in range(400)]
    assert Counter(row.category for row in split_rows(rows)[1]) == {None: 18, "rare": 2}


def test_a_prompt_with_most_rows_is_trained_on() -> None:
    rows = [Row((1, i), 1) for i in range(96)] + [Row((2 + i, 0), 1) for i in range(4)]
    for seed in range(20):
        training, held = split_rows(rows, seed)
        assert (1,) in prompts(training) and 1 <= len(held) < 5 and not prompts(training) & prompts(held)


def test_equal_texts_are_on_one_side() -> None:
    rows = [Row((i % 30, 1, 2), 0) for i in range(60)]
    training, held = split_rows(rows)
    assert held and not {row.ids for row in training} & {row.ids for row in held}


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([Row((1, 2), 1)], "one usable row cannot be split"),
        ([Row((1, i), 1) for i in range(40)], "40 rows of one prompt cannot be split .* at least two prompts"),
        ([Row((1, 2), 0)] * 3, "3 rows of one prompt"),
    ],
)
def test_what_cannot_be_split(rows: list[Row], complaint: str) -> None:
    with pytest.raises(SteeringError, match=complaint):
        split_rows(rows)


def test_a_resumed_run_holds_out_what_it_did(tmp_path: Path) -> None:
    rows = sampled(50, 4)
    training, held = split_rows(rows, seed=9)  # not what would be held out now
    assert prompts(held) != prompts(split_rows(rows)[1])
    store(held, tmp_path / "checkpoints")
    assert split_of_run(rows, tmp_path / "checkpoints") == (training, held)
    with pytest.raises(SteeringError, match="8 rows were held out .* has 7 of them: give the same --data"):
        split_of_run([row for row in rows if row != held[0]], tmp_path / "checkpoints")
    for content in ("", "[]", '{"held_out": 3}', "[" * 9999):
        (tmp_path / "checkpoints" / FILE).write_text(content)
        with pytest.raises(SteeringError, match=f"{FILE} is damaged"):
            split_of_run(rows, tmp_path / "checkpoints")


def test_a_run_without_a_record_goes_on_with_the_last_rows(tmp_path: Path, caplog) -> None:
    rows = [Row((i,), 0) for i in range(100)]
    assert split_of_run(rows, tmp_path) == (rows[:95], rows[95:])
    assert len(split_of_run(rows * 100, tmp_path)[1]) == 64
    assert "held out the last 5 rows" in caplog.text


def test_the_record_says_what_was_held_out(tmp_path: Path, caplog) -> None:
    rows = sampled(100, 4)
    ours, theirs = (describe(*split(rows), "x.jsonl") for split in (split_rows, last_rows))
    assert ours == "20 rows of x.jsonl, all rows of 5 prompts"
    assert theirs.startswith("last 20 rows of x.jsonl, ") and theirs.endswith(" prompts also trained on")
    check_control(str(tmp_path), ours)  # trained elsewhere
    (tmp_path / "training.json").write_text(json.dumps({"acceptance": {"data": ours}}))
    check_control(str(tmp_path), ours)
    assert not caplog.text
    check_control(str(tmp_path), theirs)
    assert f"held out {ours}, this run {theirs}" in caplog.text


def test_rows_keep_their_places(tmp_path: Path) -> None:
    """A cache of states holds rows in the order of the file, whatever is held out."""
    rows = sampled(30, 2)
    everything, training, held = in_file_order(*split_rows(rows))
    assert everything == rows and sorted(training + held) == list(range(60))
    assert [everything[i] for i in held] == split_rows(rows)[1]
