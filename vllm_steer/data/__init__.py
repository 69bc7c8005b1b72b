"""Prompts, responses and training rows."""

from importlib import import_module
from typing import Any
from warnings import warn

_MOVED = {"Row": "split", "split_rows": "split", "collate": "dataset", "read_rows": "dataset"}
_MOVED |= {"without_prompts": "dataset", "sha256": "dataset"}


def __getattr__(name: str) -> Any:
    """Functions of the module that had this package's name in 0.1.0."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"{__name__}.{_MOVED[name]}"
    warn(f"{__name__}.{name} is now {new}.{name}; the old name goes in the next release", FutureWarning, stacklevel=2)
    return getattr(import_module(new), name)
