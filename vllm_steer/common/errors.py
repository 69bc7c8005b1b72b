"""The error a user sees, and checks of single values that raise it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class SteeringError(ValueError):
    """A mistake in a checkpoint, a configuration or a pairing, told as: what, what is allowed, the remedy."""


def require_at_least(name: str, value: float, least: float) -> None:
    """Raises SteeringError naming an option that is below what is allowed."""
    if value < least:
        raise SteeringError(f"{name} is {value}, allowed is {least} or more")


def require_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises SteeringError naming an option that is not among those allowed."""
    if value not in allowed:
        raise SteeringError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")


def require_positive_int(name: str, value: Any) -> None:
    """Raise SteeringError unless `value` is a whole number from 1 up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SteeringError(f"{name} is {value!r}, allowed is a whole number from 1 up")
