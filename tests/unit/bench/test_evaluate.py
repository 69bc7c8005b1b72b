"""`vllm-steer bench`: counting rules by hand, intervals against scipy, the real command on the tiny pair."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import ENV, runner_env
from repository import ROOT, SUPPORT

from vllm_steer import cli
from vllm_steer.bench import block_counting, remote, report, summary
from vllm_steer.bench import run as evaluate
from vllm_steer.bench.block_counting import Answer, count
from vllm_steer.bench.candidate import Contender
from vllm_steer.bench.run import BenchConfig
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer

PAIR = ROOT / "examples" / "tiny_pair"
K = 3


def counted(steps: list[int], accepted: list[int], max_tokens: int = 100, stopped: bool = False) -> Answer:
    return count(
        "p", None, steps, max_tokens=max_tokens, k=K, accepted=accepted, drafted=[K] * len(accepted), stopped=stopped
    )


# --- counting, by hand ----------------------------------------------------------------------------------------------


def test_the_first_token_is_no_block() -> None:
    answer = counted([1, 3, 1, 4], [2, 0, 3])
    assert answer.blocks == (3, 1, 4)
    assert block_counting.acceptance_length([answer]) == 8 / 3
    assert block_counting.per_position([answer], K) == [2 / 3, 2 / 3, 1 / 3]


def test_a_block_the_limit_cuts_is_left_out() -> None:
    # 6 tokens asked for: 10 delivered. The last step was cut to 2 of 4; it starts at 8, after the sixth token.
    assert block_counting.tokens_to_ask(6, K) == 10
    answer = counted([1, 2, 1, 4, 2], [1, 0, 3, 3], max_tokens=6)
    assert answer.blocks == (2, 1, 4), "the block that starts before the limit counts whole"
    assert not answer.stopped_on_draft
    assert counted([1, 4, 1], [3, 0], max_tokens=5).blocks == (4,), "a block that starts at the limit does not count"
    assert counted([1, 3, 1], [2, 0], max_tokens=5).blocks == (3, 1)


def test_no_truncation_bias() -> None:
    """Drafts accepted with probability 0.8: 1 + .8 + .64 + .512 tokens per block, whatever the limit."""
    rng, ours, naive = random.Random(0), [], [0, 0]
    for _ in range(4000):
        steps, accepted = [1], []
        while sum(steps) < block_counting.tokens_to_ask(8, K):
            accepted.append(next((n for n in range(K) if rng.random() > 0.8), K))
            steps.append(accepted[-1] + 1)
        steps[-1] -= max(0, sum(steps) - block_counting.tokens_to_ask(8, K))  # the engine cuts
        ours.append(counted(steps, accepted, max_tokens=8))
        cut = np.minimum(np.cumsum(steps), 8)  # what counting delivered tokens up to the limit would give
        naive[0] += cut[-1] - 1
        naive[1] += int((np.diff(cut) > 0).sum())
    true = 1 + 0.8 + 0.64 + 0.512
    assert block_counting.acceptance_length(ours) == pytest.approx(true, abs=0.03)
    assert naive[0] / naive[1] < true - 0.2
    assert block_counting.per_position(ours, K) == pytest.approx([0.8, 0.64, 0.512], abs=0.01)


def test_a_stop_inside_a_block() -> None:
    # The second draft was the stop token: vLLM accepted all three, two were delivered, the third is no rejection.
    on_draft = counted([1, 4, 2], [3, 3], stopped=True)
    assert on_draft == Answer("p", None, (4, 2), stopped_on_draft=True)
    assert block_counting.acceptance_length([on_draft]) == 3
    assert block_counting.per_position([on_draft], K) == [1, 1, 1]
    # The target put the stop token in the place of the second draft: that one was rejected, and so the third.
    by_target = counted([1, 4, 2], [3, 1], stopped=True)
    assert by_target == Answer("p", None, (4, 2), stopped_on_draft=False)
    assert block_counting.per_position([by_target], K) == [1, 0.5, 0.5]
    # The stop token was the bonus token: all drafts accepted.
    assert block_counting.per_position([counted([1, 4], [3], stopped=True)], K) == [1, 1, 1]
    # The first draft was the stop token: nobody can tell about the others.
    assert block_counting.per_position([counted([1, 1], [2], stopped=True)], K) == [1, None, None]
    # It stopped in a block that is not counted any more.
    assert counted([1, 4, 1], [3, 3], max_tokens=5, stopped=True) == Answer("p", None, (4,), stopped_on_draft=False)


def test_a_sequence_without_a_block_counts_as_none() -> None:
    empty = counted([1], [], stopped=True)
    assert empty.blocks == () and block_counting.acceptance_length([empty]) is None
    assert block_counting.per_position([empty], K) == [None] * K
    other = counted([1, 2, 1], [1, 0])
    assert block_counting.acceptance_length([empty, other]) == block_counting.acceptance_length([other]) == 1.5


def test_without_speculation_every_step_is_one_token() -> None:
    answer = count("p", None, [1, 1, 1, 1], max_tokens=3, k=0)
    assert answer.blocks == (1, 1) and block_counting.per_position([answer], 0) == []


@pytest.mark.parametrize(
    "steps, accepted, drafted, why",
    [
        ([], [], [], "delivered 0 tokens"),
        ([2, 1], [0], [3], "delivered 2 tokens"),
        ([1, 4, 3], [3], [3], "2 steps after the prefill, but 1"),
        ([1, 3, 1], [3, 0], [3, 3], "another number of tokens"),
        ([1, 3], [1], [3], "its last step delivered 3"),
        ([1, 2], [1], [2], "2 drafts instead of 3"),
    ],
)
def test_what_is_no_block_is_refused(steps: list[int], accepted: list[int], drafted: list[int], why: str) -> None:
    with pytest.raises(SteeringError, match=why):
        count("p", None, steps, max_tokens=9, k=K, accepted=accepted, drafted=drafted)


def test_record_and_back() -> None:
    answer = Answer("p", "chat", (4, 1, 2), stopped_on_draft=True)
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict() | {"other": 1}))) == answer
    assert Answer.from_dict(Answer("p", None, ()).to_dict()).blocks == ()


# --- intervals ------------------------------------------------------------------------------------------------------


def test_two_prompts_by_hand() -> None:
    """6 tokens in 2 blocks and 2 in 2: a sample of two prompts gives 3, 2 or 1, the ends a quarter of the time each."""
    rows, pairs = block_counting.summarise({"a": [Answer("1", None, (3, 3)), Answer("2", None, (1, 1))]}, {"a": K})
    assert rows[0]["acceptance_length"] == 2 and rows[0]["interval_95"] == [1, 3] and pairs == []


def test_pairing() -> None:
    """A drafter that is one token better on every prompt is certainly better, however much prompts differ."""
    sizes = [1, 2, 3] * 4
    a = [Answer(str(i), None, (n, n)) for i, n in enumerate(sizes)]
    b = [Answer(str(i), None, (n + 1, n + 1)) for i, n in enumerate(sizes)]
    rows, pairs = block_counting.summarise({"none": a, "a": a, "b": b}, {"none": 0, "a": K, "b": K})
    low, high = rows[1]["interval_95"]
    assert low < 1.7 and high > 2.3
    assert [(pair["name"], pair["minus"]) for pair in pairs] == [("b", "a")]
    assert pairs[0]["difference"] == 1 and pairs[0]["difference_95"] == pytest.approx([1, 1])
    assert pairs[0]["ratio"] == 1.5 and pairs[0]["ratio_95"][0] < 1.5 < pairs[0]["ratio_95"][1]


def test_intervals_are_scipys() -> None:
    from scipy.stats import bootstrap

    rng = random.Random(1)
    answers = {
        name: [Answer(str(i), None, tuple(rng.randint(1, top) for _ in range(rng.randint(1, 30)))) for i in range(40)]
        for name, top in (("a", 4), ("b", 5))
    }
    rows, pairs = block_counting.summarise(answers, {"a": K, "b": K})
    a, b = (block_counting.table(answers[name]).T for name in "ab")

    def ratio(t: np.ndarray, n: np.ndarray, axis: int) -> np.ndarray:
        return t.sum(axis) / n.sum(axis)

    def gain(at: np.ndarray, an: np.ndarray, bt: np.ndarray, bn: np.ndarray, axis: int) -> np.ndarray:
        return ratio(bt, bn, axis) - ratio(at, an, axis)

    how = {"paired": True, "vectorized": True, "method": "percentile", "rng": np.random.default_rng(2)}
    for data, statistic, ours in (((*a,), ratio, rows[0]["interval_95"]), ((*a, *b), gain, pairs[0]["difference_95"])):
        theirs = bootstrap(data, statistic, n_resamples=10_000, **how).confidence_interval
        assert ours == pytest.approx([theirs.low, theirs.high], abs=0.015)
        assert ours[1] - ours[0] > 0.05


def test_too_few_to_tell() -> None:
    one, empty = Answer("1", None, (3, 2)), Answer("2", None, ())
    assert block_counting.summarise({"a": [one]}, {"a": K})[0][0]["interval_95"] is None
    swapped = [Answer("1", None, ()), Answer("2", None, (3, 2))]
    rows, pairs = block_counting.summarise({"a": [one, empty], "b": swapped}, {"a": K, "b": K})
    assert rows[0]["interval_95"] is None, "a quarter of the samples has no block"
    assert pairs[0]["difference_95"] is None and pairs[0]["difference"] == 0


# --- bad input ------------------------------------------------------------------------------------------------------

GOOD = {"prompts": "p.jsonl", "output": "out", "target": "t", "drafters": ("plain=d",)}


@pytest.mark.parametrize(
    "change, why",
    [
        ({"k": 0}, "--k is 0, allowed is 1 or more"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"batch": -1}, "--batch is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"temperature": (0.0, -0.5)}, "--temperature is -0.5"),
        ({"temperature": (float("nan"),)}, "--temperature is nan"),
        ({"temperature": (1.0, 1.0)}, "each temperature once"),
        ({"drafters": ("plain=a", "plain=b")}, "'plain' twice"),
        ({"drafters": ("none=a",)}, "it is 'none'"),
        ({"drafters": ("a",)}, "allowed is NAME=DRAFTER"),
        ({"drafters": ("a b=c",)}, "with a name of letters"),
        ({"drafters": ()}, "nothing to measure"),
        ({"drafters": ("a=b@tree:4,1",), "k": 5}, "a with a tree 2 deep, --k is 5: give both the same length"),
        ({"drafters": ("a=b@tree:x",)}, "the tree is 'x', allowed are whole numbers with commas"),
        ({"drafters": ("a=b@rows:x",)}, "@rows:L for draft trees"),
        ({"drafters": ("a=b@rows:0",)}, "@rows:L for draft trees"),
        ({"target": None}, "nothing to measure"),
        ({"engine": "{"}, "--engine is not valid JSON"),
        ({"engine": "[]"}, "allowed is a JSON object"),
        ({"chat_template_kwargs": "[]"}, "--chat-template-kwargs is .., allowed is a JSON object"),
        ({"engine": '{"max_num_seqs": 4}'}, "--engine has 'max_num_seqs'"),
        ({"url": "http://localhost:1"}, "leave out --target"),
        ({"model": "m"}, "give --url"),
    ],
)
def test_options_that_make_no_sense(change: dict[str, Any], why: str) -> None:
    with pytest.raises(SteeringError, match=why):
        BenchConfig(**GOOD | change)


def test_contenders(tmp_path: Path) -> None:
    assert Contender.parse("a=x/y") == Contender("a", "x/y", None)
    assert Contender.parse("a=ad/x+base") == Contender("a", "base", "ad/x")
    assert Contender.parse("a=x/y@tree:4,1") == Contender("a", "x/y", None, (4, 1))
    assert Contender.parse("a=ad/x+base@tree:2,2") == Contender("a", "base", "ad/x", (2, 2))
    assert Contender.parse("a=x@rows:4@blind") == Contender("a", "x", rows=4, blind=True)
    assert Contender.parse("a=x+y@rows:4") == Contender("a", "y", "x", rows=4)
    assert [Contender.parse(f"a=x{mark}").drafts(2) for mark in ("", "@tree:4,1", "@rows:4")] == [2, 11, 11]
    fixed, rows = (BenchConfig(**GOOD | {"drafters": (f"a=x{mark}",), "k": 2}) for mark in ("@tree:4,1", "@rows:4"))
    assert evaluate._rows(rows) == evaluate._rows(fixed) > 0, "room for the rows of any tree"
    (tmp_path / "c++").mkdir()
    assert Contender.parse(f"a={tmp_path}/c++").adapter is None, "a directory of that name is meant"
    assert [c.name for c in BenchConfig(**GOOD | {"none": True}).contenders] == ["none", "plain"]


def test_built_in_prompts_are_those_nobody_trained_on() -> None:
    chosen = [BenchConfig(**GOOD | {"prompts": "builtin:code", "split": s}).read_prompts() for s in (None, "train")]
    ids = [{prompt.id for prompt in prompts} for prompts in chosen]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    assert ids[0] == {p.id for p in BenchConfig(**GOOD | {"prompts": "builtin:code", "split": "test"}).read_prompts()}


def heldout(path: Path, number: int) -> Path:
    """Prompts of the tiny pair in two categories, one of them chat messages, and one too long."""
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:number]
    rows = [{"prompt": json.loads(line)["prompt"], "category": ["odd", "even"][i % 2]} for i, line in enumerate(lines)]
    rows[1]["prompt"] = [{"role": "user", "content": rows[1]["prompt"]}]
    rows.append({"id": "endless", "prompt": "x = 1\n" * 2000, "category": "odd"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def bench_config(tmp_path: Path, **change: Any) -> BenchConfig:
    prompts = tmp_path / "p.jsonl"
    if not prompts.exists():
        heldout(prompts, 2)
    keys = {"target": str(PAIR / "target"), "drafters": (f"plain={PAIR / 'drafter'}",), "output": str(tmp_path / "out")}
    return BenchConfig(prompts=str(prompts), **keys | change)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"drafters": ("plain=./no/such/drafter",)}, "./no/such/drafter"),
        ({"target": "./no/such/target"}, "./no/such/target"),
        ({"drafters": (f"a={PAIR / 'adapter'}",)}, r"is an adapter: give its base drafter as well, a=.*\+DRAFTER"),
        ({"drafters": (f"a={PAIR / 'drafter'}+{PAIR / 'drafter'}",)}, "cannot read .*steering/config.json"),
        ({"drafters": (f"a={PAIR / 'adapter'}+{PAIR / 'target'}",)}, "this drafter has"),
        ({"drafters": (f"a={PAIR / 'steered'}",), "target": str(PAIR / "drafter")}, "this target has"),
        ({"max_model_len": 60}, "no prompt of .* fits: 60 tokens"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"resume": True}, "cannot resume"),
    ],
)
def test_refused_before_any_engine_starts(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    config = bench_config(tmp_path)
    with pytest.raises(SteeringError, match=why):
        evaluate.benchmark(BenchConfig(**vars(config) | change))
    assert not Path(config.output).exists()


def test_an_output_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(SteeringError, match="exists and is not an empty directory"):
        evaluate.benchmark(bench_config(tmp_path))
    (tmp_path / "out" / "results.json").write_text('{"settings": {}}')
    with pytest.raises(SteeringError, match="not of a benchmark"):
        evaluate.benchmark(bench_config(tmp_path, resume=True))


def test_a_second_benchmark_of_one_output_is_refused(tmp_path: Path) -> None:
    config = bench_config(tmp_path)
    output = Path(config.output)
    with only_writer(output.parent / f".{output.name}.lock", "x"):
        with pytest.raises(SteeringError, match="another process is writing"):
            evaluate.benchmark(config)


# --- the real command -----------------------------------------------------------------------------------------------

MAX_TOKENS, DRAFTS, PROMPTS = 24, 5, 8
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    "max_num_batched_tokens": 512,
    "block_size": 32,
}
STOPS = (".", " the")  # end some answers early, in a copy of the target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target, which also stops at STOPS: in the middle of blocks, on drafts and not."""
    from transformers import AutoTokenizer

    directory = shutil.copytree(PAIR / "target", tmp_path_factory.mktemp("models") / "target")
    path = directory / "generation_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    stop = AutoTokenizer.from_pretrained(directory).encode("".join(STOPS))
    assert len(stop) == len(STOPS)
    path.write_text(json.dumps(raw | {"eos_token_id": [raw["eos_token_id"], *stop]}), encoding="utf-8")
    return directory


def command(target: Path, prompts: Path, output: Path, *words: str, runner: str = "v1") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vllm_steer.cli", "bench", "--target", str(target), "--prompts", str(prompts),
         "--output", str(output), "--k", str(DRAFTS), "--max-tokens", str(MAX_TOKENS), "--batch", "4",
         "--max-model-len", "512",
         "--engine", json.dumps(ENGINE), *words],
        env=os.environ | ENV | runner_env(runner) | {"VLLM_LOGGING_LEVEL": "WARNING"} | hook(runner, output.parent),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def hook(runner: str, directory: Path) -> dict[str, str]:
    """For V2 on a CPU: every Python started accepts Triton's interpreter, as the engine process of engines.py does."""
    if runner == "v1":
        return {}
    code = "import os, interpreter\ninterpreter.pretend_triton_has_a_cpu_backend(os.environ['STEER_TEST_TRITON'])\n"
    (directory / "sitecustomize.py").write_text(code, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(directory), str(SUPPORT)])}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heldout(tmp_path_factory.mktemp("prompts") / "p.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def measured(target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output directory of a benchmark in two parts, the second resumed, and what they printed."""
    output = tmp_path_factory.mktemp("bench") / "out"
    plain, steered = (f"{name}={PAIR / where}" for name, where in (("plain", "drafter"), ("steered", "steered")))
    first = command(target, prompts, output, "--none", "--drafters", plain)
    assert first.returncode == 0, first.stderr[-4000:]
    second = command(target, prompts, output, "--none", "--drafters", plain, steered, "--resume")
    assert second.returncode == 0, second.stderr[-4000:]
    assert "none: measured already\nplain: measured already\n" in second.stdout
    return output, second.stdout + second.stderr


def answers_of(output: Path, name: str, place: int = 0) -> list[Answer]:
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    contender = next(c for c in results["contenders"] if c["name"] == name)
    return [Answer.from_dict(raw) for raw in contender["runs"][place]["answers"]]


def recorded(call: dict[str, Any], prompts: list[list[int]]) -> list[Answer]:
    """Blocks from the drafts a live engine proposed and the tokens it answered, greedy: nobody's counting but ours."""
    found = []
    for i, (prompt, tokens, proposals) in enumerate(zip(prompts, call["tokens"], call["blocks"], strict=True)):
        blocks, on_draft = [], False
        for position, drafts in proposals:
            newest = position - len(prompt)  # its place in the answer
            rest = tokens[newest + 1 :]
            if newest < 0:  # drafted in the middle of a prompt, never verified
                continue
            if newest >= MAX_TOKENS - 1 or not rest:
                break
            accepted = next((n for n, (d, t) in enumerate(zip(drafts, rest, strict=False)) if d != t), None)
            accepted = min(len(drafts), len(rest)) if accepted is None else accepted
            blocks.append(min(accepted + 1, len(rest)))
            on_draft = accepted == len(rest)
        found.append(Answer(str(i), None, tuple(blocks), on_draft))
    return found


def test_blocks_are_those_of_the_engine(target: Path, prompts: Path, measured: tuple[Path, str], runners: Any) -> None:
    """Block sizes as counted, as recorded from the drafter's own proposals, and as vLLM's counters sum them up."""
    from transformers import AutoTokenizer

    from vllm_steer.data.prompts import encode_prompt, read_prompts

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = [encode_prompt(tokenizer, p.prompt) for p in read_prompts(str(prompts))[:PROMPTS]]
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": DRAFTS, "draft_sample_method": "probabilistic"}
    sampling = {"max_tokens": block_counting.tokens_to_ask(MAX_TOKENS, DRAFTS), "ignore_eos": False}
    out = runners("v1").run(target, spec, [{"prompts": ids, "sampling": sampling}], **ENGINE, max_num_seqs=4)
    assert out["error"] is None, out["log"][-4000:]
    want = recorded(out["calls"][0], ids)
    have = answers_of(measured[0], "steered")
    assert [a.blocks for a in have] == [a.blocks for a in want]
    assert [a.stopped_on_draft for a in have] == [a.stopped_on_draft for a in want]
    assert any(a.stopped_on_draft for a in have), "no answer stopped on a draft: choose other prompts"
    assert any(len(t) >= sampling["max_tokens"] for t in out["calls"][0]["tokens"]), "none ran to its length"
    assert out["metrics"]["vllm:spec_decode_num_drafts"] >= sum(len(a.blocks) for a in have) > 3 * PROMPTS


def test_results(measured: tuple[Path, str]) -> None:
    output, shown = measured
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert [c["name"] for c in results["contenders"]] == ["none", "plain", "steered"]
    assert [c["steered"] for c in results["contenders"]] == [False, False, True]
    assert results["settings"]["number_of_prompts"] == PROMPTS
    assert [p["id"] for p in results["dropped_prompts"]] == ["endless"] and "prompt endless left out" in shown
    assert [part["temperature"] for part in results["summary"]] == [0, 1]
    greedy, sampled = results["summary"]
    for part in results["summary"]:
        none, plain, steered = part["rows"]
        assert none["acceptance_length"] == 1 and none["drafting_share"] is None
        for row in (plain, steered):
            answers = answers_of(output, row["name"], results["summary"].index(part))
            assert row["acceptance_length"] == block_counting.acceptance_length(answers) > 1
            assert row["interval_95"][0] < row["acceptance_length"] < row["interval_95"][1]
            assert 0 < row["drafting_share"] < 1 and row["tokens_per_second"] > 0
            rates = row["acceptance_rates"]
            assert len(rates) == DRAFTS and rates == sorted(rates, reverse=True)
        assert [(p["name"], p["minus"]) for p in part["pairs"]] == [("steered", "plain")]
        assert list(part["categories"]) == ["odd", "even"]
        assert sum(c["rows"][1]["blocks"] for c in part["categories"].values()) == plain["blocks"]
    assert [row.get("answers_unlike_none") for row in greedy["rows"]] == [None, 0, 0], "greedy, float32: not lossless"
    assert "answers_unlike_none" not in sampled["rows"][0]
    for contender in results["contenders"]:
        assert 2**27 < contender["peak_memory"][0]["resident"] < 2**34
        assert contender["environment"]["runner"] == "V1" and contender["environment"]["dtype"] == "float32"


def test_tables_and_plots(measured: tuple[Path, str]) -> None:
    output, shown = measured
    text = (output / "table.md").read_text(encoding="utf-8")
    assert text in shown
    for words in (
        "## Greedy (T=0)",
        "## Sampled, T=1",
        "| steered | ",
        "| steered over plain |",
        "| odd | 4 |",
    ):
        assert words in text
    for name in ("acceptance_length.png", "acceptance_rate.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob(".*"))


def test_resuming_with_nothing_left_and_with_other_settings(
    measured: tuple[Path, str], target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ENV | runner_env("v1")).items():  # the conditions it was measured under
        monkeypatch.setenv(name, value)
    output = shutil.copytree(measured[0], tmp_path / "out")
    before = json.loads((output / "results.json").read_text(encoding="utf-8"))
    settings = before["settings"]
    same = {key: settings[key] for key in ("k", "max_tokens", "batch", "max_model_len", "seed")}
    same |= {"target": str(target), "prompts": str(prompts)}
    drafters = (f"plain={PAIR / 'drafter'}", f"steered={PAIR / 'steered'}")
    config = BenchConfig(**same, drafters=drafters, output=str(output), engine=json.dumps(ENGINE), resume=True)
    again = evaluate.benchmark(config)
    assert again["summary"] == before["summary"] and next(c["name"] for c in again["contenders"]) == "none"
    for key, value in (("seed", 7), ("k", 4), ("temperature", (0.0,))):
        with pytest.raises(SteeringError, match=f"was measured with {key} "):
            evaluate.benchmark(dataclasses.replace(config, **{key: value}))


@pytest.mark.slow
def test_what_vllm_refuses_is_told(target: Path, prompts: Path, tmp_path: Path) -> None:
    done = command(target, prompts, tmp_path / "out", "--none", "--engine", '{"no_such_option": 1}')
    assert done.returncode == 1 and "vllm-steer: error: none: " in done.stderr and "no_such_option" in done.stderr


@pytest.mark.slow
def test_preempted_requests_are_refused(target: Path, prompts: Path, tmp_path: Path) -> None:
    """Too little KV cache for the batch."""
    engine = json.dumps(ENGINE | {"num_gpu_blocks_override": 20})
    words = ("--drafters", f"plain={PAIR / 'drafter'}", "--temperature", "0", "--max-tokens", "120")
    done = command(target, prompts, tmp_path / "out", *words, "--engine", engine)
    assert done.returncode == 1 and "plain: vLLM preempted" in done.stderr, done.stderr[-4000:]
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_v2_counts_the_same(measured: tuple[Path, str], target: Path, prompts: Path, tmp_path: Path) -> None:
    done = command(
        target,
        prompts,
        tmp_path / "out",
        "--drafters",
        f"steered={PAIR / 'steered'}",
        "--temperature",
        "0",
        runner="v2",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["contenders"][0]["environment"]["runner"] == "V2" and results["contenders"][0]["steered"]
    assert answers_of(tmp_path / "out", "steered") == answers_of(measured[0], "steered")


# --- a running server -----------------------------------------------------------------------------------------------

METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 24.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 1.3e+01
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 9.0
"""


@pytest.fixture
def metrics_page() -> Iterator[tuple[str, dict[str, str]]]:
    """A web server whose /metrics is what the test puts there."""
    page = {"text": METRICS}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(page["text"].encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", page
    server.shutdown()
    server.server_close()


def test_counters_of_a_server(metrics_page: tuple[str, dict[str, str]]) -> None:
    found = remote.counters(metrics_page[0])
    assert found == {"drafts": 12, "drafted": 24, "accepted": 13, "per_position": [9, 4]}


def test_servers_that_cannot_be_measured(
    metrics_page: tuple[str, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, page = metrics_page
    common = ["bench", "--prompts", str(heldout(tmp_path / "p.jsonl", 2)), "--output", str(tmp_path / "out"), "--url"]
    page["text"] = "# TYPE python_info gauge\npython_info 1.0\n"
    assert cli.main([*common, url]) == 1
    assert "the server does not speculate, or is not vLLM" in capsys.readouterr().err
    page["text"] = METRICS
    assert cli.main([*common, url]) == 1
    assert "does not say which models it has" in capsys.readouterr().err
    assert cli.main([*common, "http://127.0.0.1:9"]) == 1
    assert "cannot read http://127.0.0.1:9/metrics" in capsys.readouterr().err
    assert cli.main([*common, "localhost"]) == 1
    assert "cannot read localhost/metrics" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_running_server(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from server import serve

    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": DRAFTS}
    options = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager",
               "--gpu-memory-utilization", "0.3", "--served-model-name", "tiny")  # fmt: skip
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, timeout=240) as server:
        words = ["--prompts", str(prompts), "--output", str(tmp_path / "out"), "--url", server.url, "--batch", "4"]
        assert cli.main(["bench", *words, "--max-tokens", "32", "--temperature", "0"]) == 0
        counters = server.counters()
    row = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["summary"][0]["rows"][0]
    assert row["name"] == "tiny" and row["prompts"] == PROMPTS, "the endless prompt is refused by the server"
    assert row["blocks"] == counters["drafts"] and row["interval_95"] is None
    assert row["acceptance_length"] == 1 + counters["accepted"] / counters["drafts"]
    assert "vLLM's placeholder drafts" in capsys.readouterr().out
    assert "vLLM's placeholder drafts" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_results_of_0_1_0_are_read() -> None:
    """The rows of their summary have other keys; the numbers of their own table come out."""
    directory = ROOT / "benchmarks/results/tiny_v1"
    results = json.loads((directory / "results.json").read_text())
    assert "tokens_per_block" in results["summary"][0]["rows"][0]
    numbers = re.findall(r"\d+\.\d{3}", report.table(summary.with_new_names(results)))
    assert numbers and numbers == re.findall(r"\d+\.\d{3}", (directory / "table.md").read_text())
