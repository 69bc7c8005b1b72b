"""Block drafters for tests: the committed ones of the tiny pair, and small random ones for any target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from repository import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_steer.drafters.block import checkpoint, ngram
from vllm_steer.drafters.block.config import BlockConfig
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.new_block import new_config, start_from_target

TINY = ROOT / "examples" / "tiny_pair"
TARGET, DFLASH, TREEFLASH = TINY / "target", TINY / "dflash", TINY / "treeflash"
METHODS = {"dflash": "dflash", "treeflash": "dflash", "medusa": "medusa"}


class NoMask:
    """Stands for a tokenizer: the first token is padding."""

    mask_token_id, pad_token_id, eos_token_id = None, 0, None

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}


def make_block(directory: Path, target: Path, kind: str, k: int = 5, layers: int = 1, **raw: Any) -> Path:
    """A drafter whose new parts are random and matter, for a target in a directory."""
    config = AutoConfig.from_pretrained(target)
    torch.manual_seed(0)
    asked = TrainConfig(target=str(target), data=("x",), output="x", kind=kind, k=k, layers=layers)
    found = new_config(asked, NoMask(config.vocab_size), config, (1, 2, config.num_hidden_layers - 1))
    drafter = BlockDrafter(BlockConfig.of(found.raw | raw, "a test"))
    start_from_target(drafter, AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32))
    for name, parameter in drafter.named_parameters():
        if "ar_approximation.d" in name or name.startswith("blocks."):
            torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save(directory, drafter, checkpoint.Record("target", "v2:a:b:c"))
    return directory


def make_ngram(directory: Path, vocab_size: int, alpha: float = 0.5, alpha_sampled: float = 0.3) -> Path:
    """A bigram of random text, in `directory/ngram`."""
    generator = torch.Generator().manual_seed(0)
    text = (torch.randn(4000, generator=generator).abs() * vocab_size / 4).long().clamp(max=vocab_size - 1).tolist()
    config = ngram.NgramConfig(vocab_size, min(8, vocab_size), alpha, alpha_sampled)
    ngram.count([text], config).save(directory)
    return directory


def spec(directory: Path, kind: str, k: int = 5, sampled: bool = False) -> dict[str, Any]:
    """vLLM's speculative_config for a block drafter."""
    found: dict[str, Any] = {"method": METHODS[kind], "model": str(directory), "num_speculative_tokens": k}
    return found | ({"draft_sample_method": "probabilistic"} if sampled else {})
