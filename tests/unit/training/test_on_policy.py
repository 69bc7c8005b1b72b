"""Rows that the drafter writes anew while it trains: what is written, where it goes, resume, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import VOCAB, folder, options, toy_steering, weights  # noqa: F401 - folder is a fixture
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import Row, collate
from vllm_steer.decoding.chain import _Cached, _guiding
from vllm_steer.training import losses, trainer
from vllm_steer.training.batches import Batches
from vllm_steer.training.on_policy import Writer, answers
from vllm_steer.training.pair import Pair, choose_positions, response_mask

LAYERS = (0, 1, 2)
K = 3
ROWS = [Row((*range(1, 1 + n), *[1] * 9), n) for n in (6, 3, 8)]


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def models(folder: Path) -> list[Any]:  # noqa: F811
    return [AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("target", "drafter")]


def alone(folder: Path, row: Row, steered: bool) -> list[int]:  # noqa: F811
    """The same answer by the parts of the reference loop: one row, no padding."""
    target, drafter = models(folder)
    with torch.no_grad(), _guiding(drafter, toy(folder) if steered else None, 1.0) as guide:
        reader, writer = _Cached(target), _Cached(drafter)
        text = list(row.prompt)
        logits, _ = writer.feed(text, 0)
        if steered:
            logits, states = reader.feed(text, 0, states=guide.layer_ids)
        text.append(int(logits[0].argmax()))
        window = newest = len(row.prompt)
        while len(text) < len(row.ids):
            with guide.using(states[0] if steered else None):
                feed, start = text[window:], window
                for _ in range(K):
                    logits, _ = writer.feed(feed, start)
                    start, feed = start + len(feed), [int(logits[0].argmax())]
                    text += feed
            if steered:
                _, states = reader.feed(text[newest:-1], newest, states=guide.layer_ids)
            window, newest = newest, newest + K
    return text[: len(row.ids)]


def toy(folder: Path) -> Any:  # noqa: F811
    torch.manual_seed(5)
    return toy_steering(folder)


@pytest.mark.parametrize("steered", [True, False])
def test_what_is_written_is_what_the_drafter_says(folder: Path, steered: bool) -> None:  # noqa: F811
    target, drafter = models(folder)
    pair = Pair(drafter, toy(folder) if steered else None, target, losses.LOSSES["jsd"])
    written = answers(pair, target, LAYERS, ROWS, K, frozenset(), greedy)
    assert [list(row.ids) for row in written] == [alone(folder, row, steered) for row in ROWS]
    assert [row.prompt for row in written] == [row.prompt for row in ROWS]


def test_steering_is_in_what_is_written(folder: Path) -> None:  # noqa: F811
    """Or the test above would pass without it."""
    assert [alone(folder, row, True) for row in ROWS] != [alone(folder, row, False) for row in ROWS]


def test_an_answer_ends_with_its_end_of_sequence_token(folder: Path) -> None:  # noqa: F811
    target, drafter = models(folder)
    pair = Pair(drafter, None, target, losses.LOSSES["jsd"])
    whole = answers(pair, target, (), ROWS, K, frozenset(), greedy)
    end = whole[0].ids[ROWS[0].prompt_length + 2]
    cut = answers(pair, target, (), ROWS, K, frozenset({end}), greedy)[0]
    assert cut.ids == whole[0].ids[: whole[0].ids.index(end, ROWS[0].prompt_length) + 1]


def batches(folder: Path, cache: Path | None, tmp_path: Path) -> Batches:  # noqa: F811
    config = options(folder, tmp_path / "out", cache=cache and str(cache))
    target, _ = models(folder)
    arguments = trainer._arguments(config)
    return Batches(config, target, ROWS, LAYERS, arguments)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_written_rows_take_the_last_places_with_states_of_their_own(
    folder: Path, tmp_path: Path, cached: bool, count: int  # noqa: F811
) -> None:  # fmt: skip
    source = batches(folder, tmp_path / "cache" if cached else None, tmp_path)
    fresh = [Row((*row.prompt, *[7] * (20 + i)), row.prompt_length) for i, row in enumerate(ROWS[:count])]
    found = source.replace(source.collate([0, 1, 2]), fresh)
    wanted = source.complete(collate([*ROWS[: 3 - count], *fresh]))
    for name in ("input_ids", "attention_mask", "prompt_lengths"):
        assert torch.equal(found[name], wanted[name])
    real = wanted["attention_mask"].bool()
    torch.testing.assert_close(found["states"][real].float(), wanted["states"][real], atol=0.05, rtol=0.02)
    torch.testing.assert_close(
        found["states"][-count:][real[-count:]].float(), wanted["states"][-count:][real[-count:]]
    )


def test_the_pool_is_of_the_weights_and_the_step(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    target, drafter = models(folder)
    source, pair = batches(folder, None, tmp_path), Pair(drafter, None, target, losses.LOSSES["jsd"]).train()
    common: dict[str, Any] = {"fraction": 0.5, "renew": 4, "rows": 1, "k": K, "eos": frozenset()}

    def make(seed: int = 1, **more: int) -> Writer:
        return Writer(pair, source, ROWS, seed=seed, **common, **more)

    batch = [collate(ROWS[:2])]
    writer = make()
    at = {step: writer.replace(batch, step)[0]["input_ids"].tolist() for step in (0, 1, 4)}
    pool = {tuple(row.ids) for row in writer._pool}
    assert len(pool) > 1 and writer._of == 4 and pair.training
    again = make().replace(batch, 4)[0]["input_ids"].tolist()
    assert again == at[4] != at[0]
    assert make(seed=2).replace(batch, 4)[0]["input_ids"].tolist() != again
    assert make(rank=1).replace(batch, 4)[0]["input_ids"].tolist() != again
    late = make()
    late.replace([collate(ROWS[:1])], 0)  # the short batch of an epoch begins a window
    assert len(late.replace(batch, 1)[0]["input_ids"]) == 2 and len(late._pool) == 4
    assert writer.report(10.0)["tokens"] > 0 and 0 < writer.report(10.0)["share_of_time"] < 1


@pytest.mark.parametrize("mode", ["distill", "joint"])
def test_a_resumed_run_writes_what_the_first_one_wrote(folder: Path, tmp_path: Path, mode: str, monkeypatch) -> None:  # noqa: F811
    run = dict(steps=6, save_every=2, on_policy=0.5, renew=2, mode=mode)
    accepted = trainer.train(options(folder, tmp_path / "whole", **run))
    assert accepted["on_policy"]["tokens"] > 0
    calls, distance = [], losses.LOSSES["jsd"]

    def stopping(*logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 7:  # two of them were for the forecast
            raise KeyboardInterrupt
        return distance(*logits)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(losses.LOSSES, "jsd", stopping)
        trainer.train(options(folder, tmp_path / "parts", **run))
    with pytest.raises(SteeringError, match="--on-policy was 0.5 .* and is 0.25 now"):
        trainer.train(options(folder, tmp_path / "parts", resume=True, **(run | {"on_policy": 0.25})))
    trainer.train(options(folder, tmp_path / "parts", resume=True, **run))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    trainer.train(options(folder, tmp_path / "fixed", **(run | {"on_policy": 0.0})))
    fixed = weights(tmp_path / "fixed")
    assert any(not torch.equal(whole[name], fixed[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(on_policy=1.1), "--on-policy is 1.1, allowed is 0 to 1"),
        (dict(on_policy=0.5, mode="steer"), "--mode is steer"),
        (dict(on_policy=0.5, save_every=30, renew=20), "--save-every that --renew divides"),
        (dict(on_policy=0.1, batch_size=4), "--on-policy 0.1 of --batch-size 4 is no row"),
        (dict(renew=0), "--renew is 0, allowed is 1 or more"),
        (dict(on_policy=0.5, kind="dflash", drafter=None), "--on-policy is 0.5, which --kind dflash does not have"),
    ],
)
def test_out_of_range(changes: dict, words: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(SteeringError, match=words):
        options(folder, tmp_path / "out", **changes)


def test_rows_without_a_prompt_cannot_be_answered(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [{"text": " ".join(f"w{1 + (i + j) % (VOCAB - 1)}" for j in range(12))} for i in range(8)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SteeringError, match="--on-policy needs rows with a prompt"):
        trainer.train(options(folder, tmp_path / "out", data=(str(tmp_path / "text.jsonl"),), on_policy=0.5))


def test_the_loss_is_taken_at_a_share_of_the_positions(folder: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    batch = collate(ROWS)
    whole = response_mask(batch)
    some = response_mask(choose_positions(batch, 0.5, "a"))
    assert (some & ~whole).sum() == 0 and 0 < some.sum() < whole.sum()
    assert torch.equal(some, response_mask(choose_positions(batch, 0.5, "a")))
    assert not torch.equal(some, response_mask(choose_positions(batch, 0.5, "b")))
    assert response_mask(choose_positions(batch, 1e-9, "a")).sum() == 1, "no step is empty"
    means = [float(response_mask(choose_positions(batch, 0.5, str(i))).sum()) for i in range(200)]
    assert abs(sum(means) / len(means) / float(whole.sum()) - 0.5) < 0.03
    counted, distance = [], losses.LOSSES["jsd"]

    def counting(*logits: Tensor) -> Tensor:
        counted.append(len(logits[0]))
        return distance(*logits)

    for share in (1.0, 0.25):
        with monkeypatch.context() as patch:
            patch.setitem(losses.LOSSES, "jsd", counting)
            trainer.train(options(folder, tmp_path / str(share), steps=1, positions=share, batch_size=4))
    assert 0 < min(counted) < max(counted) == 4 * 14
    with pytest.raises(SteeringError, match="--positions is 0, allowed is more than 0"):
        options(folder, tmp_path / "out", positions=0)


def test_harm_is_warned_of(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    trainer.train(options(folder, tmp_path / "out", mode="distill", drafter_lr=10.0, steps=3, keep="last"))
    assert "below the untrained drafter's" in caplog.text
