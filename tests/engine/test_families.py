"""Which families vLLM can steer as drafters: the same drafts as the reference, or a refusal at start-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import DRAFTER, TARGET, random_prompt, random_steering, save_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from vllm_steer.decoding.chain import generate
from vllm_steer.drafters.steered import checkpoint

# Llama, Qwen2, Qwen3, Granite: test_parity.py. OLMo2, SmolLM3 and GLM-4 come through vLLM's Transformers backend.
FIT = ("mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "glm4")
SLIDING = ("gemma2", "gemma3_text")  # every other layer has a window
K, NEW = 3, 16


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    tiny_model("llama", TARGET).save_pretrained(path)
    save_tokenizer(path)
    return path


def steered_drafter(family: str, target: Path, path: Path) -> Path:
    """A random drafter of `family` for the Llama target, with a random steering."""
    tied = family == "gemma2"  # vLLM's has no other form
    keys = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]} if family in SLIDING else {}
    drafter = tiny_model(family, DRAFTER, seed=1, tie_word_embeddings=tied, **keys)
    if tied:  # else it repeats its last token whatever it is told
        drafter.model.embed_tokens.weight.data.mul_(0.05)
    drafter.save_pretrained(path)
    save_tokenizer(path)
    checkpoint.save(path, random_steering(AutoModelForCausalLM.from_pretrained(target).config, drafter.config))
    checkpoint.mark(path)
    return path


@pytest.mark.parametrize("family", FIT)
def test_drafts_are_those_of_the_reference(family: str, target: Path, tmp_path: Path, runners: Any) -> None:
    steered = steered_drafter(family, target, tmp_path / family)
    prompts = [random_prompt(n, seed=n) for n in (4, 21, 45)]
    spec = {"model": str(steered), "num_speculative_tokens": K}
    result = runners("v1").generate(target, spec, prompts, max_tokens=NEW)
    big, small = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (target, steered))
    for i, prompt in enumerate(prompts):
        expected = generate(big, small, prompt, checkpoint.load(steered), k=K, max_new_tokens=NEW)
        plain = generate(big, small, prompt, None, k=K, max_new_tokens=NEW)
        assert [b.drafts for b in expected.blocks] != [b.drafts for b in plain.blocks]
        want = [[b.position, list(b.drafts)] for b in expected.blocks]
        made = [block for block in result["blocks"][i] if block[0] >= len(prompt)]  # vLLM drafts for chunks too
        assert made[: len(want)] == want
        assert result["tokens"][i] == expected.tokens


@pytest.mark.parametrize("family", ["glm"])
def test_others_are_refused(family: str, target: Path, tmp_path: Path, runners: Any) -> None:
    spec = {"model": str(steered_drafter(family, target, tmp_path / family)), "num_speculative_tokens": K}
    result = runners("v1").run(target, spec, [])
    assert "this family cannot be steered in vLLM" in result["error"]
