"""Several workers under one target: tensor parallel, Ray's actors, data parallel; and a vLLM that nobody knows.

Each worker must steer with its own share and draft what one worker alone drafts. One process serves the tests on vLLM's
own worker processes, one those on Ray's; see workers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import make_block, spec
from engines import Runner, assert_steered
from pairs import DRAFTER, Size, make_pair, random_prompt
from samples import engine_config
from test_features_serve import LENGTHS, NEW, K, reference
from test_serve import OPTIONS, serve
from workers import several

from vllm_steer.drafters.steered import checkpoint
from vllm_steer.serving.kill_switch import KILL_SWITCH

Pair = tuple[Path, Path, Path]
PROMPTS = [random_prompt(n, seed=n) for n in (3, 17, 100)]  # the last is longer than max_num_batched_tokens=64
FEW = {"num_gpu_blocks_override": 64}  # a KV cache as large as the machine allows costs seconds to fill
RUNNER, FRONT_END = "vllm.v1.worker.gpu_model_runner", "vllm.config.vllm"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("devices"), "llama")


@pytest.fixture(scope="module")
def adapted(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, dict[str, Any]]:
    """A pair with a rank-factored steering, and the engine options that attach it to its plain drafter."""
    made = make_pair(tmp_path_factory.mktemp("adapted"), "qwen2", rank=8)
    path = tmp_path_factory.mktemp("adapter")
    checkpoint.save(path / "adapter", checkpoint.load(made[2]))
    return made, {"additional_config": {"vllm_steer": {"adapter": str(path / "adapter")}}}


@pytest.fixture(scope="module")
def tensor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = several("tensor", tmp_path_factory.mktemp("tensor"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def tensor_v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = several("tensor", tmp_path_factory.mktemp("tensor_v2"), "v2")
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = several("ray", tmp_path_factory.mktemp("ray"))
    yield runner
    runner.close()


CALL = {"prompts": PROMPTS, "sampling": {"max_tokens": 12}}


def run(runner: Runner, target: Path, drafter: Path | None, call: dict[str, Any] = CALL, **keys: Any) -> dict[str, Any]:
    """One engine that answers PROMPTS; its call's result, and "log"."""
    spec = drafter and {"model": str(drafter), "num_speculative_tokens": K}
    out = runner.run(target, spec, [call], **FEW, **keys)
    assert out["error"] is None, f"{out['error']}\n{out['log'][-6000:]}"
    return out["calls"][0] | {"log": out["log"]}


def refusal(runner: Runner, target: Path, drafter: Path, **keys: Any) -> str:
    """The error with which an engine does not start."""
    out = runner.run(target, {"model": str(drafter), "num_speculative_tokens": K}, [], **FEW, **keys)
    assert out["error"], "it started"
    return out["error"]


def proofs(log: str) -> list[str]:
    """Ids of the processes that said that they steer."""
    return re.findall(r"pid=(\d+)\) INFO [^\n]*steering is on: ", log)


def assert_workers_agree(
    result: dict[str, Any], single: dict[str, Any], plain: dict[str, Any], logs: bool = True
) -> None:
    """`result` of several workers: each steers with its share, all draft what the one worker of `single` drafts."""
    workers, (one,) = result["workers"], single["workers"]
    assert [worker["rank"] for worker in workers] == list(range(len(workers))) and len(workers) > 1
    assert len({worker["pid"] for worker in workers}) == len(workers)
    assert sorted(proofs(result["log"])) == sorted(str(worker["pid"]) for worker in workers if logs)
    for worker in workers:
        assert_steered(worker, {K})
        assert worker["blocks"] == one["blocks"] != plain["workers"][0]["blocks"]
    shares, whole = [np.array(worker["deltas"]) for worker in workers], np.array(one["deltas"])
    assert all(share.shape == (whole.shape[0], whole.shape[1] // len(workers)) for share in shares)
    np.testing.assert_allclose(np.concatenate(shares, -1), whole, atol=1e-4)
    assert np.abs(whole).min(0).max() > 0.1, "deltas near zero would agree in any order"
    assert result["tokens"] == single["tokens"] == plain["tokens"]


@pytest.mark.parametrize("on", ["tensor", pytest.param("tensor_v2", marks=pytest.mark.slow)], ids=["v1", "v2"])
def test_trees_tensor_parallel(pair: Pair, on: str, request: pytest.FixtureRequest) -> None:
    """Greedy and sampled: every rank chooses the same rows, and copies its own share of their pages."""
    target, _, steered = pair
    runner = request.getfixturevalue(on)
    sampling = [{"max_tokens": 12}, {"max_tokens": 12, "temperature": 1.0, "seed": 4}, {"max_tokens": 12}]
    keys = {"additional_config": {"vllm_steer": {"tree": [2] + [1] * (K - 1)}}, "max_num_batched_tokens": 256}
    call = {"prompts": PROMPTS, "sampling": sampling}
    single = run(runner, target, steered, call, **keys)
    both = run(runner, target, steered, call, tensor_parallel_size=2, **keys)
    assert both["tokens"] == single["tokens"]
    (one,), workers = single["workers"], both["workers"]
    assert len(workers) == 2 and all(worker["blocks"] == one["blocks"] for worker in workers)
    assert all(len(drafts) == 2 * (K + 1) - 1 for blocks in one["blocks"] for _, drafts in blocks)


@pytest.mark.parametrize("on", ["tensor", pytest.param("tensor_v2", marks=pytest.mark.slow)], ids=["v1", "v2"])
def test_a_block_drafter_tensor_parallel(tmp_path: Path, on: str, request: pytest.FixtureRequest) -> None:
    """The approximator is whole on every rank: chains and rows are those of one worker."""
    target = make_pair(tmp_path / "pair", "qwen3").target
    asked = spec(make_block(tmp_path / "treeflash", target, "treeflash", k=K), "treeflash", K)
    runner = request.getfixturevalue(on)
    for own in ({}, {"tree_rows": 3}):
        keys = {"additional_config": {"vllm_steer": own}, "max_num_batched_tokens": 256}
        outs = [runner.run(target, asked, [CALL], **FEW, **keys, tensor_parallel_size=size) for size in (1, 2)]
        assert [out["error"] for out in outs] == [None, None]
        one, both = (out["calls"][0] for out in outs)
        assert both["tokens"] == one["tokens"]
        assert len(both["workers"]) == 2
        assert all(worker["blocks"] == one["workers"][0]["blocks"] for worker in both["workers"])


@pytest.mark.parametrize("on", ["tensor", pytest.param("tensor_v2", marks=pytest.mark.slow)], ids=["v1", "v2"])
def test_tensor_parallel(pair: Pair, on: str, request: pytest.FixtureRequest) -> None:
    target, plain, steered = pair
    runner = request.getfixturevalue(on)
    result = run(runner, target, steered, tensor_parallel_size=2)
    assert_workers_agree(result, run(runner, target, steered), run(runner, target, plain))
    assert result["tokens"] == run(runner, target, None)["tokens"]


@pytest.mark.slow
def test_the_switch_reaches_every_worker(pair: Pair, tensor: Runner) -> None:
    target, _, steered = pair
    keys = {"tensor_parallel_size": 2, "worker_extension_cls": "vllm_steer.serving.scale.Switch"}
    result = run(tensor, target, steered, CALL | {"steer": {"after": 4, "scale": 0}}, **keys)
    assert sorted(result["switched"], key=lambda answer: answer["rank"]) == [{"rank": r, "scale": 0.0} for r in (0, 1)]
    one, other = result["workers"]
    assert one["blocks"] == other["blocks"]
    for worker in (one, other):
        steered_rounds = [sum(r["rows"]) > 0 for r in worker["rounds"]]
        assert steered_rounds == sorted(steered_rounds, reverse=True) and set(steered_rounds) == {True, False}
    assert result["tokens"] == run(tensor, target, None)["tokens"]


@pytest.mark.slow
def test_tensor_parallel_of_a_factored_adapter(adapted: tuple[Pair, dict[str, Any]], tensor: Runner) -> None:
    (target, plain, _), adapter = adapted
    result = run(tensor, target, plain, tensor_parallel_size=2, **adapter)
    single, stock = run(tensor, target, plain, **adapter), run(tensor, target, plain)
    assert_workers_agree(result, single, stock)
    off = run(tensor, target, plain, tensor_parallel_size=2, env={KILL_SWITCH: "1"}, **adapter)
    assert [worker["deltas"] for worker in off["workers"]] == [None, None] and not proofs(off["log"])
    assert [worker["blocks"] for worker in off["workers"]] == [stock["workers"][0]["blocks"]] * 2


def test_shapes_that_several_workers_cannot_share(pair: Pair, tmp_path: Path) -> None:
    """vLLM says these in a worker's log only, or not at all (a bare AssertionError for the width)."""
    target, plain, steered = pair
    with pytest.raises(ValueError, match="draft_tensor_parallel_size is 1, tensor_parallel_size 2: .* or give 2"):
        engine_config(target, steered, spec={"draft_tensor_parallel_size": 1}, tensor_parallel_size=2)
    odd = make_pair(tmp_path, drafter=Size(DRAFTER.hidden, DRAFTER.layers, 97))
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2, which does not .* \(intermediate_size\) 97: "):
        engine_config(odd[0], odd[2], tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"attention heads \(2\) must be divisible by tensor parallel size \(4\)"):
        engine_config(target, steered, tensor_parallel_size=4)
    for fine in (odd[1], plain):
        engine_config(target, fine, tensor_parallel_size=2)  # not ours to refuse


# --- Ray ------------------------------------------------------------------------------------------------------------


def test_ray_executors_refuse_a_cpu_without_our_help() -> None:
    """When this fails, vLLM has a Ray resource for CPUs: `pretend_cpus_are_rays_gpus` can go."""
    from vllm.platforms.cpu import CpuPlatform

    assert CpuPlatform.ray_device_key == ""


@pytest.mark.parametrize(
    "executor", [pytest.param("1", id="v2"), pytest.param("0", id="compiled_graph", marks=pytest.mark.slow)]
)
def test_ray(pair: Pair, tensor: Runner, on_ray: Runner, executor: str) -> None:
    """Both of vLLM's executors on Ray: every actor steers, and obeys a kill switch set for the front end alone."""
    target, plain, steered = pair
    keys = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    env = {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": executor}
    stock, result = run(tensor, target, plain), run(on_ray, target, steered, env=env, **keys)
    assert all(worker["ray_actor"] for worker in result["workers"])
    # The workers of the older executor set up no logging: nothing of INFO is seen of them, neither vLLM's nor ours.
    assert_workers_agree(result, run(tensor, target, steered), stock, logs=executor == "1")
    off = run(on_ray, target, steered, env=env | {KILL_SWITCH: "1"}, **keys)
    assert [worker["deltas"] for worker in off["workers"]] == [None, None] and not proofs(off["log"])
    assert [worker["blocks"] for worker in off["workers"]] == [stock["workers"][0]["blocks"]] * 2


@pytest.mark.slow
def test_a_killed_ray_actor(pair: Pair, on_ray: Runner) -> None:
    """The engine ends with an error, it does not hang; the next one steers as before."""
    target, _, steered = pair
    keys = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    spec = {"model": str(steered), "num_speculative_tokens": K}
    env = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "20"}  # vLLM waits so long for a worker, by default 300
    out = on_ray.run(target, spec, [CALL | {"kill": {"after": 3, "rank": 1}}], env=env, **FEW, **keys)
    assert out["error"], "it answered without a worker"  # in words that depend on where vLLM was when it noticed
    assert run(on_ray, target, steered, **keys)["tokens"] == run(on_ray, target, None)["tokens"]


# --- data parallel --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_parallel(pair: Pair, tmp_path: Path) -> None:
    """Two engines behind one server: vLLM sends each a part of the requests, and both steer."""
    from concurrent.futures import ThreadPoolExecutor

    from openai import OpenAI

    spec = {"model": str(pair.steered), "num_speculative_tokens": K}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    options = (*OPTIONS, "--enforce-eager", "--data-parallel-size", "2", "--num-gpu-blocks-override", "64")
    with serve(pair.target, tmp_path / "log", *options, speculative=spec, env=env, timeout=400) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300)

        def ask(length: int) -> list[int]:
            extra = {"ignore_eos": True, "return_token_ids": True}
            keys = {"model": str(pair.target), "max_tokens": NEW, "temperature": 0, "extra_body": extra}
            return client.completions.create(prompt=random_prompt(length, seed=length), **keys).choices[0].token_ids

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, LENGTHS * 2))
        samples = server.metrics()
        accepted, drafts = (
            [
                sum(
                    s.value
                    for s in samples
                    if s.name == f"vllm:spec_decode_num_{name}_total" and s.labels["engine"] == engine
                )
                for engine in ("0", "1")
            ]
            for name in ("accepted_tokens", "drafts")
        )
        log = (tmp_path / "log").read_text(errors="replace")
    assert len(set(proofs(log))) == len(proofs(log)) == 2
    on, off = reference(pair, steered=True), reference(pair, steered=False)
    assert answers == [g.tokens for g in on] * 2
    assert min(drafts) > 0 and min(accepted) > 0, "all requests went to one engine"
    expected, unsteered = (2 * sum(len(g.blocks) for g in generations) for generations in (on, off))
    assert abs(expected - unsteered) > 2 * len(LENGTHS), "the count of blocks must tell steered from unsteered"
    assert sum(drafts) == pytest.approx(expected, abs=2 * len(LENGTHS)), "the last block of an answer may not count"


# --- a vLLM that nobody knows ---------------------------------------------------------------------------------------

REMEDY = f"install .*, or set {KILL_SWITCH}=1 to serve the drafter unsteered"
UNKNOWN = {
    "newer": ({"STEER_TEST_VERSION": "0.34.0"}, "this is vLLM 0.34.0, vllm-steer works with 0.32 and 0.33: "),
    "runner_changed": (
        {"STEER_TEST_BROKEN": RUNNER},
        r"\(0\.3[23].*\) has no place for steering: .*DraftModelProposer",
    ),
    "front_end_changed": (
        {"STEER_TEST_BROKEN": FRONT_END},
        "steered.* was not called to check it in the front end: this",
    ),
    "both_changed": ({"STEER_TEST_BROKEN": f"{RUNNER},{FRONT_END}", "STEER_TEST_VERSION": "0.99"}, None),
}


@pytest.mark.parametrize(
    "which",
    [
        "newer",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("front_end_changed", "runner_changed", "both_changed")),
    ],
)
def test_an_unknown_vllm(pair: Pair, tensor: Runner, tmp_path: Path, which: str) -> None:
    """Engines without steering work as ever, one with is refused by a sentence; the kill switch serves it plain."""
    target, plain, steered = pair
    env, sentence = UNKNOWN[which]
    known, alone = run(tensor, target, plain), run(tensor, target, None)
    assert run(tensor, target, None, env=env)["tokens"] == alone["tokens"]
    off = run(tensor, target, steered, env=env | {KILL_SWITCH: "1"})
    for result in (run(tensor, target, plain, env=env), off):
        assert result["workers"][0]["blocks"] == known["workers"][0]["blocks"] and not proofs(result["log"])
        assert result["tokens"] == alone["tokens"]
    if sentence is None:  # nothing of ours is called: all that is left is to warn
        lost = run(tensor, target, steered, env=env)
        assert re.search("cannot be told to refuse a steered drafter.*works with vLLM 0.32", lost["log"])
        assert lost["workers"][0]["blocks"] == known["workers"][0]["blocks"]
        return
    checkpoint.save(tmp_path / "adapter", checkpoint.load(steered))
    adapter = {"vllm_steer": {"adapter": str(tmp_path / "adapter")}}
    for error in (
        refusal(tensor, target, steered, env=env),
        refusal(tensor, target, plain, env=env, additional_config=adapter),
    ):
        assert re.search(f"{sentence}.*{REMEDY}", error, re.DOTALL), error
