"""`vllm-steer tune`: which draft length, or tree, pays on this machine at which batch size.

Without speculation, chains and each tree are measured in engines of their own; on V1 one engine drafts chains of every
length, by turns. From step times and acceptance follows the speed of every length between (cost_model.py); `--check`
measures further lengths and shows how far off the prediction is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.bench import conditions, cost_model, report, step_costs
from vllm_steer.bench.candidate import NONE, Contender
from vllm_steer.common import options, provenance
from vllm_steer.common.errors import SteeringError, require_at_least
from vllm_steer.common.files import only_writer, refuse_used
from vllm_steer.common.identity import difference
from vllm_steer.common.options import option
from vllm_steer.common.redaction import redact
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.data.prompts import encode_prompt, is_builtin, read_prompts
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.tokenizer import read_tokenizer


@dataclass(frozen=True)
class TuneConfig:
    """One tuning; the command line is made from these fields."""

    target: str = option(dataclasses.MISSING, "target model: hub id or directory")
    drafter: str = option(dataclasses.MISSING, "DRAFTER (plain or steered), or ADAPTER+DRAFTER", metavar="DRAFTER")
    prompts: str = option(
        dataclasses.MISSING, "your traffic: a JSONL file of {'prompt'} lines, or builtin[:NAME] (its test split)"
    )
    output: str = option(dataclasses.MISSING, "directory for results.json, table.md and tune.png")
    batch: tuple[int, ...] = option((1, 2, 4, 8), "requests at a time", nargs="+", type=int)
    k: tuple[int, ...] = option(
        (1, 2, 3, 4, 5), "draft lengths to measure; those between, if you leave some out, follow", nargs="+", type=int
    )
    check: tuple[int, ...] = option((), "further lengths to measure, beside what was predicted", nargs="*", type=int)
    tree: tuple[str, ...] = option((), "draft trees to measure, W,W,... each", nargs="*", type=str, metavar="W,W,...")
    temperature: float = option(0.0, "temperature of the requests; 0 is greedy")
    max_tokens: int = option(64, "new tokens per prompt")
    count: int = option(16, "prompts per batch size")
    max_model_len: int = option(1024, "tokens of prompt and answer; longer prompts are left out")
    engine: str = option("{}", "more engine arguments of vLLM as JSON", metavar="JSON")
    seed: int = option(0, "of sampled answers")
    resume: bool = option(False, "keep what the output holds, measure what is missing")

    def __post_init__(self) -> None:
        for name in ("max_tokens", "count"):
            require_at_least(options.flag(name), getattr(self, name), 1)
        for name in ("batch", "k", "check"):
            for value in getattr(self, name):
                require_at_least(options.flag(name), value, 1)
        if len(set(self.batch)) < len(self.batch) or len(set(self.k)) < len(self.k):
            raise SteeringError("--batch and --k: give each number once")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SteeringError(f"--temperature is {self.temperature}, allowed is 0 (greedy) or more")
        if outside := [k for k in self.check if not min(self.k) <= k <= max(self.k)]:
            raise SteeringError(
                f"--check has {outside[0]}, predicted are lengths from {min(self.k)} to {max(self.k)}: widen --k"
            )
        options.json_object("engine", self.engine)
        self.ways  # noqa: B018 - refuses what is not usable

    @property
    def contender(self) -> Contender:
        """The drafter, drafting chains."""
        return Contender.parse(f"drafter={self.drafter}")

    @property
    def ways(self) -> dict[str, tuple[Contender, int]]:
        """What is measured, by name: how, and the drafts of a block, of a tree its depth."""
        trees = {f"tree {text}": TreeShape.parse(text).widths for text in self.tree}
        chains = {f"k={k}": (self.contender, k) for k in sorted({*self.k, *self.check})}
        drawn = {name: (dataclasses.replace(self.contender, tree=w), len(w)) for name, w in trees.items()}
        return {NONE: (Contender(NONE), 1)} | chains | drawn

    def together(self, names: list[str]) -> dict[int, str]:
        """Those of `names` that are asked of one engine with the first of them, by draft length."""
        first, k = self.ways[names[0]]
        if first.drafter is None or first.tree is not None or first.method is not None:
            return {k: names[0]}  # vLLM varies the length of a draft model's chains only
        return {self.ways[name][1]: name for name in names if self.ways[name][0] == first}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer tune`."""
    options.add_arguments(parser, TuneConfig)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer tune`: measure, then show the table and what to serve with."""
    config = options.from_arguments(TuneConfig, args)
    print(f"{table(tune(config))}\nwrote {config.output}")


def tune(config: TuneConfig) -> dict[str, Any]:
    """Measure and write `config.output`; returns what results.json holds.

    Raises SteeringError for models, prompts or an output that cannot be used, and when an engine fails.
    """
    report.require_matplotlib()
    output = Path(config.output)
    with only_writer(output.resolve().parent / f".{output.name}.lock", config.output):
        if not config.resume:
            refuse_used(output, "give a new one, or --resume a stopped tuning")
        config.contender.check(read_model_config(config.target))
        prompts = _prompts(config)
        settings = _settings(config, prompts)
        measured = _measured(output, settings) if config.resume else {}
        while missing := [name for name in config.ways if name not in measured]:
            together = config.together(missing)
            sizes = ", ".join(map(str, config.batch))
            print(f"{', '.join(together.values())}: measuring at {sizes} requests at a time", flush=True)
            contender, _ = config.ways[missing[0]]
            found = step_costs.measure_in_a_process(contender, list(together), settings, prompts)
            measured |= {together[k]: one for k, one in found.items()}
            _write(output, config, settings, measured)
        return _write(output, config, settings, measured)


def _prompts(config: TuneConfig) -> list[dict[str, Any]]:
    tokenizer = read_tokenizer(config.target)
    shapes = [TreeShape.of(contender.tree) for contender, _ in config.ways.values() if contender.tree]
    rows = max((shape.lookahead(32) for shape in shapes), default=0)
    room = config.max_model_len - config.max_tokens - max(3 * (max(config.k) + 1), rows)
    found = []
    for prompt in read_prompts(config.prompts, "test" if is_builtin(config.prompts) else None):
        ids = encode_prompt(tokenizer, prompt.prompt, None, prompt.tools)
        if 0 < len(ids) <= room:
            found.append({"id": prompt.id, "category": prompt.category, "ids": ids})
    needed = max(*config.batch, config.count)
    if len(found) < needed:
        raise SteeringError(
            f"{config.prompts} has {len(found)} prompts of {room} tokens or less, {needed} are needed: give more, or "
            "lower --count and --batch"
        )
    return found[:needed]


def _settings(config: TuneConfig, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """What every measurement depends on; compared on resume."""
    return {
        "target": config.target,
        "target_weights": provenance.fingerprint(config.target),
        "drafter": config.contender.identity(),
        "batch": sorted(config.batch),
        "k": sorted(config.k),
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "prompts": config.count,
        "prompt_ids": [prompt["id"] for prompt in prompts],
        "prompts_sha256": conditions.digest(prompts),
        "max_model_len": config.max_model_len,
        "engine": options.json_object("engine", config.engine),
        "seed": config.seed,
        "conditions": conditions.conditions(),
    }


def _measured(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads((output / report.RESULTS).read_text(encoding="utf-8"))
        before, measured = found["settings"], found["measured"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SteeringError(f"cannot resume, {output / report.RESULTS}: {error}; start without --resume") from None
    for key, value in redact(settings).items():
        if what := difference(before.get(key), value):
            raise SteeringError(
                f"{output} was measured with {key} {before.get(key)!r}, now it is {value!r}: {what}; give a new "
                "directory, or the settings of before"
            )
    return measured


def _write(output: Path, config: TuneConfig, settings: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Write what there is so far; once all chains are there, with predictions and advice."""
    measured = {name: measured[name] for name in config.ways if name in measured}
    found: dict[str, Any] = {
        "command": options.command("tune", dataclasses.asdict(config) | {"resume": False}),
        "origin": provenance.origin("transformers"),
        "settings": redact(settings),
        "measured": measured,
    }
    if all(name in measured for name in (NONE, *(f"k={k}" for k in config.k))):
        found |= judge(config, measured)
    report.write(output, found, table(found))
    if "predicted" in found:
        plot(found, output / "tune.png")
    return found


def judge(config: TuneConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """{"predicted", "served", "chosen", "advice", "speculative_config"} of what was measured."""
    served = {
        name: {each["batch"]: each["batch"] * each["tokens"] / each["step"] for each in one["batches"]}
        for name, one in measured.items()
    }
    lengths = {0: NONE} | {k: f"k={k}" for k in config.k}
    steps = {k: {each["batch"]: each["step"] for each in measured[name]["batches"]} for k, name in lengths.items()}
    rates = measured[f"k={max(config.k)}"]["rates"]
    predicted = cost_model.predict(sorted(config.batch), steps, rates)
    chosen = cost_model.best(predicted)
    runner = measured[NONE]["environment"]["runner"]
    text, spec = cost_model.advice(chosen, runner, max(config.batch))
    trees = {
        size: name
        for size in predicted
        for name in served
        if name.startswith("tree") and served[name][size] > predicted[size][chosen[size]]
    }
    if trees:
        text += "; faster than any chain: " + ", ".join(f"{name} at {size}" for size, name in trees.items())
    return {"predicted": predicted, "served": served, "chosen": chosen, "advice": text, "speculative_config": spec}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings = found["settings"]
    lines = [f"# Draft length for `{settings['target']}`", "", f"    {found['command']}", ""]
    if "predicted" not in found:
        return "\n".join([*lines, f"Measured so far: {', '.join(found['measured'])}.", ""])
    predicted, served = _by_number(found["predicted"]), {n: _by_number(s) for n, s in found["served"].items()}
    lengths = list(next(iter(predicted.values())))
    head = ["tokens/s predicted", *(NONE if k == 0 else f"k={k}" for k in lengths), "best"]
    chosen = _by_number(found["chosen"])
    rows = [
        [f"batch {size}", *(f"{of_size[k]:.1f}" for k in lengths), NONE if chosen[size] == 0 else f"k={chosen[size]}"]
        for size, of_size in predicted.items()
    ]
    lines += [*report.markdown(head, rows), ""]
    head, rows = ["tokens/s served", *served], []
    for size in predicted:
        rows.append([f"batch {size}", *(_beside(name, s[size], predicted[size]) for name, s in served.items())])
    lines += [*report.markdown(head, rows), "", "In brackets: what was predicted, over what was served.", ""]
    rates = found["measured"][max((n for n in served if n.startswith("k=")), key=lambda n: int(n[2:]))]["rates"]
    lines += [
        f"Acceptance rate at 1 2 ...: {' '.join(f'{rate:.2f}' for rate in rates)}.",
        "",
        f"**{found['advice']}**.",
    ]
    if found["speculative_config"]:
        lines += ["", f"    --speculative-config '{json.dumps(found['speculative_config'])}'"]
    return "\n".join([*lines, ""])


def _by_number(raw: dict[Any, Any]) -> dict[int, Any]:
    """Keys that JSON made texts, as numbers again, at both levels."""
    return {int(key): _by_number(value) if isinstance(value, dict) else value for key, value in raw.items()}


def _beside(name: str, speed: float, predicted: dict[int, float]) -> str:
    k = 0 if name == NONE else int(name[2:]) if name.startswith("k=") else None
    return f"{speed:.1f}" + (f" ({predicted[k] / speed:.2f})" if k in predicted else "")


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens per second over draft length, a line for each batch size, relative to no speculation."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.add_subplot(xlabel="draft length (0: no speculation)", ylabel="speed over no speculation")
    for size, of_size in _by_number(found["predicted"]).items():
        (line,) = axes.plot(list(of_size), [speed / of_size[0] for speed in of_size.values()], label=f"batch {size}")
        for name, speeds in found["served"].items():
            if name.startswith("k="):
                axes.plot(int(name[2:]), _by_number(speeds)[size] / of_size[0], "o", color=line.get_color())
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=150)
