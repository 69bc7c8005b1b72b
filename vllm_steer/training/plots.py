"""Plots written beside a checkpoint. matplotlib is imported when they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_training(path: Path, acceptance: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Predicted acceptance length over steps, and acceptance per guide offset: untrained, control if any, trained."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    curve, offsets = figure.subplots(1, 2)
    for name in ("sampled", "greedy"):
        points = [(0, acceptance["untrained"]["acceptance_length"][name])]
        for entry in history:
            key = next((key for key in (f"eval_acceptance_length_{name}", f"eval_{name}") if key in entry), None)
            points += [(entry["step"], entry[key])] if key else []  # a run that 0.1.0 began has the short name
        (line,) = curve.plot(*zip(*points, strict=True), marker=".", label=name)
        if "control" in acceptance:
            level = acceptance["control"]["acceptance_length"][name]
            curve.axhline(level, color=line.get_color(), linestyle="--", linewidth=1, label=f"{name}, control")
    curve.set(xlabel="step", ylabel="acceptance length, predicted", title="held-out rows")
    for when in [name for name in ("untrained", "control", "trained") if name in acceptance]:
        for name in ("overlap", "agreement"):
            values = acceptance[when][name]
            offsets.plot(range(1, len(values) + 1), values, marker=".", label=f"{name}, {when}")
    offsets.set(xlabel="guide offset d", ylabel="accepted", title="per offset")
    for axes in (curve, offsets):
        axes.legend()
    figure.savefig(path, dpi=100)
