"""`vllm-steer bench --url`: acceptance of a running server, by its own counters.

The server is queried through its OpenAI-compatible API, and its own counters are read. They include placeholder drafts
(after a preemption or a full prefix hit) and the requests of every other client.
"""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.prompts import Prompt

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
NEUTRAL = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL_EXTRA = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # vLLM's own parameters
KEY = "OPENAI_API_KEY"
NOTE = """\
From the server's own counters, before and after: they include vLLM's placeholder drafts (after a preemption or a full
prefix hit), blocks cut by the length limit, and the requests of other clients during the measurement. No confidence
intervals are computed. Tokens per second include prefill and the network. For counted blocks measure with --target.
"""


def measure(
    url: str,
    model: str | None,
    prompts: list[Prompt],
    *,
    max_tokens: int,
    temperatures: tuple[float, ...],
    batch: int,
    seed: int,
    template: dict[str, Any] | None = None,
    sampling: str = "neutral",
) -> tuple[str, list[dict[str, Any]]]:
    """Send every prompt at every temperature, `batch` at a time; prompt i with seed + i.

    `template` has variables for the server's chat template. With `sampling` "served" the server applies what it takes
    from the model's generation_config; "neutral" overrides that.

    Returns the served model (the first one when `model` is None) and parts like those of summary.summarise. Raises
    SteeringError when the server does not answer, does not speculate, or refuses every prompt.
    """
    from openai import OpenAI

    url = url.rstrip("/").removesuffix("/v1")
    counters(url)  # reachable, and speculating
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get(KEY, "none"), timeout=600, max_retries=0)
    model = model or _first_model(client)
    asked: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    more: dict[str, Any] = dict(NEUTRAL_EXTRA) if sampling == "neutral" else {}
    more |= {"chat_template_kwargs": template} if template else {}
    asked |= (NEUTRAL if sampling == "neutral" else {}) | ({"extra_body": more} if more else {})
    return model, [_measure(client, url, prompts, batch, seed, asked | {"temperature": t}) for t in temperatures]


def metrics(url: str) -> Iterator[Any]:
    """What a server publishes at /metrics: prometheus_client's samples, with `name`, `labels` and `value`.

    Sends the key in OPENAI_API_KEY, if one is set. Raises SteeringError when nobody answers.
    """
    from prometheus_client.parser import text_string_to_metric_families

    key = os.environ.get(KEY)
    try:
        request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:
        raise SteeringError(
            f"cannot read {url}/metrics ({error}): give the address of a running vLLM server, e.g. http://localhost:8000"
        ) from None
    for family in text_string_to_metric_families(text):
        yield from family.samples


def counters(url: str) -> dict[str, Any]:
    """Speculation so far: {"drafts", "drafted", "accepted": int, "per_position": [int, ...]}, of all engines together.

    Raises SteeringError when nobody answers, or the answer has no such counters.
    """
    found: dict[str, Any] = {}
    places: dict[int, int] = {}
    keys = {f"{name}_total": key for key, name in COUNTERS.items()}
    for sample in metrics(url):
        if sample.name in keys:
            key = keys[sample.name]
            found[key] = found.get(key, 0) + int(sample.value)
        elif sample.name == f"{PER_POSITION}_total":
            place = int(sample.labels["position"])
            places[place] = places.get(place, 0) + int(sample.value)
    if missing := [name for name, key in keys.items() if key not in found]:
        raise SteeringError(
            f"{url}/metrics has no {missing[0]}: the server does not speculate, or is not vLLM; start it with "
            "--speculative-config, and without --disable-log-stats"
        )
    return found | {"per_position": [places[i] for i in sorted(places)]}


def _first_model(client: Any) -> str:
    from openai import APIStatusError, OpenAIError

    try:
        return client.models.list().data[0].id
    except APIStatusError as error:
        raise _key_or(error, f"the server does not say which models it has ({error}): give --model") from None
    except (OpenAIError, IndexError) as error:
        raise SteeringError(f"the server does not say which models it has ({error}): give --model") from None


def _key_or(error: Any, otherwise: str) -> SteeringError:
    """The message for a rejected request; says so if the server wants an API key."""
    if error.status_code not in (401, 403):
        return SteeringError(otherwise)
    given = f"the one in {KEY} is not accepted" if os.environ.get(KEY) else f"none is set: set {KEY}"
    return SteeringError(f"the server asks for a key (HTTP {error.status_code}), and {given}")


def _measure(
    client: Any, url: str, prompts: list[Prompt], batch: int, seed: int, asked: dict[str, Any]
) -> dict[str, Any]:
    from tqdm import tqdm

    before, start = counters(url), time.perf_counter()
    tokens, refused = 0, {}
    with ThreadPoolExecutor(batch) as pool, tqdm(total=len(prompts), desc=f"T={asked['temperature']:g}") as bar:
        answers = [pool.submit(_ask, client, prompt, asked | {"seed": seed + i}) for i, prompt in enumerate(prompts)]
        for prompt, answer in zip(prompts, answers, strict=True):
            found = answer.result()
            bar.update()
            if isinstance(found, str):
                refused[prompt.id] = found
            else:
                tokens += found
    seconds, after = time.perf_counter() - start, counters(url)
    if len(refused) == len(prompts):
        raise SteeringError(f"the server refused every prompt: {next(iter(refused.values()))}")
    drafts, accepted = (after[key] - before[key] for key in ("drafts", "accepted"))
    at = [b - a for a, b in zip(before["per_position"], after["per_position"], strict=True)]
    row = {
        "name": asked["model"],
        "prompts": len(prompts) - len(refused),
        "blocks": drafts,
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "interval_95": None,
        "acceptance_rates": [n / drafts if drafts else None for n in at],
        "tokens_per_second": tokens / seconds,
    }
    common = {"temperature": asked["temperature"], "pairs": [], "categories": {}}
    return common | {"rows": [row], "refused_prompts": refused}


def _ask(client: Any, prompt: Prompt, asked: dict[str, Any]) -> int | str:
    """New tokens of one answer, or why the prompt was rejected. Raises SteeringError if the server stops answering."""
    from openai import APIConnectionError, APIStatusError

    try:
        if isinstance(prompt.prompt, str):
            answer = client.completions.create(prompt=prompt.prompt, **asked)
        else:
            # "none" keeps the tools in the prompt and asks for text, which needs no tool parser in the server.
            tools = {"tools": prompt.tools, "tool_choice": "none"} if prompt.tools else {}
            answer = client.chat.completions.create(messages=prompt.prompt, **tools, **asked)
    except APIConnectionError as error:  # also when it does not answer in time
        raise SteeringError(f"the server stopped answering at prompt {prompt.id!r} ({error})") from None
    except APIStatusError as error:
        if error.status_code in (401, 403):
            raise _key_or(error, "") from None
        return f"{error.status_code}: {error.message}"
    return answer.usage.completion_tokens
