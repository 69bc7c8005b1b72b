"""Blocks are counted right, on both runners: as the scheduler and the evaluator know them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import counted
import pytest
import torch
from engines import Runner
from repository import ROOT
from samples import round_of
from test_features import heldout

from vllm_steer.serving.telemetry.block_counter import Blocks

PAIR = ROOT / "examples" / "tiny_pair"
K, BLOCK, LONGEST = 4, 32, 128
RUNNERS = pytest.mark.parametrize("runner", ["v1", "v2"])
UNSTEERED = {  # method, our options, rows of the tree
    "tree": (None, {"tree": [3, 1, 1, 1]}, 3),
    "treeflash": ("dflash", {}, 0),
    "treeflash rows": ("dflash", {"tree_rows": 3}, 3),
}
CALLS = ("ordinary", "cold", "full hits", "preempted", "to the end", "off")


@pytest.fixture(scope="module")
def counters() -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """`counters("v1")`: what CALLS came to on one engine with a KV cache of eleven blocks."""
    done: dict[str, list[dict[str, Any]]] = {}

    def get(name: str) -> list[dict[str, Any]]:
        if name not in done:
            runner = Runner(name, counted.__file__)
            keys = {"max_model_len": LONGEST, "num_gpu_blocks_override": 11, "enable_prefix_caching": True}
            spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
            out = runner.run(PAIR / "target", spec, calls(), block_size=BLOCK, **keys)
            runner.close()
            assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
            done[name] = out["calls"]
        return done[name]

    return get


def calls() -> list[dict[str, Any]]:
    rows = heldout()
    full = [rows[i][: 2 * BLOCK + 1] for i in (20, 21)]  # all but the last token fill blocks of the cache
    made = {
        "ordinary": ([rows[i][: 6 + 3 * i] for i in range(4)], 24, 2, 1),
        "cold": (full, 12, 2, 1),
        "full hits": (full, 12, 2, 1),
        "preempted": ([rows[i][:i] for i in range(28, 34)], 36, 6, 1),
        "to the end": ([rows[40][:100], rows[41][:40]], 40, 2, 1),
        "off": ([rows[i][:9] for i in (5, 6)], 16, 2, 0),
    }
    keys = ("prompts", "max_tokens", "batch", "scale")
    return [dict(zip(keys, made[name], strict=True)) for name in CALLS]


def truth(call: dict[str, Any]) -> tuple[int, int]:
    """Blocks and accepted tokens by the scheduler: no placeholders, and not what a step verified that drafted nothing
    afterwards (V1, near the end of the context): the drafter is not told of it."""
    skipped = {v["step"] - 1 for v in call["verified"] if not any(v["drafts"])}
    real = [v for v in call["verified"] if not v["admitted"] and any(v["drafts"])]
    ours = [v["accepted"] for v in real if v["step"] not in skipped]
    return len(ours), sum(ours)


def total(table: list[list[float]]) -> float:
    return sum(map(sum, table))


@RUNNERS
@pytest.mark.parametrize("name", CALLS)
def test_blocks_are_counted_as_the_scheduler_knows_them(runner: str, name: str, counters: Any) -> None:
    call = counters(runner)[CALLS.index(name)]
    blocks, accepted = truth(call)
    on, off = total(call["steered"]), total(call["unsteered"])
    assert (on + off, call["accepted"]) == (blocks, accepted) and blocks > 5
    assert sum(call["accepted_at"]) == accepted and call["accepted_at"] == sorted(call["accepted_at"], reverse=True)
    vllms = len(call["verified"])
    if name == "full hits":
        assert vllms == blocks + 2, "vLLM counts placeholders, one block for each prompt"
        assert runner == "v2" or [v["drafts"] for v in call["verified"] if v["admitted"]] == [[-1] * K] * 2
    if name == "preempted":
        assert call["preempted"] > 0
    # The first block of a call in which the scale was changed was not drafted in the call before it: none is mixed.
    assert (off, call["guides"]) == (blocks, 0) if name == "off" else (off == 0 and call["guides"] >= blocks)


@RUNNERS
def test_blocks_are_the_evaluators(runner: str, counters: Any) -> None:
    for name in ("ordinary", "cold", "off"):
        call = counters(runner)[CALLS.index(name)]
        accepted = [n for answer in call["answers"] for n in answer["accepted"]]
        assert (total(call["steered"]) + total(call["unsteered"]), call["accepted"]) == (len(accepted), sum(accepted))
        by_number = [sum(column) for column in zip(*call["steered"], strict=True)]
        if name != "off":
            assert by_number == [accepted.count(n) for n in range(K + 1)]


@RUNNERS
def test_blocks_of_trees_are_counted_by_row(runner: str) -> None:
    engine = Runner(runner, counted.__file__)
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
    keys = {"max_model_len": 512, "max_num_batched_tokens": 256}
    tree = {"additional_config": {"vllm_steer": {"tree": [3, 1, 1, 1]}}}
    out = engine.run(PAIR / "target", spec, calls()[:1], block_size=BLOCK, **keys, **tree)
    engine.close()
    assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
    call = out["calls"][0]
    blocks, accepted = truth(call)
    assert (total(call["steered"]), call["accepted"], sum(call["rows"])) == (blocks, accepted, blocks)
    assert call["rows"][0] > call["rows"][1] > 0 and len(call["rows"]) == 3


@RUNNERS
@pytest.mark.parametrize("kind", UNSTEERED)
def test_blocks_of_unsteered_drafters_are_counted(runner: str, kind: str) -> None:
    """Of draft trees of a plain drafter, and of a block drafter's chains and rows, by depth and by row."""
    method, own, rows = UNSTEERED[kind]
    engine = Runner(runner, counted.__file__)
    drafter = PAIR / ("drafter" if method is None else "treeflash")
    spec = {"model": str(drafter), "num_speculative_tokens": K} | ({"method": method} if method else {})
    keys = {"max_model_len": 512, "max_num_batched_tokens": 256, "additional_config": {"vllm_steer": own}}
    out = engine.run(PAIR / "target", spec, calls()[:1], block_size=BLOCK, **keys)
    engine.close()
    assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
    call = out["calls"][0]
    blocks, accepted = truth(call)
    assert (total(call["unsteered"]), call["accepted"], total(call["steered"])) == (blocks, accepted, 0)
    assert len(call["accepted_at"]) == K and sum(call["accepted_at"]) == accepted > 0
    assert (len(call["rows"]), sum(call["rows"])) == (rows, blocks if rows else 0)


def test_v1_skips_drafting_at_the_end_of_the_context(counters: Any) -> None:
    """Its next step then verifies zeros nobody drafted: vLLM counts them, we do not."""
    call = counters("v1")[CALLS.index("to the end")]
    zeros = [v for v in call["verified"] if not any(v["drafts"])]
    assert len(zeros) == 2 and len(call["verified"]) == total(call["steered"]) + 4


def test_norm_of_the_guides(counters: Any) -> None:
    first = counters("v1")[0]
    assert first["norms"] / first["guides"] == pytest.approx(counters("v2")[0]["norms"] / first["guides"], rel=0.05)


# --- without an engine ----------------------------------------------------------------------------------------------


def test_only_drafts_of_the_last_round_count() -> None:
    blocks = Blocks(8, K, torch.device("cpu"))
    round_of(blocks, "abe", None, [0, 0, 0], [4, 6, 2])  # prompts of 5 and 7 tokens, and 3 tokens of a longer one
    round_of(blocks, "bea", [K, 0, K], [7, 3, 5], [3, 2, 0])  # in another order; e reads on: that is no block
    round_of(blocks, "acd", [K, K, 0], [6, 8, 0], [4, 1, 9])  # b was preempted, c is a full hit of the prefix cache
    round_of(blocks, "cab", [K, K, K], [10, 12, 11], [0, 0, 0])  # a skipped a round: its window starts past its end
    counts = blocks.read()
    assert counts.steered.sum() == 4 and counts.unsteered.sum() == 0
    assert counts.steered[K].tolist() == [2, 0, 0, 1, 1]
    assert counts.accepted == 7 and counts.accepted_at == [2, 2, 2, 1]


def test_a_block_is_steered_if_its_drafts_were() -> None:
    blocks = Blocks(8, K, torch.device("cpu"))
    round_of(blocks, "a", None, [0], [0], on=False)
    round_of(blocks, "a", [2], [1], [2], on=True)
    round_of(blocks, "a", [K], [4], [1], on=True)
    counts = blocks.read()
    assert counts.unsteered[2, 2] == 1 == counts.steered[K, 1] and counts.steered.sum() == counts.unsteered.sum() == 1
