"""Options that this project's own engines need, whoever starts them."""

from __future__ import annotations

from typing import Any


def for_sampling() -> dict[str, Any]:
    """Options of vLLM's for engines that sample with seeds: on a CPU, prompts are read whole.

    vLLM 0.32's V1 runner rewinds the generator of a request whose prompt came in chunks; on a CPU that raises.
    """
    import torch

    return {} if torch.accelerator.is_available() else {"enable_chunked_prefill": False}
