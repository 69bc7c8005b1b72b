"""`vllm-steer bench`: what each drafter of one target is worth, in vLLM, on the same prompts.

Every contender (no speculation, each drafter) gets a fresh process and an engine of its own, one after another; what
each one does is in candidate.py, how blocks are counted in block_counting.py, a running server in remote.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.bench import block_counting, conditions, report, summary
from vllm_steer.bench.candidate import NONE, Contender, Settings, measure_in_a_process
from vllm_steer.common import options, provenance
from vllm_steer.common.engine_options import for_trees
from vllm_steer.common.errors import SteeringError, require_at_least, require_one_of
from vllm_steer.common.files import only_writer, refuse_used
from vllm_steer.common.identity import difference
from vllm_steer.common.options import option
from vllm_steer.common.redaction import redact
from vllm_steer.data.generate import SAMPLING
from vllm_steer.data.prompts import SPLITS, Prompt, encode_prompt, is_builtin, read_prompts
from vllm_steer.drafters.models import read_model_config, text_config
from vllm_steer.drafters.tokenizer import read_tokenizer

log = logging.getLogger(__name__)

LONGEST = 4096  # tokens an engine is built for when nothing says otherwise: its KV cache must hold one such sequence
OWN_OPTIONS = (  # engine arguments that counting depends on; all others are the caller's
    "model", "speculative_config", "max_model_len", "max_num_seqs", "seed", "enable_prefix_caching", "stream_interval",
    "disable_log_stats", "per_request_spec_decode_metrics", "data_parallel_size",
)  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """One benchmark; the command line is made from these fields."""

    prompts: str = option(dataclasses.MISSING, "JSONL of prompts, or builtin[:NAME] (see vllm_steer/data/prompts.py)")
    output: str = option(dataclasses.MISSING, "directory to write: results.json, table.md, plots")
    target: str | None = option(None, "target model: hub id or directory", type=str)
    drafters: tuple[str, ...] = option(
        (),
        "drafters to measure, NAME=DRAFTER (plain or steered) or NAME=ADAPTER+DRAFTER; with @tree:W,W,... at the end, "
        "the children of every node by depth, it drafts trees (docs/trees.md); with @lenience:EPSILON its output is "
        "not the target's, and all answers are judged (docs/lenience.md)",
        nargs="+",
        type=str,
        metavar="NAME=DRAFTER",
    )
    none: bool = option(False, f"also measure without speculation (under the name {NONE})")
    k: int = option(5, "drafts per block")
    max_tokens: int = option(128, "new tokens per prompt that count")
    temperature: tuple[float, ...] = option(
        (0.0, 1.0), "temperatures to measure at; 0 is greedy", nargs="+", type=float
    )
    batch: int = option(8, "requests at a time")
    split: str | None = option(
        None, "use only prompts marked so (default: test of a built-in set, all of a file)", choices=SPLITS
    )
    max_model_len: int | None = option(
        None, f"tokens of prompt and answer (default: what all models take, at most {LONGEST})", type=int
    )
    engine: str = option("{}", 'more engine arguments of vLLM as JSON, e.g. \'{"dtype": "float32"}\'', metavar="JSON")
    chat_template_kwargs: str = option(
        "{}", "variables of the chat template as JSON, e.g. '{\"enable_thinking\": false}'", metavar="JSON"
    )
    sampling: str = option(
        "neutral",
        "beside the temperature: neutral (top_p 1, no top_k, no penalties), or served: the model's generation_config",
        choices=list(SAMPLING),
    )
    seed: int = option(0, "of the sampled answers: prompt i is sampled with seed + i")
    run_code: bool = option(
        False,
        "beside a lenient drafter: run the tests that come with prompts on the code that models wrote, in a process "
        "with little time and memory and no network; in a container if you do not trust them",
    )
    resume: bool = option(False, "keep what the output holds, measure what is missing")
    url: str | None = option(None, "measure a running server instead of --target, e.g. http://localhost:8000", type=str)
    model: str | None = option(None, "with --url: the served model (default: the first one)", type=str)

    def __post_init__(self) -> None:
        for name in ("k", "max_tokens", "batch"):
            require_at_least(options.flag(name), getattr(self, name), 1)
        require_at_least("--seed", self.seed, 0)
        require_one_of("--sampling", self.sampling, SAMPLING)
        for value in self.temperature:
            if not (math.isfinite(value) and value >= 0):
                raise SteeringError(f"--temperature is {value}, allowed is 0 (greedy) or more")
        if not self.temperature or len(set(self.temperature)) < len(self.temperature):
            raise SteeringError(f"--temperature is {list(self.temperature)}: give each temperature once")
        if self.url is None and self.model is not None:
            raise SteeringError("--model names the model of a running server: give --url, or --target for an engine")
        if self.url is not None and (self.target or self.drafters or self.none or self.resume or self.engine != "{}"):
            raise SteeringError(
                "--url measures a server as it runs: leave out --target, --drafters, --none, --engine and --resume"
            )
        if self.url is None and not (self.target and (self.drafters or self.none)):
            raise SteeringError("nothing to measure: give --target with --drafters or --none, or --url")
        names = [NONE, *(contender.name for contender in self.contenders if contender.drafter)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SteeringError(f"--drafters has the name {min(twice)!r} twice, or it is {NONE!r}: give each its own")
        self._check_trees()
        self.engine_options, self.template_options  # noqa: B018 - refuses what is not usable

    def _check_trees(self) -> None:
        for contender in self.contenders:
            if contender.tree is not None and len(contender.tree) != self.k:
                raise SteeringError(
                    f"--drafters has {contender.name} with a tree {len(contender.tree)} deep, --k is {self.k}: give "
                    "both the same length"
                )

    @property
    def contenders(self) -> list[Contender]:
        """What to measure, in order."""
        return [Contender(NONE)] * self.none + [Contender.parse(text) for text in self.drafters]

    @property
    def judged(self) -> bool:
        """Whether answers are judged: where an output is not the target's."""
        return any(contender.lenience for contender in self.contenders)

    @property
    def marked(self) -> str | None:
        """The split to use: drafters are trained on the others of a built-in set."""
        return self.split or ("test" if is_builtin(self.prompts) else None)

    def read_prompts(self) -> list[Prompt]:
        """The prompts to measure on."""
        return read_prompts(self.prompts, self.marked)

    @property
    def engine_options(self) -> dict[str, Any]:
        """`engine`, parsed. Raises SteeringError for arguments that counting depends on."""
        found = options.json_object("engine", self.engine)
        if taken := [key for key in found if key in OWN_OPTIONS]:
            raise SteeringError(f"--engine has {taken[0]!r}, which the benchmark sets itself: leave it out")
        return found

    @property
    def template_options(self) -> dict[str, Any]:
        """`chat_template_kwargs`, parsed."""
        return options.json_object("chat_template_kwargs", self.chat_template_kwargs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer bench`."""
    options.add_arguments(parser, BenchConfig)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer bench`: measure, then show the table and say where it is."""
    config = options.from_arguments(BenchConfig, args)
    results = benchmark(config)
    print(f"{report.table(results)}\nwrote {config.output}")


def benchmark(config: BenchConfig) -> dict[str, Any]:
    """Measure and write `config.output`; returns what results.json holds.

    Raises SteeringError for models, prompts or an output that cannot be used, and when an engine fails.
    """
    report.require_matplotlib()
    output = Path(config.output)
    with only_writer(output.resolve().parent / f".{output.name}.lock", config.output):
        return _benchmark(config)


def _benchmark(config: BenchConfig) -> dict[str, Any]:
    output = Path(config.output)
    if not config.resume:
        refuse_used(output, "give a new one, or --resume a stopped benchmark")
    if config.url is not None:
        return _write(output, _bench_server(config))
    assert config.target is not None  # or __post_init__ would have refused
    target = read_model_config(config.target)
    models = [target, *(contender.check(target) for contender in config.contenders)]
    prompts, dropped, room = _encode(config, [model for model in models if model is not None])
    settings = _settings(config, prompts, room)
    steered = [contender.name for contender in config.contenders if contender.steering is not None]
    conditions.say_what_is_off(steered, config.engine_options, settings["conditions"])
    results = {
        "command": options.command("bench", dataclasses.asdict(config) | {"resume": False}),
        "settings": redact(settings),
        "dropped_prompts": dropped,
        "contenders": _measured(output, settings) if config.resume else [],
    }
    for contender in config.contenders:
        identity = redact(contender.identity())
        known = {c["name"]: c for c in results["contenders"]}
        if difference(redact(known.get(contender.name, {}).get("identity")), identity) is None:
            print(f"{contender.name}: measured already", flush=True)
        else:
            found = measure_in_a_process(contender, settings, prompts)
            origin = provenance.origin("transformers")
            known[contender.name] = {"name": contender.name, "identity": identity, "origin": origin} | found
        results["contenders"] = list(known.values())
        results["summary"] = summary.summarise(settings, results["contenders"])
        _write(output, results)
    return results


def _bench_server(config: BenchConfig) -> dict[str, Any]:
    from vllm_steer.bench import remote

    prompts = config.read_prompts()
    assert config.url is not None
    asked: dict[str, Any] = {"max_tokens": config.max_tokens, "batch": config.batch, "seed": config.seed}
    asked |= {"template": config.template_options} if config.template_options else {}
    asked["sampling"] = config.sampling
    model, parts = remote.measure(config.url, config.model, prompts, temperatures=config.temperature, **asked)
    return {
        "title": f"A running server of `{model}`",
        "note": remote.NOTE,
        "command": options.command("bench", dataclasses.asdict(config)),
        "origin": provenance.origin("openai"),
        "settings": asked
        | {
            "url": redact(config.url),
            "model": model,
            "prompts": redact(config.prompts),
            "split": config.marked,
            "number_of_prompts": len(prompts),
            "prompts_sha256": conditions.digest([prompt.to_dict() for prompt in prompts]),
            "temperature": list(config.temperature),
        },
        "summary": parts,
    }


# --- before anything is measured ------------------------------------------------------------------------------------


def _encode(config: BenchConfig, models: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Prompts as token ids, those too long for the engine, and the engine's length."""
    lengths = [n for m in models if (n := getattr(text_config(m), "max_position_embeddings", None))]
    room = config.max_model_len or min([*lengths, LONGEST])
    # Beyond what is counted: the last counted block, one that is only asked for, and the drafts that follow it.
    drafts = max(config.k, *(contender.drafts(config.k) for contender in config.contenders))
    most = room - block_counting.tokens_to_ask(config.max_tokens, config.k) - max(2 * (drafts + 1), _rows(config))
    assert config.target is not None
    tokenizer, template = read_tokenizer(config.target), config.template_options
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for prompt in config.read_prompts():
        try:
            ids = encode_prompt(tokenizer, prompt.prompt, template, prompt.tools)
        except SteeringError as error:
            dropped.append({"id": prompt.id, "reason": str(error)})
            log.warning("prompt %s left out: %s", prompt.id, error)
            continue
        if 0 < len(ids) <= most:
            judged = {"text": prompt.prompt, "expected": prompt.expected} if config.judged else {}
            kept.append({"id": prompt.id, "category": prompt.category, "ids": ids} | judged)
        else:
            dropped.append({"id": prompt.id, "tokens": len(ids)})
            log.warning("prompt %s left out: %d tokens, allowed are 1 to %d", prompt.id, len(ids), most)
    if not kept and (refused := [prompt["reason"] for prompt in dropped if "reason" in prompt]):
        raise SteeringError(f"no prompt of {config.prompts} can be used; {len(refused)} were refused: {refused[0]}")
    if not kept:
        raise SteeringError(
            f"no prompt of {config.prompts} fits: {room} tokens of prompt and answer leave {max(0, most)} for the "
            "prompt; raise --max-model-len or lower --max-tokens"
        )
    return kept, dropped, room


def _rows(config: BenchConfig) -> int:
    """Slots of the KV cache that the rows of the largest tree need after the last token; 0 without trees."""
    block = ({"block_size": 16} | for_trees() | config.engine_options)["block_size"]
    shapes = (contender.shape(config.k) for contender in config.contenders)
    return max(0 if shape is None else shape.lookahead(block) for shape in shapes)


def _settings(config: BenchConfig, prompts: list[dict[str, Any]], room: int) -> Settings:
    """Everything the numbers depend on that all candidates share."""
    assert config.target is not None
    judged: Any = {"judged": True, "run_code": config.run_code} if config.judged else {}
    return judged | {
        "target": config.target,
        "target_weights": provenance.fingerprint(config.target),
        "prompts": config.prompts,
        "split": config.marked,
        "number_of_prompts": len(prompts),
        "prompts_sha256": conditions.digest(prompts),
        "k": config.k,
        "max_tokens": config.max_tokens,
        "temperature": list(config.temperature),
        "batch": config.batch,
        "max_model_len": room,
        "engine": config.engine_options,
        "seed": config.seed,
        "sampling": config.sampling,
        "conditions": conditions.conditions(),
    }


def _measured(output: Path, settings: Settings) -> list[dict[str, Any]]:
    """The candidates in the output. Raises SteeringError if there are none, or if their settings differ."""
    path = output / report.RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, contenders = found["settings"], found["contenders"]
    except OSError as error:
        raise SteeringError(f"cannot resume, {path}: {error.strerror}; start without --resume") from None
    except (ValueError, KeyError, TypeError):
        raise SteeringError(
            f"cannot resume, {path} is not of a benchmark with --target: give a new directory"
        ) from None
    conditions.refuse_other(settings["conditions"], before, contenders, str(output))
    for key, value in redact({key: value for key, value in settings.items() if key != "conditions"}).items():
        if what := difference(redact(before.get(key, "neutral" if key == "sampling" else None)), value):
            raise SteeringError(
                f"{output} was measured with {key} {before.get(key)!r}, now it is {value!r}: {what}; give a new "
                "directory, or the settings of before"
            )
    return contenders


def _write(output: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json, table.md and the plots, each whole or not at all."""
    report.write(output, results, report.table(results))
    report.plots(results, output)
    return results
