"""Block drafters in vLLM: every draft is the reference's, the output is the target's, on both runners.

The reference is `vllm_steer.decoding.block`: Hugging Face, a real KV cache, the realised chain.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import DFLASH, TARGET, TREEFLASH, make_block, make_ngram, spec
from pairs import make_pair, random_prompt
from test_lossless import NEW as SAMPLED
from test_lossless import P_VALUE, VOCAB, p_value, uniforms
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.decoding.block import Refinement, _Cached, _Reader, draft_rows, generate
from vllm_steer.drafters.block import checkpoint, ngram
from vllm_steer.serving.block_seams import has_medusa

NEW = 32
RUNNERS = ("v1", "v2")
LENGTHS = (40, 64, 23, 100)  # of prompts, in one batch


def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (TARGET.parent / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines[: len(LENGTHS)]]
    return [ids[:length] for ids, length in zip(found, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def medusa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_block(tmp_path_factory.mktemp("medusa"), TARGET, "medusa")
    shutil.copytree(DFLASH / "ngram", directory / "ngram")
    return directory


def reference(directory: Path, alpha: float | None) -> list[Any]:
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    refinement = None if alpha is None else Refinement(ngram.load(DFLASH), alpha)
    drafter = checkpoint.load(directory)
    return [generate(target, drafter, p, refinement=refinement, max_new_tokens=NEW) for p in prompts()]


def same_blocks(call: dict[str, Any], wanted: list[Any]) -> None:
    """Assert that text and drafts are the reference's, block for block."""
    assert call["tokens"] == [generation.tokens for generation in wanted]
    compared = 0
    for found, generation in zip(call["blocks"], wanted, strict=True):
        drafted = dict(found)
        for block in generation.blocks[:-1]:  # vLLM may not draft once a request is done
            assert drafted[block.position] == list(block.drafts), block.position
            compared += 1
    assert compared > len(wanted) * 8


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    ("directory", "options", "alpha"),
    [
        pytest.param(TREEFLASH, {}, None, id="approximator"),
        pytest.param(DFLASH, {}, 0.4, id="bigram"),
        pytest.param(DFLASH, {"alpha": 1.5}, 1.5, id="another weight"),
        pytest.param(DFLASH, {"refine": False}, None, id="blind"),
    ],
)
def test_drafts_are_those_of_the_reference(
    directory: Path, options: dict[str, Any], alpha: float | None, runner: str, runners: Any
) -> None:
    assert alpha in (None, 1.5, ngram.load(DFLASH).config.alpha)
    own = {"additional_config": {"vllm_steer": options}} if options else {}
    call = runners(runner).generate(TARGET, spec(directory, "dflash"), prompts(), max_tokens=NEW, **own)
    same_blocks(call, reference(directory, alpha))


@pytest.mark.skipif(not has_medusa(), reason="this vLLM has no Medusa heads")
def test_medusa_heads_with_a_bigram(medusa: Path, runners: Any) -> None:
    call = runners("v1").generate(TARGET, spec(medusa, "medusa"), prompts(), max_tokens=NEW)
    same_blocks(call, reference(medusa, ngram.load(DFLASH).config.alpha))


def test_what_repairs_the_drafts_changes_them() -> None:
    """Or the tests above would pass without it."""
    blind, table = reference(DFLASH, None), reference(DFLASH, 0.4)
    assert [g.blocks for g in blind] != [g.blocks for g in table]
    drafter = checkpoint.load(TREEFLASH)
    seen = reference(TREEFLASH, None)
    torch.nn.init.zeros_(drafter.ar_approximation.d.weight)
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    assert seen[0].blocks != generate(target, drafter, prompts()[0], max_new_tokens=NEW).blocks


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("directory", [TREEFLASH, DFLASH], ids=["approximator", "bigram"])
def test_rows_of_a_tree_are_those_of_the_reference(directory: Path, runner: str, runners: Any) -> None:
    rows, k = 4, 5
    own = {"additional_config": {"vllm_steer": {"tree_rows": rows}}}
    call = runners(runner).generate(TARGET, spec(directory, "dflash"), prompts(), max_tokens=NEW, **own)
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    drafter = checkpoint.load(directory)
    refinement = None if directory == TREEFLASH else Refinement(ngram.load(DFLASH), 0.4)
    for i, prompt in enumerate(prompts()):
        found = generate(target, drafter, prompt, refinement=refinement, max_new_tokens=NEW, rows=rows)
        assert call["tokens"][i] == found.tokens
        reader = _Reader(target, drafter, refinement)
        text = [*prompt, *found.tokens]
        reader.read(_Cached(target), text, 0)
        drafted = dict(call["blocks"][i])
        for block in found.blocks[:-1]:
            wanted = draft_rows(reader, text[: block.position + 1], k, rows)
            flat = [token for row in wanted for token in (text[block.position], *row)][1:]
            assert drafted[block.position] == flat
            assert list(block.drafts) in wanted


@pytest.mark.parametrize("runner", RUNNERS)
def test_more_is_accepted(runner: str, runners: Any) -> None:
    accepted = {}
    for name, directory, options in (
        ("blind", DFLASH, {"refine": False}),
        ("bigram", DFLASH, {}),
        ("approximator", TREEFLASH, {}),
        ("four rows", TREEFLASH, {"tree_rows": 4}),
    ):  # fmt: skip
        call = runners(runner).generate(
            TARGET, spec(directory, "dflash"), prompts(), max_tokens=NEW, additional_config={"vllm_steer": options}
        )
        accepted[name] = call["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    assert accepted["blind"] < accepted["bigram"] < accepted["approximator"] < accepted["four rows"], accepted


@pytest.mark.parametrize("runner", RUNNERS)
def test_chunked_prompts_cached_prefixes_and_a_small_kv_cache(runner: str, runners: Any) -> None:
    long = [p * 2 for p in prompts()]
    options = {"enable_prefix_caching": True, "num_gpu_blocks_override": 24, "max_num_batched_tokens": 48}
    alone = runners(runner).generate(TARGET, None, long, max_tokens=NEW)
    calls = [{"prompts": long, "sampling": {"max_tokens": NEW}}] * 2
    for own in ({}, {"tree_rows": 3}):
        found = runners(runner).run(
            TARGET, spec(TREEFLASH, "treeflash"), calls, **options, additional_config={"vllm_steer": own}
        )
        assert found["error"] is None, found["error"]
        assert [call["tokens"] for call in found["calls"]] == [alone["tokens"]] * 2
        assert any(found["calls"][1]["cached"])


@pytest.mark.parametrize("runner", RUNNERS)
def test_switched_off_and_on_while_it_runs(runner: str, runners: Any) -> None:
    calls = [
        {"prompts": prompts(), "sampling": {"max_tokens": NEW}},
        {"prompts": prompts(), "sampling": {"max_tokens": NEW}, "refine": {"after": 0, "on": False}},
        {"prompts": prompts(), "sampling": {"max_tokens": NEW}, "refine": {"after": 0, "on": True}},
    ]
    found = runners(runner).run(
        TARGET, spec(DFLASH, "dflash"), calls, worker_extension_cls="vllm_steer.serving.scale.Switch"
    )
    assert found["error"] is None, found["error"]
    on, off, again = found["calls"]
    assert off["switched"] == [{"rank": 0, "on": False}]
    assert on["blocks"] == again["blocks"] != off["blocks"]
    same_blocks(off, reference(DFLASH, None))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of a small vocabulary, and random drafters for it."""
    folder = tmp_path_factory.mktemp("small")
    target = make_pair(folder / "pair", "qwen3", vocab_size=VOCAB, distance=0.2).target
    found = {"target": target} | {kind: make_block(folder / kind, target, kind) for kind in ("dflash", "treeflash")}
    make_ngram(found["dflash"], VOCAB)
    return found


@pytest.mark.parametrize(("runner", "sequences"), [("v1", 96), ("v2", 24)])
@pytest.mark.parametrize("kind", ["dflash", "treeflash"])
def test_sampled_output_is_the_targets(
    small: dict[str, Path], kind: str, runner: str, sequences: int, runners: Any
) -> None:
    asked = [random_prompt(6, seed=i, vocab_size=VOCAB) for i in range(sequences)]
    trees = ((0.7, 3), (1.3, 3)) if runner == "v1" else ()  # of V2: the test below
    for temperature, rows in ((0.7, None), (1.3, None), *trees):
        own = {} if rows is None else {"additional_config": {"vllm_steer": {"tree_rows": rows}}}
        call = runners(runner).generate(
            small["target"], spec(small[kind], kind, sampled=True), asked,
            max_tokens=SAMPLED, temperature=temperature, **own,
        )  # fmt: skip
        assert call["metrics"]["vllm:spec_decode_num_accepted_tokens"] > sequences
        assert p_value(uniforms(small["target"], asked, call["tokens"], temperature)) > P_VALUE, temperature


def test_seeded_rows_say_what_the_target_alone_says(small: dict[str, Path], runners: Any) -> None:
    """V2: rows take the noise of vLLM's own sampler, token for token; V1 has noise of its own (docs/trees.md)."""
    asked = [random_prompt(6, seed=i, vocab_size=VOCAB) for i in range(3)]
    sampling = [{"temperature": 0.7 + 0.3 * i, "seed": i, "max_tokens": 12} for i in range(3)]
    call = [{"prompts": asked, "sampling": sampling}]
    alone = runners("v2").run(small["target"], None, call)
    for kind in ("dflash", "treeflash"):
        rows = {"additional_config": {"vllm_steer": {"tree_rows": 3}}}
        found = runners("v2").run(small["target"], spec(small[kind], kind, sampled=True), call, **rows)
        assert found["error"] is None, found["error"]
        assert found["calls"][0]["tokens"] == alone["calls"][0]["tokens"]
        assert found["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 3


def test_as_a_dspark_drafter_in_stock_vllm(tmp_path: Path, runners: Any) -> None:
    """The same bigram as DSpark's Markov head drafts the same tokens, without the plugin's help."""
    from vllm_steer.drafters.block import dspark

    where = dspark.export(DFLASH, ngram.load(DFLASH), tmp_path / "dspark")
    asked = {"method": "dspark", "model": str(where), "num_speculative_tokens": 5}
    call = runners("v2").generate(TARGET, asked, prompts(), max_tokens=NEW)
    same_blocks(call, reference(DFLASH, ngram.load(DFLASH).config.alpha))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tree": [2, 1, 1, 1, 1]}, "a tree with children at every depth"),
        ({"tree_rows": 0}, "tree_rows is 0, allowed is a whole number from 1 up"),
        ({"tree_rows": 30}, "179 draft tokens for vLLM, which verifies 128 at most"),
        ({"adapter": str(TARGET.parent / "adapter")}, "a steering adapter"),
        ({"alpha": -1}, "alpha is -1, allowed is a number from 0"),
        ({"ngram": "nowhere"}, "nowhere has no ngram/ folder"),
        ({"refine": 1}, "refine is 1, allowed are true and false"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str, runners: Any) -> None:
    call = [{"prompts": [[1]], "sampling": {}}]
    found = runners("v1").run(TARGET, spec(DFLASH, "dflash"), call, additional_config={"vllm_steer": options})
    assert words in found["error"]


def test_a_bigram_for_an_approximator_is_refused(runners: Any) -> None:
    call, more = [{"prompts": [[1]], "sampling": {}}], {"additional_config": {"vllm_steer": {"ngram": str(DFLASH)}}}
    found = runners("v1").run(TARGET, spec(TREEFLASH, "treeflash"), call, **more)
    assert "knows the token before by its approximator" in found["error"]


def test_a_drafter_of_another_target_is_refused(small: dict[str, Path], runners: Any) -> None:
    found = runners("v1").run(small["target"], spec(TREEFLASH, "treeflash"), [{"prompts": [[1]], "sampling": {}}])
    assert "hidden_size is 256, the target's is 128: it was made for another target" in found["error"]


def test_the_kill_switch_leaves_a_blind_drafter(runners: Any) -> None:
    call = [{"prompts": prompts(), "sampling": {"max_tokens": NEW}}]
    found = runners("v1").run(TARGET, spec(DFLASH, "dflash"), call, env={"STEER_DISABLE": "1"})
    assert found["error"] is None
    same_blocks(found["calls"][0], reference(DFLASH, None))
