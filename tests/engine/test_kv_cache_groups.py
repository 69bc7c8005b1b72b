"""Targets and drafters whose layers lie in several KV cache groups: sliding windows, full attention, both.

The output is the target's own, and the drafts are those of the Hugging Face loop, block for block, steered and plain.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_steered
from pairs import (
    DRAFTER,
    HEAD_DIM,
    VOCAB,
    Size,
    change_config,
    make_pair,
    random_prompt,
    random_steering,
    save_tokenizer,
    tiny_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, MinistralConfig, MinistralForCausalLM

from vllm_steer.decoding.chain import Generation, generate
from vllm_steer.drafters.steered import checkpoint

S, F = "sliding_attention", "full_attention"
K, NEW = 4, 24
LENGTHS = (5, 40, 75, 130)  # shorter and longer than the windows, the blocks of 32 and the chunks of 64
# Name: the target's layers and window, the drafter's, the drafter's KV heads. The target has 2: with as many the
# drafter shares groups with it or is split over several, with 1 its pages are of another size and its blocks of 64.
LAYOUTS: dict[str, tuple[list[str], int | None, list[str], int | None, int]] = {
    "alternating, full": ([S, F] * 3, 32, [F, F], None, 1),
    "alternating, full, shared and split": ([S, F] * 3, 32, [F, F], None, 2),
    "five to one, full": ([S] * 5 + [F, S], 16, [F, F], None, 2),
    "five to one, full, split": ([S] * 5 + [F, S], 16, [F, F], None, 1),
    "full first": ([F, S] * 3, 48, [F, F], None, 1),
    "window beyond the text": ([S, F] * 3, 256, [F, F], None, 1),
    "all sliding, full": ([S] * 6, 24, [F, F], None, 1),
    "alternating, sliding": ([S, F] * 3, 32, [S, S], 32, 1),
    "alternating, sliding, shared and split": ([S, F] * 3, 32, [S, S], 32, 2),
    "three kinds": ([S, F] * 3, 32, [S, S], 16, 2),
    "alternating, alternating, shared": ([S, F] * 3, 32, [S, F], 32, 2),
    "four kinds": ([S, F] * 3, 32, [S, F], 16, 1),
    "full, sliding": ([F] * 6, None, [S, S], 16, 1),
    "full, alternating": ([F] * 6, None, [S, F], 16, 1),
    "full, full": ([F] * 6, None, [F, F], None, 1),
}
STEERED = ("alternating, full", "five to one, full", "alternating, sliding, shared and split", "four kinds")
QUICK = {*STEERED, "all sliding, full", "three kinds", "full, alternating"}  # one of each kind; all of them: -m slow
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pair(layout)`: (target, plain drafter, steered drafter)."""

    @functools.cache
    def make(layout: str) -> tuple[Path, Path, Path]:
        target_layers, target_window, layers, window, kv_heads = LAYOUTS[layout]
        sizes = {"target": Size(128, len(target_layers), 192, 2), "drafter": Size(64, 2, 96, kv_heads)}
        target, plain, steered = make_pair(tmp_path_factory.mktemp("pair"), "llama", **sizes)
        change_config(target, layer_types=target_layers, sliding_window=target_window)
        for drafter in (plain, steered):
            change_config(drafter, layer_types=layers, sliding_window=window)
        return target, plain, steered

    return make


def prompts() -> list[list[int]]:
    return [random_prompt(n, seed=n) for n in LENGTHS]


def spec(drafter: Path) -> dict[str, Any]:
    return {"model": str(drafter), "num_speculative_tokens": K}


def hugging_face(path: Path) -> Any:
    """The model in float32. vLLM's Llama has windows where config.json says so, transformers' class for that has
    another name."""
    config = json.loads((path / "config.json").read_text())
    if config.pop("model_type") != "llama":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    del config["architectures"]
    config["sliding_window"] = config["sliding_window"] or 1  # it wants one, also where no layer has it
    return MinistralForCausalLM.from_pretrained(path, config=MinistralConfig(**config), dtype=torch.float32).eval()


@functools.cache
def reference(target: Path, drafter: Path, steered: bool) -> list[Generation]:
    """What the Hugging Face loop generates and drafts for every prompt."""
    big, small = hugging_face(target), hugging_face(drafter)
    steering = checkpoint.load(drafter) if steered else None
    return [generate(big, small, p, steering, k=K, max_new_tokens=NEW) for p in prompts()]


def assert_right(found: dict[str, Any], alone: dict[str, Any], expected: list[Generation]) -> None:
    """The text is the target's own, and what was drafted for each prompt is what the reference drafts."""
    assert found["tokens"] == alone["tokens"]
    for i, generation in enumerate(expected):
        assert found["tokens"][i] == generation.tokens
        want = [[b.position, list(b.drafts)] for b in generation.blocks]
        made = [[n, drafts] for n, drafts in found["blocks"][i] if LENGTHS[i] <= n <= want[-1][0]]
        assert made == want, f"prompt of {LENGTHS[i]} tokens"


def check(engine: Any, target: Path, drafter: Path, steered: bool, **keys: Any) -> None:
    run = lambda model: engine.generate(target, model, prompts(), max_tokens=NEW, **keys)  # noqa: E731
    found = run(spec(drafter))
    assert_right(found, run(None), reference(target, drafter, steered))
    if steered:
        assert_steered(found, {K})


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[] if name in QUICK else SLOW) for name in LAYOUTS])
def test_plain_drafters_draft_in_their_own_groups(layout: str, pair: Any, runners: Any) -> None:
    target, plain, _ = pair(layout)
    check(runners("v1"), target, plain, False)


@pytest.mark.parametrize(
    ("runner", "layout"),
    [("v1", name) for name in STEERED]
    + [pytest.param("v2", name, marks=[] if name == "four kinds" else SLOW) for name in STEERED],
)
def test_steered_drafters_draft_in_their_own_groups(layout: str, runner: str, pair: Any, runners: Any) -> None:
    target, _, steered = pair(layout)
    check(runners(runner), target, steered, True)


@pytest.mark.parametrize("layout", [pytest.param("alternating, full", marks=SLOW), "four kinds"])
@pytest.mark.parametrize("keys", [{"block_size": 64}, {"block_size": 128}, {"disable_hybrid_kv_cache_manager": True}])
def test_other_blocks_and_one_group(layout: str, keys: dict[str, Any], pair: Any, runners: Any) -> None:
    target, plain, _ = pair(layout)
    if layout == "four kinds" and "block_size" not in keys:
        pytest.skip("vLLM puts layers of one window only into one group")
    check(runners("v1"), target, plain, False, **keys)


@pytest.mark.parametrize("layout", ["alternating, full", "alternating, sliding, shared and split", "four kinds"])
def test_prefixes_are_cached_for_every_group(layout: str, pair: Any, runners: Any) -> None:
    target, _, steered = pair(layout)
    calls = [{"prompts": prompts(), "sampling": {"max_tokens": NEW}} for _ in range(2)]
    alone, found = (runners("v1").run(target, s, calls, enable_prefix_caching=True) for s in (None, spec(steered)))
    assert found["error"] is None, found["error"]
    cold, warm = found["calls"]
    assert max(cold["cached"]) == 0 < max(warm["cached"])
    for result, own in zip(found["calls"], alone["calls"], strict=True):
        assert_right(result, own, reference(target, steered, True))


@pytest.mark.parametrize("layout", ["alternating, full", "four kinds"])
def test_up_to_the_end_of_the_context(layout: str, pair: Any, runners: Any) -> None:
    target, _, steered = pair(layout)
    run = lambda model: runners("v1").generate(target, model, prompts(), max_tokens=500, max_model_len=160)  # noqa: E731
    found, alone = run(spec(steered)), run(None)
    assert [len(tokens) for tokens in found["tokens"]] == [160 - n for n in LENGTHS]
    assert found["tokens"] == alone["tokens"]


@pytest.mark.parametrize("who", ["target", "drafter"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_one_window_for_a_whole_model(runner: str, who: str, tmp_path: Path, runners: Any) -> None:
    """The other model has none: neither takes the window of the other, nor loses its own."""
    target, plain, _ = make_pair(tmp_path, "mistral")
    change_config(tmp_path / who, sliding_window=16)
    check(runners(runner), target, plain, False)


GEMMA = {"sliding_window": 16, "layer_types": [S] * 5 + [F, S]}


@pytest.mark.parametrize("layers", [[F, F], [S, F]], ids=["full", "alternating"])
def test_a_gemma_target(layers: list[str], tmp_path: Path, runners: Any) -> None:
    """Plain only: vLLM's Gemma 3 hands out no hidden states."""
    for name, size, keys in (
        ("target", Size(128, 7, 192, 2), GEMMA),
        ("drafter", DRAFTER, {"sliding_window": 16, "layer_types": layers}),
    ):
        tiny_model("gemma3_text", size, seed=len(name), **keys).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    check(runners("v1"), tmp_path / "target", tmp_path / "drafter", False)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random gpt-oss: experts, attention sinks, every other layer with a window."""
    path = tmp_path_factory.mktemp("gpt_oss")
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 512}
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"num_hidden_layers": 6, "layer_types": [S, F] * 3, "sliding_window": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    rope = {"rope_parameters": yarn | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    keys = sizes | layers | experts | rope | ids | {"vocab_size": VOCAB, "head_dim": HEAD_DIM, "initializer_range": 0.2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **keys)).float().save_pretrained(path)
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("steered", [False, True], ids=["plain", "steered"])
def test_a_gpt_oss_target(steered: bool, gpt_oss: Path, pair: Any, tmp_path: Path, runners: Any) -> None:
    _, drafter, _ = pair("alternating, full")
    if steered:
        drafter = Path(shutil.copytree(drafter, tmp_path / "steered"))
        configs = (AutoConfig.from_pretrained(path) for path in (gpt_oss, drafter))
        checkpoint.save(drafter, random_steering(*configs))
        checkpoint.mark(drafter)
    check(runners("v1"), gpt_oss, drafter, steered)
