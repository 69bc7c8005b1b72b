"""Triton's interpreter, by which vLLM's V2 model runner works without a GPU."""

from __future__ import annotations

import sys
from typing import Any


def pretend_triton_has_a_cpu_backend(path: str) -> None:
    """Make vLLM's CPU build, and inductor, accept a Triton that only interprets.

    vLLM wants the key "cpu" among Triton's backends; inductor asks the active driver and its compiler for a hash.
    """
    import types

    sys.path.insert(0, path)
    import triton.backends
    from triton.backends.compiler import GPUTarget

    driver = type(
        "InterpreterDriver",
        (),
        {
            "is_active": staticmethod(lambda: True),
            "get_current_target": lambda self: GPUTarget("cpu", 0, 1),
            "get_active_torch_device": lambda self: __import__("torch").device("cpu"),
        },
    )
    compiler = type(
        "InterpreterCompiler",
        (),
        {
            "__init__": lambda self, target: None,
            "supports_target": staticmethod(lambda target: target.backend == "cpu"),
            "hash": lambda self: "interpreter",
        },
    )
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=compiler)
    _fill_the_interpreters_gaps()


def _fill_the_interpreters_gaps() -> None:
    """What vLLM's sampling uses and Triton 3.9 cannot interpret: `mask & scalar` in a store, log1p, and the kernel of
    top-k and top-p, for which vLLM has plain torch too."""
    import triton.language as tl
    import wrapt
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    def in_torch(module: Any) -> None:
        module.apply_top_k_top_p_triton = lambda logits, k, p, **_: module.apply_top_k_top_p_pytorch(logits, k, p)

    wrapt.register_post_import_hook(in_torch, "vllm.v1.sample.ops.topk_topp_sampler")
    libdevice.log1p = lambda x: tl.log(1.0 + x)

    builder = interpreter.InterpreterBuilder
    original = builder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, policy: Any) -> Any:
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return original(self, ptrs, value, mask, policy)

    builder.create_masked_store = create_masked_store
