"""Tokens per second from measured step times and acceptance: which draft length pays at which batch size.

A step drafts k tokens for each of b requests and verifies them: it delivers b (1 + r_1 + ... + r_k) tokens, r_i being
the share of blocks whose draft i is accepted, and takes the time measured for (b, k). Between measured lengths the time
is interpolated linearly, since a draft pass and a further row to verify cost the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def tokens_per_step(rates: Sequence[float], k: int) -> float:
    """Tokens that a request gets from a step of k drafts."""
    return 1 + sum(rates[:k])


def step_seconds(measured: dict[int, float], k: int) -> float:
    """The time of a step with k drafts, from those of measured lengths; k lies within them."""
    if k in measured:
        return measured[k]
    low, high = next(pair for pair in pairwise(sorted(measured)) if pair[0] < k < pair[1])
    share = (k - low) / (high - low)
    return (1 - share) * measured[low] + share * measured[high]


def predict(
    sizes: Sequence[int], steps: dict[int, dict[int, float]], rates: Sequence[float]
) -> dict[int, dict[int, float]]:
    """Tokens per second by batch size and draft length, 0 for no speculation.

    Args:
        sizes: batch sizes.
        steps: measured seconds of a step by draft length and batch size; 0 is without speculation.
        rates: acceptance by position, of the longest length.
    """
    longest = max(steps)
    lengths = [0, *range(min(k for k in steps if k), longest + 1)]
    found: dict[int, dict[int, float]] = {}
    for size in sizes:
        drafted = {k: by_size[size] for k, by_size in steps.items() if k}
        found[size] = {
            k: size * tokens_per_step(rates, k) / (steps[0][size] if k == 0 else step_seconds(drafted, k))
            for k in lengths
        }
    return found


def best(predicted: dict[int, dict[int, float]]) -> dict[int, int]:
    """The fastest draft length for each batch size; the shorter of two that are equal."""
    return {size: max(sorted(of_size), key=lambda k: of_size[k]) for size, of_size in predicted.items()}


def schedule(chosen: dict[int, int], most: int) -> list[list[int]]:
    """vLLM's num_speculative_tokens_per_batch_size: [first, last, length], up to `most` requests.

    A batch size that was not measured gets the length of the next smaller one.
    """
    sizes = sorted(chosen)
    found: list[list[int]] = []
    for size, following in zip(sizes, [*sizes[1:], most + 1], strict=True):
        first = 1 if not found else size
        if found and found[-1][2] == chosen[size]:
            found[-1][1] = following - 1
        else:
            found.append([first, following - 1, chosen[size]])
    return found


def advice(chosen: dict[int, int], runner: str, most: int) -> tuple[str, dict[str, Any] | None]:
    """What to serve with, in a sentence, and the keys of --speculative-config; None: without speculation."""
    lengths = set(chosen.values())
    longest = max(lengths)
    if longest == 0:
        return "serve without --speculative-config: drafting pays at no batch size measured", None
    if runner == "V2":
        pays = [size for size, k in chosen.items() if k]
        text = f"up to {max(pays)} requests at a time draft {longest} tokens"
        if 0 in lengths:
            text += ": beyond that a server without speculation is faster (V2 makes every draft pass at any length)"
        return text, {"num_speculative_tokens": longest}
    if lengths == {longest}:
        return f"draft {longest} tokens at every batch size", {"num_speculative_tokens": longest}
    text = "draft as many tokens as the batch size makes worth while"
    if 0 in lengths:
        first = min(size for size, k in chosen.items() if k == 0)
        text += (
            f"; from {first} requests on nothing is worth drafting, but this vLLM makes the first draft pass even at "
            "length 0: a server that is always so busy is faster without speculation"
        )
    spec = {"num_speculative_tokens": longest, "num_speculative_tokens_per_batch_size": schedule(chosen, most)}
    return text, spec
