"""Import + Hugging Face reproduce what the authors' own implementation computed (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_steer.decoding.chain import generate
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.hf import attach
from vllm_steer.drafters.steered.import_sd2 import import_published

GOLDEN = ROOT / "tests/golden/tiny_qwen3"


def load_model(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("golden") / "imported"
    return import_published(GOLDEN, GOLDEN / "base_drafter", GOLDEN / "verifier", output)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_numbers(imported: Path, expected: dict[str, Tensor]) -> None:
    steering, target, drafter = checkpoint.load(imported), load_model(GOLDEN / "verifier"), load_model(imported)
    ids = expected["input_ids"]
    out = target(ids, output_hidden_states=True)
    assert_close(out.logits, expected["verifier_logits"])
    guide = steering.guide(torch.cat([out.hidden_states[i] for i in steering.config.target_layer_ids], -1))
    assert_close(guide, expected["guide"])
    deltas = steering.deltas(guide)  # [B, T, L, F]
    assert_close(deltas, expected["deltas"].permute(1, 2, 0, 3))
    assert_close(drafter(ids).logits, expected["drafter_logits_unsteered"])
    injector = attach(drafter, steering.config.steered_layers)
    with injector.using(deltas[:, expected["steer_position"].long()] * expected["steer_mask"][..., None, None]):
        assert_close(drafter(ids).logits, expected["drafter_logits_steered"])


@pytest.mark.parametrize("row", [0, 1])
def test_generated(imported: Path, expected: dict[str, Tensor], row: int) -> None:
    target, drafter = load_model(GOLDEN / "verifier"), load_model(imported)
    want, prompt = expected["generated"][row].tolist(), expected["input_ids"][row, :16].tolist()
    new = want[len(prompt) :] if want[: len(prompt)] == prompt else want
    steering = checkpoint.load(imported)
    found = generate(target, drafter, prompt, steering, k=steering.config.draft_length, max_new_tokens=len(new))
    assert found.tokens == new
