"""The shape of a draft tree: a fixed number of children at every depth (RSD-C, arXiv 2402.14160), or of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_steer.common.errors import SteeringError


@dataclass(frozen=True)
class TreeShape:
    """Children of every node, by depth: (4, 1, 1) is four chains of three from the newest token.

    `adaptive`: the rows part where the drafter is unsure (decoding/adaptive.py), the widths are then (L, 1, ..., 1).
    """

    widths: tuple[int, ...]
    adaptive: bool = False

    def __post_init__(self) -> None:
        whole = all(isinstance(width, int) and not isinstance(width, bool) for width in self.widths)
        if not self.widths or not whole or min(self.widths) < 1:
            raise SteeringError(
                f"the tree is {list(self.widths)}, allowed is a list of whole numbers from 1 up, e.g. [4, 1, 1]"
            )

    def __str__(self) -> str:
        return f"of {self.leaves} rows" if self.adaptive else str(list(self.widths))

    @property
    def depth(self) -> int:
        """k, the length of every path."""
        return len(self.widths)

    @property
    def leaves(self) -> int:
        """How many paths there are from the root to a leaf: the rows that a tree is served as."""
        return math.prod(self.widths)

    @property
    def drafts(self) -> int:
        """Draft tokens of the rows laid end to end: each begins with the root, but the first one's is no draft."""
        return self.leaves * (self.depth + 1) - 1

    def below(self, depth: int) -> int:
        """How many leaves lie below a node at `depth`."""
        return math.prod(self.widths[depth:])

    def pages(self, block_size: int) -> int:
        """Pages of the KV cache that a row may touch, the root anywhere in the first."""
        return 1 + math.ceil(self.depth / block_size)

    def lookahead(self, block_size: int) -> int:
        """Slots of the KV cache that the rows of one request need."""
        return self.leaves * self.pages(block_size) * block_size

    @staticmethod
    def parse(text: str) -> TreeShape:
        """The shape of "4,1,1". Raises SteeringError for anything else."""
        try:
            return TreeShape(tuple(int(part) for part in text.split(",")))
        except ValueError:
            raise SteeringError(f"the tree is {text!r}, allowed are whole numbers with commas, e.g. 4,1,1") from None

    @staticmethod
    def of_rows(count: int, depth: int) -> TreeShape:
        """An adaptive tree."""
        return TreeShape((count, *[1] * (depth - 1)), adaptive=True)

    @staticmethod
    def asked(widths: Sequence[int] | None, rows: int | None, depth: int) -> TreeShape | None:
        """Of children by depth, or of the rows of an adaptive tree `depth` deep; None, a chain, where both are None."""
        if widths is not None:
            return TreeShape.of(widths)
        return None if rows is None else TreeShape.of_rows(rows, depth)

    @staticmethod
    def of(widths: Sequence[int]) -> TreeShape:
        """The shape of a list of widths."""
        return TreeShape(tuple(widths))
