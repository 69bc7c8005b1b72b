"""What demo.py measured: the table, what is wrong with it, and the plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One streamed answer; seconds from the request to its first token, and to its last."""

    text: str
    tokens: int
    first: float
    seconds: float

    @property
    def per_token(self) -> float:
        """Seconds a token, after the first."""
        return (self.seconds - self.first) / max(1, self.tokens - 1)


@dataclass
class Row:
    """What one server did."""

    name: str
    proof: str | None = None  # the line in which it says that it steers
    answers: list[Answer] = field(default_factory=list)
    beside: list[Answer] = field(
        default_factory=list
    )  # of the server without speculation, asked by turns with this one
    acceptance_length: float = 1.0  # tokens per target forward
    acceptance: list[float] = field(default_factory=list)  # by draft position
    drafts: int = 0

    @property
    def per_token(self) -> float:
        """Seconds a token, the median over the answers."""
        return median(answer.per_token for answer in self.answers)

    @property
    def milliseconds_per_block(self) -> float:
        return 1000 * self.per_token * self.acceptance_length

    def record(self) -> dict[str, Any]:
        """What is written with --json."""
        return {
            "name": self.name,
            "steers": self.proof is not None,
            "acceptance_length": self.acceptance_length,
            "acceptance_rates": self.acceptance,
            "blocks": self.drafts,
            "tokens_per_second": 1 / self.per_token,
            "milliseconds_per_block": self.milliseconds_per_block,
            "seconds_per_token": [answer.per_token for answer in self.answers],
            "seconds_per_token_beside": [answer.per_token for answer in self.beside],
            "texts": [answer.text for answer in self.answers],
        }

    def count(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Fill in what was drafted and accepted between two readings of the server's counters."""
        self.drafts = after["drafts"] - before["drafts"]
        if self.drafts:
            self.acceptance_length = 1 + (after["accepted"] - before["accepted"]) / self.drafts
            at = zip(before["per_position"], after["per_position"], strict=True)
            self.acceptance = [(b - a) / self.drafts for a, b in at]


def gains(row: Row) -> np.ndarray:
    """For each prompt, how many times as fast as the server without speculation was beside it."""
    pairs = zip(row.answers, row.beside, strict=True)
    return np.array([theirs.per_token / ours.per_token for ours, theirs in pairs])


def with_interval(each: np.ndarray) -> str:
    """The median over prompts, and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(each), size=(2000, len(each)))
    low, high = np.percentile(np.median(each[drawn], axis=1), [2.5, 97.5])
    return f"{np.median(each):.2f} [{low:.2f}, {high:.2f}]"


def table(rows: list[Row], k: int) -> str:
    """The table, as text; ratios of speed only where servers were asked by turns."""
    wide, at = max(len(row.name) for row in rows), max(6 * k, 28)
    lines = [
        f"\n{'':{wide}} {'acceptance':>10}   {'acceptance rate at draft position':<{at}} {'tokens':>7} {'ms per':>7}",
        f"{'':{wide}} {'length':>10}   {''.join(f'{i:<6}' for i in range(1, k + 1)):<{at}} {'per s':>7} {'block':>7}",
    ]
    lines[1] += "   times as fast as without" if rows[1].beside else ""
    for row in rows:
        accepted = "".join(f"{share:<6.2f}" for share in row.acceptance[:k]) or "-"  # of a tree vLLM counts more
        line = f"{row.name:{wide}} {row.acceptance_length:>10.2f}   {accepted:<{at}} {1 / row.per_token:>7.1f}"
        line += f" {row.milliseconds_per_block:>7.1f}"
        lines.append(line + (f"   {with_interval(gains(row))}" if row.beside else ""))
    return "\n".join(lines)


def wrong_with(rows: list[Row], steered: str, greedy: bool) -> list[str]:
    """What is wrong with the result; empty when nothing is."""
    one = next(row for row in rows if row.name == steered)
    wrong = [] if one.proof else ["the steered server never said that steering is on"]
    if one.drafts == 0:
        wrong.append("the steered server drafted nothing")
    if not greedy:
        return wrong
    for row in rows[1:]:
        pairs = zip(rows[0].answers, row.answers, strict=True)
        differ = [i for i, (a, b) in enumerate(pairs, 1) if a.text != b.text]
        if differ:
            wrong.append(f"{row.name}: text differs from no speculation for prompts {differ}")
    return wrong


def plot(path: Path, points: dict[str, tuple[float, float]]) -> None:
    """Write a picture of acceptance length against time per block, see `draw`."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    draw(figure.add_subplot(), points)
    figure.savefig(path, dpi=150)


def draw(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Acceptance length against time per block, {name: (milliseconds, acceptance length)}; the first is without
    speculation. Lines are of equal speed, in multiples of its own."""
    (base, one), *_ = points.values()
    end, top = (1.2 * max(values) for values in zip(*points.values(), strict=True))
    for factor in (0.5, 1, 1.5, 2):
        slope = factor * one / base
        at = min(end, top / slope)  # where the line leaves the picture
        if slope * at < 0.85:
            continue
        axes.plot([0, at], [0, slope * at], "--", color="0.7", linewidth=1.4 if factor == 1 else 0.6, zorder=0)
        axes.text(at, slope * at, f" {factor:g}x", color="0.4", fontsize=7, va="center")
    for name, (x, y) in points.items():
        axes.scatter([x], [y], s=24, color="0.3" if y == one else None)
        axes.annotate(name, (x, y), xytext=(5, -3), textcoords="offset points", fontsize=7)
    axes.set(
        xlim=(0, end), ylim=(0.8, top), xlabel="milliseconds per block", ylabel="acceptance length (tokens per block)"
    )
    axes.spines[["top", "right"]].set_visible(False)
