"""A benchmark's results as a Markdown table and as plots. Everything here is read from results.json's contents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError

GIB = 2**30
RESULTS = "results.json"
HOW_TO_READ = """\
Acceptance length is tokens per block, the target's own token included; brackets are 95 % bootstrap intervals over
prompts, the same resampled prompts for every row. Tokens per second are of one pass, after the prefill (no interval:
repeat on a quiet machine). Drafting is the share of that time spent in the drafter, in a pass of its own.
"""
HOW_TO_READ_LENIENCE = """
NLL per token is of the answers under the target at temperature 1, in nats: it rises as less of them is what the target
would say. "same text" counts greedy answers that are the target's own, "right" those that pass the prompt's check.
"""


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# {results['title']}" if "title" in results else _title(results["settings"]), "", *_about(results)]
    for part in results["summary"]:
        name = "Greedy (T=0)" if part["temperature"] == 0 else f"Sampled, T={part['temperature']:g}"
        exact = [row for row in part["rows"] if not row.get("lenience")]
        names = {row["name"] for row in exact}
        lenient = [pair for pair in part["pairs"] if not {pair["name"], pair["minus"]} <= names]
        apart = [pair for pair in lenient if pair["minus"] in names]  # over what gives nothing up
        lines += ["", f"## {name}", "", *_rows(exact, results.get("contenders", []))] if exact else []
        if len(lenient) < len(part["pairs"]):
            lines += ["", *_pairs([pair for pair in part["pairs"] if pair not in lenient])]
        if len(exact) < len(part["rows"]):
            lines += ["", f"### {name}, lenient: not the target's output", "", *_lenient(part["rows"])]
            lines += ["", *_pairs(apart)] if apart else []
        if len(part["categories"]) > 1:
            lines += ["", *_categories(part["categories"])]
    judged = HOW_TO_READ_LENIENCE if results["settings"].get("judged") else ""
    return "\n".join([*lines, "", results.get("note", HOW_TO_READ) + judged])


def require_matplotlib() -> None:
    """Raise SteeringError where plots cannot be drawn: before anything is measured."""
    if find_spec("matplotlib") is None:
        raise SteeringError("plots need matplotlib: pip install matplotlib")


def write(output: Path, results: dict[str, Any], text: str) -> None:
    """Write results.json and, of this text, table.md, each whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    for name, content in ((RESULTS, json.dumps(results, indent=2) + "\n"), ("table.md", text)):
        (output / f".{name}").write_text(content, encoding="utf-8")
        (output / f".{name}").replace(output / name)


def plots(results: dict[str, Any], directory: Path) -> None:
    """Write acceptance_length.png and acceptance_rate.png."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    parts = results["summary"]
    figure = Figure(figsize=(1.5 + 1.2 * len(parts[0]["rows"]), 3.6), layout="constrained")
    axes = figure.add_subplot(ylabel="acceptance length (tokens per block)")
    width = 0.8 / len(parts)
    for i, part in enumerate(parts):
        rows = [row for row in part["rows"] if row["acceptance_length"] is not None]
        heights = [row["acceptance_length"] for row in rows]
        ends = [row["interval_95"] or [row["acceptance_length"]] * 2 for row in rows]
        error = [[h - low for h, (low, _) in zip(heights, ends)], [high - h for h, (_, high) in zip(heights, ends)]]  # noqa: B905
        places = [j + (i - (len(parts) - 1) / 2) * width for j in range(len(rows))]
        axes.bar(places, heights, width, yerr=error, capsize=3, label=f"T={part['temperature']:g}")
        axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.legend(loc="upper left")
    figure.savefig(directory / "acceptance_length.png", dpi=150)

    figure = Figure(figsize=(4.2 * len(parts), 3.6), layout="constrained")
    for i, part in enumerate(parts, start=1):
        axes = figure.add_subplot(1, len(parts), i, title=f"T={part['temperature']:g}", ylim=(0, 1))
        axes.set_xlabel("draft position")
        axes.set_ylabel("acceptance rate (share of blocks)")
        for row in part["rows"]:
            if row["acceptance_rates"]:
                shares = [float("nan") if x is None else x for x in row["acceptance_rates"]]
                axes.plot(range(1, len(shares) + 1), shares, marker="o", label=row["name"])
        if axes.lines:
            axes.legend()
    figure.savefig(directory / "acceptance_rate.png", dpi=150)


def _title(settings: dict[str, Any]) -> str:
    return f"# Drafters of `{settings['target']}`"


def _about(results: dict[str, Any]) -> list[str]:
    s = results["settings"]
    drafts = [f"{s['k']} drafts per block"] if "k" in s else []
    where = [_environment(c) for c in results.get("contenders", [])]
    return [
        ", ".join([*drafts, f"{s['number_of_prompts']} prompts from `{s['prompts']}`", f"{s['max_tokens']} new tokens"])
        + f", {s['batch']} at a time.",
        *sorted(set(where), key=where.index),
        *_conditions(s),
        "",
        f"    {results['command']}",
    ]


def _conditions(settings: dict[str, Any]) -> list[str]:
    """How tokens were sampled and which options were set; empty for results that did not record it."""
    found = settings.get("conditions", {"steering": "on", "environment": {}})
    lines = [f"Sampling: {settings['sampling']}."] if "sampling" in settings else []
    if found["steering"] == "off":
        lines.append("**Steering was switched off (STEER_DISABLE).**")
    if found["environment"]:
        lines.append("Set: " + ", ".join(f"`{name}={value}`" for name, value in found["environment"].items()) + ".")
    return lines


def _steering(contender: dict[str, Any]) -> str:
    """Whether a contender was steered: on, at another scale, or off though its drafter has a steering."""
    if contender.get("steered"):
        scale = contender.get("scale", 1.0)
        return "on" if scale == 1 else "off (scale 0)" if scale == 0 else f"scale {scale:g}"
    return "off" if contender.get("identity", {}).get("steering_weights") else ""


def _environment(contender: dict[str, Any]) -> str:
    e = contender["environment"]
    how = ", ".join([e["runner"], e["dtype"], "eager" if e["eager"] else "compiled"])
    gpus = e.get("gpus", [])
    machine = ", ".join(
        [*(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)), f"{e['cores']} cores {e['cpu']}"]
    )
    versions = f"vllm-steer {contender['origin']['versions']['vllm-steer']}, torch {e['torch']}"
    return f"vLLM {e['vllm']} ({how}), {versions}; {machine}; {contender['origin']['date'][:10]}."


def _rows(rows: list[dict[str, Any]], contenders: list[dict[str, Any]]) -> list[str]:
    """One line per candidate; empty columns are left out."""
    known = {c["name"]: c for c in contenders}
    slow = next((row.get("tokens_per_second") for row in rows if row["name"] == "none"), None)
    k = max(len(row["acceptance_rates"]) for row in rows)
    columns = ["", "acceptance length", f"acceptance rate at {' '.join(map(str, range(1, k + 1)))}", "tokens/s"]
    columns += ["drafting", "steering", "peak memory", "answers unlike `none`'s"]
    lines = []
    for row in rows:
        memory = known.get(row["name"], {}).get("peak_memory")
        unlike = row.get("answers_unlike_none")
        lines.append(
            [
                row["name"],
                _number(row["acceptance_length"], row["interval_95"]) if row["acceptance_rates"] else "1",
                " ".join(_share(x) for x in row["acceptance_rates"]),
                _speed(row.get("tokens_per_second"), slow),
                "" if row.get("drafting_share") is None else f"{row['drafting_share']:.0%}",
                _steering(known.get(row["name"], {})),
                "" if memory is None else _memory(memory),
                "" if unlike is None else f"{unlike} of {row['prompts']}",
            ]
        )
    used = [i for i in range(len(columns)) if i == 0 or any(line[i] for line in lines)]
    return markdown([columns[i] for i in used], [[line[i] for i in used] for line in lines])


def _lenient(rows: list[dict[str, Any]]) -> list[str]:
    """One line per contender: what is gained, and what is lost."""
    slow = next((row["tokens_per_second"] for row in rows if row["name"] == "none"), None)
    columns = ["", "epsilon", "acceptance length", "tokens/s", "NLL per token", "same text", "right"]
    lines = [
        [
            row["name"],
            row["lenience"] or "1",
            "1" if row["name"] == "none" else _number(row["acceptance_length"], row["interval_95"]),
            _speed(row["tokens_per_second"], slow),
            _number(row["nll_per_token"], row["nll_95"]),
            "" if row["same_text"] is None else "{} of {}".format(*row["same_text"]),
            "" if row["correct"] is None else "{} of {}".format(*row["correct"]),
        ]
        for row in rows
    ]
    used = [i for i in range(len(columns)) if i == 0 or any(line[i] for line in lines)]
    return markdown([columns[i] for i in used], [[line[i] for i in used] for line in lines])


def _pairs(pairs: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            f"{pair['name']} over {pair['minus']}",
            _number(pair["difference"], pair["difference_95"], "+.3f"),
            _number(pair["ratio"], pair["ratio_95"]),
        ]
        for pair in pairs
    ]
    return markdown(["acceptance length", "difference", "ratio"], lines)


def _categories(categories: dict[str, Any]) -> list[str]:
    names = [row["name"] for row in next(iter(categories.values()))["rows"] if row["acceptance_rates"]]
    lines = []
    for category, part in categories.items():
        rows = [row for row in part["rows"] if row["name"] in names]
        cells = [_number(row["acceptance_length"], row["interval_95"]) for row in rows]
        lines.append([category, str(part["rows"][0]["prompts"]), *cells])
    return markdown(["acceptance length", "prompts", *names], lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table, line by line."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _number(value: float | None, interval: list[float] | None, form: str = ".3f") -> str:
    if value is None:
        return "no block"
    return f"{value:{form}}" + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}".removeprefix("0")


def _speed(value: float | None, none: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" + (f" ({value / none:.2f}x)" if none and value != none else "")


def _memory(workers: list[dict[str, int]]) -> str:
    """Peak of all workers' processes, and of the fullest GPU."""
    resident = f"{sum(w['resident'] for w in workers) / GIB:.2f} GiB"
    if "allocated" not in workers[0]:
        return resident
    fullest = max(workers, key=lambda w: w["allocated"])
    return f"GPU {fullest['allocated'] / GIB:.2f} GiB ({fullest['kv_cache'] / GIB:.2f} of it KV cache), host {resident}"
