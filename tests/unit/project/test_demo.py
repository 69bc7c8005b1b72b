"""The demo without its servers: which it starts, what it says of their answers, and the cut pair's tokens."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import demo_pairs
import demo_report
from demo_report import Answer, Row

TINY = ROOT / "examples/tiny_pair"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """examples/cut_pair/make.py; the tiny pair's script has the same name."""
    spec = importlib.util.spec_from_file_location("cut_pair_make", demo_pairs.CUT / "make.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def row(name: str, speeds: list[float], beside: list[float] | None = None, text: str = "same", **more: object) -> Row:
    """Answers of 11 tokens, the first after a second, the others at these tokens per second."""

    def answers(of: list[float]) -> list[Answer]:
        return [Answer(text, 11, 1.0, 1.0 + 10 / speed) for speed in of]

    made = Row(name, answers=answers(speeds), beside=answers(beside or []))
    for key, value in more.items():
        setattr(made, key, value)
    return made


def rows() -> list[Row]:
    return [
        row("no speculation", [10, 20, 10]),
        row("plain drafter", [15, 30, 15], [10, 20, 10], acceptance_length=1.5, drafts=9),
        row("steered drafter", [15, 15, 15], [5, 5, 5], acceptance_length=2.0, drafts=9, proof="steering is on"),
    ]


def test_speed_is_compared_with_the_server_beside_and_without_the_first_token() -> None:
    alone, plain, steered = rows()
    assert 1 / alone.per_token == pytest.approx(10) and plain.milliseconds_per_block == pytest.approx(100)
    assert demo_report.gains(plain) == pytest.approx([1.5] * 3) and demo_report.gains(steered) == pytest.approx([3] * 3)
    said = demo_report.table([alone, plain, steered], k=2)
    assert "times as fast as without" in said and "1.50 [1.50, 1.50]" in said and "3.00 [3.00, 3.00]" in said


def test_without_turns_no_speed_is_compared() -> None:
    apart = [row("no speculation", [10]), row("steered drafter", [30], acceptance_length=2.0)]
    assert "times as fast" not in demo_report.table(apart, k=2)


def test_what_is_wrong_is_said() -> None:
    wrong = lambda found, greedy=True: demo_report.wrong_with(found, "steered drafter", greedy)  # noqa: E731
    assert wrong(rows()) == []
    other = [*rows()[:2], row("steered drafter", [15] * 3, [5] * 3, text="other", drafts=9, proof="on")]
    assert wrong(other) == ["steered drafter: text differs from no speculation for prompts [1, 2, 3]"]
    assert wrong(other, greedy=False) == []
    silent = [*rows()[:2], row("steered drafter", [15] * 3, [5] * 3)]
    assert wrong(silent) == ["the steered server never said that steering is on", "the steered server drafted nothing"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    demo_report.plot(tmp_path / "it.png", {"none": (10.0, 1.0), "steered": (15.0, 2.0)})
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_every_drafter_of_a_pair_is_a_server() -> None:
    few = demo_pairs.ways_of(TINY, TINY / "steered", 5, everything=False)
    assert [way.name for way in few] == ["no speculation", "plain drafter", "steered drafter"]
    ways = {way.name: way for way in demo_pairs.ways_of(TINY, TINY / "adapter", 3, everything=True)}
    assert list(ways) == [
        *("no speculation", "plain drafter", "distilled drafter", "steered drafter", "steered, tree of 2 rows"),
        *("DFlash, bigram", "TreeFlash"),
    ]
    assert ways["steered, tree of 2 rows"].options == {"adapter": str(TINY / "adapter"), "tree_rows": 2}
    assert ways["steered drafter"].speculative == {"model": str(TINY / "drafter"), "num_speculative_tokens": 3}
    assert ways["TreeFlash"].speculative["method"] == "dflash"


def test_a_directory_that_is_no_pair_is_named(tmp_path: Path) -> None:
    with pytest.raises(demo_pairs.ServerError, match=r"target is not a model directory: --pair takes tiny, cut, qwen"):
        demo_pairs.find_pair(str(tmp_path), None, False, tmp_path)


def test_the_cut_pairs_drafters_are_of_its_tokens(make: ModuleType) -> None:
    tokens = json.loads(make.TOKENS.read_text())
    size = len(set(tokens))
    assert len(tokens) == size
    for part in ("drafter", "distilled", "steered"):
        assert json.loads((demo_pairs.CUT / part / "config.json").read_text())["vocab_size"] == size
    committed = sum(path.stat().st_size for path in demo_pairs.CUT.rglob("*") if path.is_file())
    assert committed < 25e6


def test_a_cut_tokenizer_keeps_what_tokens_are_merged_from(make: ModuleType) -> None:
    full = {
        "model": {
            "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5},
            "merges": [["a", "b"], ["ab", "c"], ["b", "c"]],
        },
        "added_tokens": [{"content": name, "id": 6 + i} for i, name in enumerate(make.KEPT)],
    }
    old = make.most_frequent(full, make.Counter({4: 9, 5: 1}), size=5)
    assert old == [0, 1, 2, 3, 4, 6, 7, 8]
    cut = make.cut_tokenizer(full, old)
    assert cut["model"] == {
        "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4},
        "merges": [["a", "b"], ["ab", "c"]],
    }
    assert [token["id"] for token in cut["added_tokens"]] == [5, 6, 7]
