"""Draw the figures of README and docs from committed results: `python docs/figure.py`. Nothing is typed in by hand.

results.svg     acceptance length with its 95 % interval; tokens per second over those of the plain drafter of that run
drafters.svg    acceptance length against time per block, at batch 1: tiny pair (`vllm-steer bench`), cut pair (demo.py)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from vllm_steer.bench.summary import with_new_names

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo_report import draw  # noqa: E402

PAIRS = {"tiny_v1": "tiny pair", "cut_v1": "cut pair", "qwen_v1": "Qwen pair"}
COLOURS = {"plain": "0.6", "adapter": "tab:blue", "distilled": "tab:orange", "steered": "tab:green"}


def rows_of(name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of one benchmark, per temperature."""
    text = (ROOT / "benchmarks/results" / name / "results.json").read_text(encoding="utf-8")
    parts = with_new_names(json.loads(text))["summary"]
    return [("greedy" if part["temperature"] == 0 else f"T={part['temperature']:g}", part["rows"]) for part in parts]


def tiny_pair() -> dict[str, tuple[float, float]]:
    """Milliseconds per block and acceptance length of the tiny pair's drafters, batch 1."""
    text = (ROOT / "benchmarks/results/blocks_tiny.json").read_text(encoding="utf-8")
    bench = next(each for each in json.loads(text)["benches"] if each["settings"]["batch"] == 1)
    rows = [(row["name"], row["acceptance_length"], row["tokens_per_second"]) for row in bench["results"][0]["rows"]]
    return {name: (1000 * length / speed, length) for name, length, speed in rows}


def cut_pair() -> dict[str, tuple[float, float]]:
    """The same of the cut pair, the mean of the demo's runs."""
    runs = json.loads((ROOT / "benchmarks/results/demo_cut.json").read_text(encoding="utf-8"))["runs"]
    found = {}
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        milliseconds, lengths = (
            fmean(row[key] for row in rows) for key in ("milliseconds_per_block", "acceptance_length")
        )
        found[rows[0]["name"]] = (milliseconds, lengths)
    return found


def drafters() -> None:
    """Write docs/drafters.svg."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, title, points in zip(
        figure.subplots(1, 2), ("tiny pair, float32", "cut pair"), (tiny_pair(), cut_pair()), strict=True
    ):
        draw(axes, points)
        axes.set_title(title, fontsize=10)
    figure.savefig(ROOT / "docs/drafters.svg", metadata={"Date": None})


def results() -> None:
    """Write docs/results.svg."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    length, speed = figure.subplots(1, 2)
    ticks: list[tuple[float, str]] = []
    at = 0.0
    for name, title in PAIRS.items():
        for mode, rows in rows_of(name):
            plain = next(row for row in rows if row["name"] == "plain")
            for i, row in enumerate(rows):
                x, colour = at + i, COLOURS[row["name"]]
                value, (low, high) = row["acceptance_length"], row["interval_95"]
                length.bar(x, value, 0.9, color=colour, yerr=[[value - low], [high - value]], capsize=2)
                speed.bar(x, row["tokens_per_second"] / plain["tokens_per_second"], 0.9, color=colour)
            ticks.append((at + (len(rows) - 1) / 2, f"{title}\n{mode}"))
            at += len(rows) + 1
    for axes in (length, speed):
        axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    length.set_title("acceptance length (tokens per block)", fontsize=10)
    speed.set_title("tokens per second over plain, same run", fontsize=10)
    speed.axhline(1, color="0.3", linewidth=0.8)
    handles = [matplotlib.patches.Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(COLOURS), fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs/results.svg", metadata={"Date": None})


def main() -> None:
    """Write all figures."""
    matplotlib.rcParams["svg.hashsalt"] = "vllm-steer"  # the same file for the same numbers
    results()
    drafters()


if __name__ == "__main__":
    main()
