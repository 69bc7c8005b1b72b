"""The case and the findings of `vllm-steer doctor`, and its first check. Imports no torch, which may be broken."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OK, WARNING, FAIL, SKIPPED = "ok", "warning", "FAIL", "skipped"


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    name: str
    status: str  # OK, WARNING, FAIL or SKIPPED
    seen: str
    remedy: str = ""  # empty when there is nothing to do, or `seen` says it


@dataclass
class Case:
    """What is examined: the user's input, then what earlier checks have found. None: absent.

    Fields of type Any are looked at by checks that say they need them, and are called only where they are there.
    """

    checkpoint: Any = None  # str, like the next three
    target: Any = None
    drafter: Any = None
    url: Any = None
    tree: Any = None  # as typed: 4,1,1
    tree_rows: int | None = None
    max_num_seqs: int | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    vllm: str | None = None  # its version
    config: Any = None  # SteeringConfig
    target_config: Any = None  # of transformers, like the next
    drafter_config: Any = None
    engine: Any = None  # the VllmConfig that would be served
    served: list[dict[str, Any]] | None = None  # the server's models


def python_packages(case: Case) -> Iterable[Finding]:
    """torch and transformers import, a model of theirs included: what breaks is a package beside them."""
    for name, deeper in (("torch", "torch"), ("transformers", "transformers.models.qwen2.modeling_qwen2")):
        try:
            importlib.import_module(deeper)
        except Exception as error:  # a broken extension may raise anything
            remedy = f"install {name} again; CUDA builds of torchvision and torchaudio beside a CPU torch break it"
            yield Finding(name, FAIL, f"cannot be imported ({type(error).__name__}: {error})", remedy)
        else:
            yield Finding(name, OK, importlib.import_module(name).__version__)
