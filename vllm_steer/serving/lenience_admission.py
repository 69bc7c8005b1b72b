"""Decide in the front end whether an engine may verify leniently, say what that means, and refuse what it cannot."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.lenience import FORMS, Lenience
from vllm_steer.serving import patching
from vllm_steer.serving.plan import Options, lenience_of, on_v2

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.steer")


def admit(vllm_config: VllmConfig, options: Options) -> None:
    """Raise SteeringError for a lenience that cannot be had; warn of one that can. Repeatable."""
    if options.lenience is None or (lenience := lenience_of(vllm_config)) is None:
        return
    spec: Any = vllm_config.speculative_config
    if spec is None:
        raise SteeringError(
            f"additional-config vllm_steer: lenience is {lenience}, but nothing is drafted: give --speculative-config, "
            "or drop lenience"
        )
    method = getattr(spec, "rejection_sample_method", "standard")
    refused = {
        f"rejection_sample_method {method!r}": method != "standard",
        "draft trees (vllm_steer: tree, tree_rows)": options.tree is not None or options.tree_rows is not None,
        "watermarking": getattr(vllm_config, "watermark_config", None) is not None,
        "adaptive verification": getattr(spec, "enable_adaptive_verification", False),
    }
    for name, asked in refused.items():
        if asked:
            raise SteeringError(f"lenience does not work with {name} yet: turn that off, or drop lenience")
    patching.require(v2=on_v2(vllm_config), part="lenience")
    _warn(lenience)


@functools.cache
def _warn(lenience: Lenience) -> None:
    logger.warning(
        "lenience %s: the output is NOT what the target would say. Drafts are accepted with min(1, f(p) / q), %s, and "
        "greedily where f(p) reaches the largest p",
        lenience,
        FORMS[lenience.form],
    )
