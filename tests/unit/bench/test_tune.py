"""Tuning: the cost model by hand, its advice on both runners, options, and a real run on the tiny pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import server_env
from repository import ROOT

from vllm_steer.bench import cost_model, step_costs, tune
from vllm_steer.bench.tune import TuneConfig
from vllm_steer.common.errors import SteeringError

PAIR = ROOT / "examples/tiny_pair"
RATES = [0.8, 0.5, 0.3]
STEPS = {0: {1: 1.0, 8: 1.0}, 1: {1: 1.2, 8: 1.9}, 3: {1: 1.4, 8: 3.9}}  # seconds by draft length and batch size


def test_the_model_by_hand() -> None:
    found = cost_model.predict([1, 8], STEPS, RATES)
    assert found[1] == pytest.approx({0: 1.0, 1: 1.8 / 1.2, 2: 2.3 / 1.3, 3: 2.6 / 1.4})
    assert found[8] == pytest.approx({0: 8.0, 1: 8 * 1.8 / 1.9, 2: 8 * 2.3 / 2.9, 3: 8 * 2.6 / 3.9})
    assert cost_model.best(found) == {1: 3, 8: 0}


def test_a_length_that_is_as_good_as_a_longer_one_is_chosen() -> None:
    assert cost_model.best({1: {0: 1.0, 1: 2.0, 2: 2.0}}) == {1: 1}


@pytest.mark.parametrize(
    ("chosen", "most", "wanted"),
    [
        ({1: 5, 2: 5, 4: 3, 8: 0}, 8, [[1, 3, 5], [4, 7, 3], [8, 8, 0]]),
        ({2: 5, 4: 5}, 16, [[1, 16, 5]]),
        ({1: 4, 8: 2}, 32, [[1, 7, 4], [8, 32, 2]]),
    ],
)
def test_schedules_are_vllms(chosen: dict[int, int], most: int, wanted: list[list[int]]) -> None:
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    found = cost_model.schedule(chosen, most)
    assert found == wanted
    lookup = build_dynamic_sd_schedule_lookup(found, most, max(chosen.values()))
    assert all(lookup[size] == k for size, k in chosen.items())


def test_advice() -> None:
    assert cost_model.advice({1: 0, 8: 0}, "V1", 8) == (
        "serve without --speculative-config: drafting pays at no batch size measured",
        None,
    )
    assert cost_model.advice({1: 3, 8: 3}, "V1", 8)[1] == {"num_speculative_tokens": 3}
    text, spec = cost_model.advice({1: 3, 4: 1, 8: 0}, "V1", 8)
    assert "from 8 requests on" in text and "even at length 0" in text
    assert spec is not None and spec["num_speculative_tokens_per_batch_size"] == [[1, 3, 3], [4, 7, 1], [8, 8, 0]]
    text, spec = cost_model.advice({1: 3, 4: 1, 8: 0}, "V2", 8)
    assert "up to 4 requests" in text and "V2 makes every draft pass" in text
    assert spec == {"num_speculative_tokens": 3}


def options(tmp_path: Path, **changes: Any) -> TuneConfig:
    base: dict[str, Any] = dict(target=str(PAIR / "target"), drafter=str(PAIR / "steered"))
    base |= dict(prompts=str(PAIR / "heldout.jsonl"), output=str(tmp_path / "tune"), max_model_len=512)
    base |= dict(engine='{"enforce_eager": true, "dtype": "float32"}', count=4, max_tokens=16, batch=(1, 2), k=(1, 3))
    return TuneConfig(**(base | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(batch=(0,)), "--batch is 0, allowed is 1 or more"),
        (dict(k=(1, 1)), "give each number once"),
        (dict(check=(5,)), "--check has 5, predicted are lengths from 1 to 3"),
        (dict(temperature=-1.0), "--temperature is -1"),
        (dict(tree=("2,x",)), "2,x"),
        (dict(engine="{"), "--engine is not valid JSON"),
        (dict(count=5000), "5000 are needed"),
        (dict(drafter=str(PAIR / "adapter")), "is an adapter: give its base drafter as well"),
        (dict(resume=True), "cannot resume"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=words):
        tune.tune(options(tmp_path, **changes))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The draft lengths that each engine was asked for."""
    asked: list[list[int]] = []
    measure = step_costs.measure_in_a_process

    def recorded(contender: Any, lengths: list[int], *more: Any) -> dict[int, Any]:
        asked.append(lengths)
        return measure(contender, lengths, *more)

    monkeypatch.setattr(step_costs, "measure_in_a_process", recorded)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return asked


def test_a_real_tuning(tmp_path: Path, engines: list[list[int]]) -> None:
    found = tune.tune(options(tmp_path, check=(2,), tree=("2,1",)))
    assert list(found["measured"]) == ["none", "k=1", "k=2", "k=3", "tree 2,1"]
    for name, one in found["measured"].items():
        assert [each["batch"] for each in one["batches"]] == [1, 2]
        assert all(each["step"] > each["draft"] >= 0 for each in one["batches"])
        assert all((each["draft"] > 0) == (name != "none") for each in one["batches"])
    assert engines == [[1], [1, 2, 3], [2]], "one engine drafts every length by turns"
    tokens = {name: one["batches"][0]["tokens"] for name, one in found["measured"].items()}
    assert tokens["none"] == 1 < tokens["k=1"] < tokens["k=3"]
    assert tokens["k=3"] == pytest.approx(1 + sum(found["measured"]["k=3"]["rates"]), rel=0.25)
    assert set(found["predicted"][1]) == {0, 1, 2, 3} and "k=2" in found["served"]
    text = (tmp_path / "tune/table.md").read_text()
    assert found["advice"] in text and "tree 2,1" in text and (tmp_path / "tune/tune.png").stat().st_size > 5000
    again = tune.tune(options(tmp_path, check=(2,), tree=("2,1",), resume=True))
    assert json.loads(json.dumps(again["measured"])) == json.loads(json.dumps(found["measured"])), "nothing anew"
    with pytest.raises(SteeringError, match="was measured with max_tokens 16, now it is 8"):
        tune.tune(options(tmp_path, max_tokens=8, resume=True))
    lines = [json.loads(line) for line in (PAIR / "heldout.jsonl").read_text().splitlines()]
    others = [line | {"prompt": "import os\n" + line["prompt"]} for line in lines]
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    with pytest.raises(SteeringError, match="was measured with prompts_sha256"):
        tune.tune(options(tmp_path, prompts=str(tmp_path / "others.jsonl"), resume=True))


def test_on_v2_each_length_has_an_engine(
    tmp_path: Path, engines: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in server_env("v2", tmp_path).items():
        monkeypatch.setenv(key, value)
    found = tune.tune(options(tmp_path, batch=(2,), k=(1, 2)))
    assert engines == [[1], [1, 2], [1]], "the longest of those asked for, until none is missing"
    assert list(found["measured"]) == ["none", "k=1", "k=2"]
    assert {one["environment"]["runner"] for one in found["measured"].values()} == {"V2"}
    tokens = [one["batches"][0]["tokens"] for one in found["measured"].values()]
    assert tokens[0] == 1 < tokens[1] < tokens[2]
