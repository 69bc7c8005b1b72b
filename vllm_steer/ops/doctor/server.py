"""What `vllm-steer doctor --url` looks at: is it the server one means, does it steer, does steering still pay."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from vllm_steer.bench import remote
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.ops.doctor.findings import FAIL, OK, SKIPPED, WARNING, Case, Finding
from vllm_steer.serving.kill_switch import KILL_SWITCH
from vllm_steer.serving.telemetry.watchdog import LOW, recorded

ENOUGH_BLOCKS = 50
GAUGES = "vllm_steer:"


def server(case: Case) -> Iterable[Finding]:
    """It answers, and serves the target."""
    case.url = case.url.rstrip("/").removesuffix("/v1")
    try:
        case.served = json.loads(_get(f"{case.url}/v1/models"))["data"]
        names = [name for model in case.served for name in (model["id"], model.get("root")) if name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        case.served = None
        remedy = "give the address of a running vLLM server, e.g. http://localhost:8000; its key in OPENAI_API_KEY"
        yield Finding("server", FAIL, f"no models at {case.url}/v1/models ({error})", remedy)
        return
    wanted = case.target or (case.config.target.name if case.config else None)
    if wanted is None or Path(wanted).name in [Path(name).name for name in names]:
        yield Finding("server", OK, f"serves {', '.join(dict.fromkeys(names))}")
    else:
        seen = f"serves {', '.join(dict.fromkeys(names))}, the target is {wanted}"
        yield Finding("server", WARNING, seen, "check that it is the server you mean, or give its name with --target")


def is_steering(case: Case) -> Iterable[Finding]:
    """What the plugin in the server says of itself."""
    found = _gauges(case.url)
    if on := found.get("steering_on"):
        blocks, steered = (sum(found.get(name, [])) for name in ("blocks_total", "steered_blocks_total"))
        share = f"{steered / blocks:.1%} of {blocks:.0f} blocks steered" if blocks else "no block yet"
        norm = f"guide norm {max(found['guide_norm']):.3g}, " if "guide_norm" in found else ""
        if not all(on):
            remedy = f"set a scale other than 0, or start it without {KILL_SWITCH}; its log says more (vllm.steer)"
            yield Finding("steering", FAIL, f"off in {on.count(0)} of {len(on)} engines", remedy)
        elif steered == 0 and blocks >= ENOUGH_BLOCKS:
            yield Finding("steering", FAIL, f"on, but {share}", "read what the plugin says in its log (vllm.steer)")
        else:
            yield Finding("steering", OK, f"on: {norm}{share}")
    elif case.config is None:
        seen = "the server has no gauges of the plugin's, and no CHECKPOINT says that it should"
        yield Finding("steering", SKIPPED, seen)
    else:
        remedy = 'run `vllm-steer doctor` in its environment, and look for "steering is on" in its log'
        seen = f"no gauge {GAUGES}steering_on: the plugin is not loaded or switched off (or its workers are Ray's)"
        yield Finding("steering", FAIL, seen, remedy)


def acceptance(case: Case) -> Iterable[Finding]:
    """Accepted tokens per block, measured, against those recorded when the steering was trained."""
    counted, ours = remote.counters(case.url), _gauges(case.url)
    blocks, accepted = counted["drafts"], counted["accepted"]
    if "blocks_total" in ours:  # without vLLM's placeholder drafts
        blocks, accepted = (sum(ours.get(name, [])) for name in ("blocks_total", "accepted_tokens_total"))
    if blocks < ENOUGH_BLOCKS:
        seen = f"{blocks:.0f} blocks so far, too few to tell (at least {ENOUGH_BLOCKS}): send it some requests"
        yield Finding("acceptance", SKIPPED, seen)
        return
    found = accepted / blocks
    wanted = recorded_acceptance(case.config, len(counted["per_position"])) if case.config else None
    if wanted is None and (said := [value for value in ours.get("recorded_accepted_tokens", []) if value > 0]):
        wanted = min(said)  # greedy or sampled
    against = "nothing is recorded" if wanted is None else f"{1 + wanted:.3f} recorded"
    seen = f"acceptance length {1 + found:.3f} over {blocks:.0f} blocks, {against}"
    if found == 0:
        remedy = "the drafter gets no token right: check that target and drafter are the pair that was trained"
        yield Finding("acceptance", FAIL, seen, remedy)
    elif wanted is not None and found < LOW * wanted:
        remedy = "traffic unlike the training data? train on responses to prompts like these, or see the checks above"
        yield Finding("acceptance", WARNING, seen, remedy)
    else:
        yield Finding("acceptance", OK, seen)


def recorded_acceptance(config: SteeringConfig, drafts: int) -> float | None:
    """Accepted tokens per block of `drafts` as recorded at training, greedy or sampled, whichever is less; or None."""
    return min((by_drafts[drafts] for by_drafts in recorded(config.acceptance, drafts).values()), default=None)


def _gauges(url: str) -> dict[str, list[float]]:
    """The plugin's gauges by name without prefix: a value for each engine. Raises SteeringError without an answer."""
    found: dict[str, list[float]] = {}
    for sample in remote.metrics(url):
        if sample.name.startswith(GAUGES):
            found.setdefault(sample.name.removeprefix(GAUGES), []).append(sample.value)
    return found


def _get(url: str) -> str:
    key = os.environ.get("OPENAI_API_KEY")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()
