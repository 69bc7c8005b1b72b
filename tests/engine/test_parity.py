"""V1 and V2 draft the tokens of the reference loop, block for block, and the output is the target's own.

One engine process per runner serves the whole session; see engines.py.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_own_guides, assert_steered
from pairs import make_pair, random_prompt
from repository import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.decoding.chain import Generation, generate
from vllm_steer.drafters.steered import checkpoint

K = 4
NEW = 48
LENGTHS = (3, 17, 100, 5, 64, 33)  # ragged; 100 is longer than the chunk of max_num_batched_tokens=64
PAIRS = {"llama": None, "qwen2": 8, "qwen3": None, "granite": 8}  # family: rank of the steering
TRAINED = ROOT / "examples" / "tiny_pair"


@pytest.fixture(scope="session", params=[*PAIRS, "trained"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    if request.param == "trained":
        return TRAINED / "target", TRAINED / "drafter", TRAINED / "steered"
    return make_pair(tmp_path_factory.mktemp(request.param), request.param, rank=PAIRS[request.param])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("llama-alone"), "llama")


@pytest.fixture(scope="session", params=["llama", pytest.param("trained", marks=pytest.mark.slow)])
def frozen(
    request: pytest.FixtureRequest, llama: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A pair whose steered drafter has the plain one's weights: without its steering it must be the plain one."""
    if request.param == "llama":
        return llama
    merged = tmp_path_factory.mktemp("merged") / "steered"
    checkpoint.merge_adapter(TRAINED / "adapter", TRAINED / "drafter", merged)
    return TRAINED / "target", TRAINED / "drafter", merged


@functools.cache
def prompts(target: Path) -> list[list[int]]:
    """Prompts of LENGTHS: held-out text for the trained pair, else random tokens."""
    if target.parent != TRAINED:
        return [random_prompt(n, seed=n) for n in LENGTHS]
    tokenizer = AutoTokenizer.from_pretrained(target)
    lines = (TRAINED / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer.encode(json.loads(line)["prompt"]) for line in lines]
    long = [row for row in ids if len(row) >= max(LENGTHS)][: len(LENGTHS)]
    return [row[:n] for row, n in zip(long, LENGTHS, strict=True)]


def spec(model: Path, k: int = K, **keys: Any) -> dict[str, Any]:
    return {"model": str(model), "num_speculative_tokens": k, **keys}


@functools.cache
def reference(target: Path, drafter: Path, steered: bool = True, k: int = K, new: int = NEW) -> list[Generation]:
    """What the Hugging Face loop generates and drafts for every prompt."""
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
    big, small = load(target), load(drafter)
    steering = checkpoint.load(drafter) if steered else None
    return [generate(big, small, p, steering, k=k, max_new_tokens=new) for p in prompts(target)]


def drafted(result: dict[str, Any], i: int, upto: int) -> list[tuple[int, list[int]]]:
    """Blocks vLLM drafted for prompt i: not those of unfinished prompts, which it throws away."""
    return [(n, d) for n, d in result["blocks"][i] if LENGTHS[i] <= n <= upto]


def assert_same_drafts(result: dict[str, Any], expected: list[Generation]) -> None:
    for i, generation in enumerate(expected):
        assert result["tokens"][i] == generation.tokens
        want = [(b.position, list(b.drafts)) for b in generation.blocks]
        assert drafted(result, i, want[-1][0]) == want, f"prompt of {LENGTHS[i]} tokens"


def blocks_of(result: dict[str, Any]) -> list[list[tuple[int, list[int]]]]:
    return [drafted(result, i, LENGTHS[i] + NEW - 2) for i in range(len(LENGTHS))]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_drafts_are_those_of_the_reference(pair: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    target, _, steered = pair
    expected = reference(target, steered)
    rejections = {K - block.accepted for g in expected for block in g.blocks}
    assert rejections == set(range(K + 1)), "the pair must show every number of rejections, or this proves little"
    result = runners(runner).generate(target, spec(steered), prompts(target), max_tokens=NEW)
    assert_same_drafts(result, expected)
    assert "steering is on" in result["log"]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_steering_off_is_stock(frozen: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    target, plain, steered = frozen
    run = lambda model, **keys: runners(runner).generate(target, spec(model), prompts(target), max_tokens=NEW, **keys)  # noqa: E731
    stock, on = run(plain), run(steered)
    assert blocks_of(on) != blocks_of(stock), "this steering must change drafts, or the rest proves nothing"
    assert blocks_of(run(steered, env={"STEER_DISABLE": "1"})) == blocks_of(stock)
    off = {"vllm_steer": {"scale": 0}}
    assert blocks_of(run(steered, additional_config=off)) == blocks_of(stock)
    assert stock["tokens"] == on["tokens"]


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_zero_projection_is_stock_and_adapters_attach(
    frozen: tuple[Path, Path, Path], runner: str, runners: Any, tmp_path: Path
) -> None:
    target, plain, steered = frozen
    steering = checkpoint.load(steered)
    checkpoint.save(tmp_path / "adapter", steering)
    steering.output.weight.zero_()
    checkpoint.save(tmp_path / "zero", steering)

    def run(name: str | None = None) -> dict[str, Any]:
        options = {"vllm_steer": {"adapter": str(tmp_path / name)}} if name else {}
        return runners(runner).generate(target, spec(plain), prompts(target), max_tokens=NEW, additional_config=options)

    full = runners(runner).generate(target, spec(steered), prompts(target), max_tokens=NEW)
    assert blocks_of(run("adapter")) == blocks_of(full)
    assert blocks_of(run("zero")) == blocks_of(run())


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("k", [1, 7])
def test_other_draft_lengths(llama: tuple[Path, Path, Path], runner: str, k: int, runners: Any) -> None:
    target, _, steered = llama
    result = runners(runner).generate(target, spec(steered, k), prompts(target), max_tokens=NEW)
    assert_same_drafts(result, reference(target, steered, k=k))


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_preempted_requests_keep_their_own_guides(llama: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    """A KV cache too small for all: requests are thrown out and recomputed, with tokens and guides of their own."""
    target, _, steered = llama
    small = {"num_gpu_blocks_override": 12, "max_model_len": 192}
    result = runners(runner).generate(target, spec(steered), prompts(target), max_tokens=NEW, **small)
    assert result["metrics"]["vllm:num_preemptions"] > 0, "nothing was preempted: this would prove nothing"
    assert result["tokens"] == [g.tokens for g in reference(target, steered)]
    assert_steered(result, {K})
    assert_own_guides(result, target, steered, prompts(target))


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_warm_prefix_cache_changes_no_output(llama: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    target, _, steered = llama
    calls = [{"prompts": prompts(target), "sampling": {"max_tokens": 16}}] * 2
    out = runners(runner).run(target, spec(steered), calls, enable_prefix_caching=True)
    assert out["error"] is None, out["log"][-4000:]
    assert out["metrics"]["vllm:prefix_cache_hits"] > 0
    expected = [g.tokens[:16] for g in reference(target, steered)]
    assert [call["tokens"] for call in out["calls"]] == [expected, expected]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_sequences_may_fill_the_context(llama: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    target, _, steered = llama
    result = runners(runner).generate(target, spec(steered), prompts(target), max_tokens=NEW, max_model_len=112)
    expected = [g.tokens for g in reference(target, steered)]
    for length, tokens, want in zip(LENGTHS, result["tokens"], expected, strict=True):
        assert tokens == want[: 112 - length], f"prompt of {length} tokens"
    assert_steered(result, {K})
    assert_own_guides(result, target, steered, prompts(target))


@pytest.mark.parametrize(
    ("runner", "backend"), [("v1", "inductor"), pytest.param("v2", "eager", marks=pytest.mark.slow)]
)
def test_compiled_drafts_are_the_same(
    llama: tuple[Path, Path, Path], runner: str, backend: str, runners: Any, tmp_path: Path
) -> None:
    """With torch.compile, started from the cache that an unsteered run of the same models left."""
    target, plain, steered = llama
    keys = {"enforce_eager": False, "compilation_config": {"backend": backend}, "max_tokens": NEW}
    env = {"VLLM_CACHE_ROOT": str(tmp_path)}
    adapter = tmp_path / "adapter"
    checkpoint.save(adapter, checkpoint.load(steered))
    stock = runners(runner).generate(target, spec(plain), prompts(target), env=env, **keys)
    assert "saved AOT compiled function" in stock["log"], "nothing was cached: this would prove nothing"
    result = runners(runner).generate(
        target,
        spec(plain),
        prompts(target),
        env=env,
        additional_config={"vllm_steer": {"adapter": str(adapter)}},
        **keys,
    )
    assert_same_drafts(result, reference(target, steered))
    assert_same_drafts(stock, reference(target, plain, steered=False))
