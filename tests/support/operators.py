"""Which operators tensor code runs: none may wait for a value."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "mask as an index"}
VIEWS = {
    "view",
    "_unsafe_view",
    "unsqueeze",
    "slice",
    "select",
    "expand",
    "alias",
    "permute",
    "transpose",
    "t",
    "detach",
}


class Recorder(TorchDispatchMode):
    """Counts operators by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(op).split(".")[1]] += 1
        if str(op).startswith(("aten.index.", "aten.index_put")):
            self.found.update("mask as an index" for each in args[1] if getattr(each, "dtype", None) == torch.bool)
        return op(*args, **(kwargs or {}))

    @property
    def waits(self) -> set[str]:
        """Operators that read a value back to the host: `item`, a mask as an index, a size that depends on values."""
        return set(self.found) & WAITS

    @property
    def launches(self) -> int:
        """Operators that are a kernel on a GPU."""
        return sum(count for name, count in self.found.items() if name not in VIEWS)
