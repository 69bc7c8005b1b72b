"""A checkpoint imported from the published layout serves: vLLM drafts what the reference drafts from it.

vLLM's CPU attention has no kernel for the golden pair's head size of 16. Both models are therefore widened to heads of
32 that compute the same function (zeros between, rotary base squared, norms rescaled), which the test checks first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_steer.decoding.chain import generate
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.import_sd2 import import_published

GOLDEN = ROOT / "tests/golden" / "tiny_qwen3"
K = 4


def spread(rows: Tensor, heads: int) -> Tensor:
    """[heads * 16, ...] -> [heads * 32, ...]: rotary pairs (i, i + 8) become (i, i + 16), zeros elsewhere."""
    halves = rows.unflatten(0, (heads, 2, 8))
    return torch.nn.functional.pad(halves, (0, 0) * (halves.dim() - 3) + (0, 8)).flatten(0, 2)


@torch.no_grad()
def widen(source: Path, output: Path) -> None:
    """Save `source`, a Qwen3 with heads of 16, as the same function with heads of 32."""
    config = AutoConfig.from_pretrained(source)
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config.head_dim = 32
    # theta' ** (-2i / 32) = theta ** (-2i / 16)
    config.rope_parameters = config.rope_parameters | {"rope_theta": config.rope_parameters["rope_theta"] ** 2}
    big = AutoModelForCausalLM.from_config(config).float()
    weights = small.state_dict()
    for name, tensor in weights.items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads),
                            ("v_proj", config.num_key_value_heads)):  # fmt: skip
            if f"{part}.weight" in name:
                weights[name] = spread(tensor, heads)
        if "o_proj.weight" in name:
            weights[name] = spread(tensor.T.contiguous(), config.num_attention_heads).T.contiguous()
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # The mean square over 32 is half of that over 16; vLLM scales scores by 32 ** -0.5, not 16 ** -0.5.
            factor = 2**-0.5 if name.endswith("k_norm.weight") else 1.0
            weights[name] = spread(tensor, 1) * factor
    big.load_state_dict(weights)
    big.save_pretrained(output)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("golden")
    import_published(GOLDEN, GOLDEN / "base_drafter", GOLDEN / "verifier", root / "imported")
    widen(GOLDEN / "verifier", root / "target")
    widen(root / "imported", root / "steered")
    checkpoint.save(root / "steered", checkpoint.load(root / "imported"))
    checkpoint.mark(root / "steered")
    return root / "target", root / "steered"


@torch.no_grad()
def test_widened_models_compute_the_golden_logits(served: tuple[Path, Path]) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    for path, key in zip(served, ("verifier_logits", "drafter_logits_unsteered"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_imported_checkpoint_serves(served: tuple[Path, Path], runner: str, runners: Any) -> None:
    target, steered = served
    expected = load_file(GOLDEN / "expected.safetensors")
    prompts = expected["input_ids"][:, :16].tolist()
    golden = expected["generated"].tolist()
    new = len(golden[0]) - 16
    spec = {"model": str(steered), "num_speculative_tokens": K}
    result = runners(runner).generate(target, spec, prompts, max_tokens=new, skip_tokenizer_init=True)
    big, small = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in served)
    steering = checkpoint.load(steered)
    for i, prompt in enumerate(prompts):
        assert prompt + result["tokens"][i] == golden[i]
        blocks = generate(big, small, prompt, steering, k=K, max_new_tokens=new).blocks
        want = [[b.position, list(b.drafts)] for b in blocks]
        assert result["blocks"][i][: len(want)] == want
