"""Options that this project's own engines need, whoever starts them."""

from __future__ import annotations

from typing import Any


def for_sampling() -> dict[str, Any]:
    """Options of vLLM's for engines that sample with seeds: on a CPU, prompts are read whole.

    vLLM 0.32's V1 runner rewinds the generator of a request whose prompt came in chunks; on a CPU that raises.
    """
    return {} if _accelerator() else {"enable_chunked_prefill": False}


def for_trees() -> dict[str, Any]:
    """Options of vLLM's for engines that draft trees: on a CPU, a block size of 32, where vLLM's is 128.

    Every row of a tree has whole blocks to itself.
    """
    return {} if _accelerator() else {"block_size": 32}


def _accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
