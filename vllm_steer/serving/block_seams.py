"""What patches.py puts in the places of vLLM's that block drafters need; what runs is imported by workers only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from vllm_steer.drafters.block.config import ARCHITECTURES

BLOCK_V1 = "vllm_steer.serving.spec_decode.block_v1"
TREEFLASH = "vllm_steer.serving.spec_decode.treeflash_model:TreeFlashForCausalLM"


def has_medusa() -> bool:
    """Whether this vLLM serves Medusa heads: 0.32 does, 0.33 does not. Nothing of it is imported."""
    found = find_spec("vllm")
    return bool(found and found.origin and (Path(found.origin).parent / "v1" / "spec_decode" / "medusa.py").is_file())


def with_treeflash(original: Any) -> Any:
    """ModelRegistry, which is added to."""
    for name in (name for name, kind in ARCHITECTURES.items() if kind == "treeflash"):
        original.register_model(name, TREEFLASH)
    return original


def repaired_dflash(original: type) -> type:
    """DFlashProposer."""
    return resolve_name(f"{BLOCK_V1}:BlockProposer")


def refined_medusa(original: type) -> type:
    """MedusaProposer."""
    return resolve_name(f"{BLOCK_V1}:medusa")(original)


def with_newest_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """GPUModelRunner.propose_draft_token_ids."""

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any):
        if (note := getattr(self.drafter, "note_newest", None)) is not None:
            note(self.input_batch, sampled_token_ids)
        return original(self, scheduler_output, sampled_token_ids, *args, **kwargs)

    return propose_draft_token_ids
