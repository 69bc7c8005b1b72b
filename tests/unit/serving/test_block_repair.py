"""What makes the drafts of a block depend on each other, without an engine: values, waits, launches, the switch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocks import make_ngram
from operators import Recorder
from torch import Tensor

from vllm_steer.decoding.block_tree import branches
from vllm_steer.decoding.rescoring import rescored
from vllm_steer.drafters.block import ngram
from vllm_steer.serving.block_plan import BlockPlan
from vllm_steer.serving.spec_decode.repair import Repair

CPU = torch.device("cpu")
VOCAB, K = 12, 4


@pytest.fixture
def repair(tmp_path: Path) -> Repair:
    return Repair(BlockPlan("dflash", str(make_ngram(tmp_path, VOCAB)), 0.5, 0.3), CPU)


def blind(requests: int) -> Tensor:
    return torch.randn(requests, K, VOCAB, generator=torch.Generator().manual_seed(requests))


def test_each_request_has_the_weight_of_its_temperature(repair: Repair, tmp_path: Path) -> None:
    logits, previous = blind(3), torch.tensor([1, 2, 3])
    found = repair.over(logits, torch.tensor([0.0, 1.0, 0.7]))(2, previous)
    table = ngram.load(tmp_path)
    for row, alpha in enumerate((0.5, 0.3, 0.3)):
        torch.testing.assert_close(found[row], rescored(logits[row, 2], previous[row], table, alpha))
    greedy = repair.over(logits, None)(2, previous)
    torch.testing.assert_close(greedy, rescored(logits[:, 2], previous, table, 0.5))


def test_the_switch(repair: Repair) -> None:
    logits, previous = blind(2), torch.tensor([1, 2])
    repair.switch(False)
    torch.testing.assert_close(repair.over(logits, None)(0, previous), logits[:, 0])
    repair.switch(True)
    assert not torch.equal(repair.over(logits, None)(0, previous), logits[:, 0])


def chain_of(logits: Callable[[int, Tensor], Tensor], newest: Tensor) -> None:
    previous = newest
    for step in range(K):
        previous = logits(step, previous).argmax(-1)


def test_nothing_waits_and_launches_do_not_grow_with_the_batch(repair: Repair) -> None:
    counts = {}
    for requests in (2, 7):
        for rows in (1, 3):
            newest, logits = torch.arange(requests), blind(requests)
            with Recorder() as recorder:
                branches(repair.over(logits, torch.ones(requests)), newest, K, rows)
            assert recorder.found["scatter_add"] == (K if rows == 1 else 2 * K - 1)
            assert not recorder.waits
            counts[requests, rows] = recorder.launches
    assert counts[2, 1] == counts[7, 1] and counts[2, 3] == counts[7, 3]
    with Recorder() as recorder:
        chain_of(repair.over(blind(5), None), torch.arange(5))
    assert recorder.launches <= 7 * K, recorder.found


def test_rows_part_where_the_drafter_is_unsure() -> None:
    """By hand: the chain is 1 1 1; its departures in order of probability."""
    table = torch.full((3, 4), -9.0)
    table[:, 1] = 0.0
    table[0, 2], table[1, 3], table[2, 0] = -3.0, -0.5, -1.0
    after = {2: 0, 3: 2}  # what follows a departure

    def logits(step: int, previous: Tensor) -> Tensor:
        out = table[step].expand(len(previous), -1).clone()
        for i, token in enumerate(previous.tolist()):
            if token in after:
                out[i, after[token]] = 5.0
        return out

    found = branches(logits, torch.tensor([1, 1]), 3, 4)
    wanted = [[1, 1, 1], [1, 3, 2], [1, 1, 0], [2, 0, 1]]
    assert found.tolist() == [wanted, wanted]
    assert branches(logits, torch.tensor([1]), 3, 1).tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize("rows", [2, 5, 9])
def test_rows_are_distinct_and_begin_with_the_chain(repair: Repair, rows: int) -> None:
    logits, newest = repair.over(blind(3), None), torch.tensor([1, 2, 3])
    found = branches(logits, newest, K, rows)
    assert found.shape == (3, rows, K)
    for request in range(3):
        paths = {tuple(path) for path in found[request].tolist()}
        assert len(paths) == rows
        chain = branches(logits, newest, K, 1)[request, 0].tolist()
        assert found[request, 0].tolist() == chain


def test_a_tree_alone_leaves_the_drafts_blind() -> None:
    assert not BlockPlan("dflash", None, 0.0, 0.0).repairs
    plan = BlockPlan("dflash", None, 0.0, 0.0, tree_rows=4)
    assert plan.repairs and BlockPlan("treeflash", None, 0.0, 0.0).repairs
    given = blind(2)
    torch.testing.assert_close(Repair(plan, CPU).over(given, None)(1, torch.tensor([0, 0])), given[:, 1])
