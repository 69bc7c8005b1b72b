"""Small things that several test files need: a valid config, a benchmark's result, an engine's config, a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_steer.common.identity import fingerprint
from vllm_steer.serving.telemetry.block_counter import Blocks, count


def valid_config(**changes: Any) -> dict[str, Any]:
    """A valid config as JSON gives it; a dotted key changes a nested value, the value `...` removes the key."""
    value: dict[str, Any] = {
        "target": {"name": "T", "hidden_size": 12, "num_hidden_layers": 8, "vocab_size": 50},
        "drafter": {
            "name": "D", "hidden_size": 6, "num_hidden_layers": 3, "intermediate_size": 10, "vocab_size": 50,
        },
        "target_layer_ids": [1, 4, 6],
        "steered_layers": [0, 2],
        "rank": 4,
        "draft_length": 5,
        "format_version": 1,
        "provenance": {"command": "vllm-steer train"},
        "acceptance": {"greedy": 3.2},
    }  # fmt: skip
    for dotted, new in changes.items():
        place, *rest = dotted.split("__")
        where = value[place] if rest else value
        key = rest[0] if rest else place
        where.pop(key) if new is ... else where.update({key: new})
    return value


def bench_of(directory: Path, path: Path, **own: Any) -> Path:
    """The results.json of a benchmark with one drafter, as `vllm-steer bench` writes it; `own` of its identity."""
    row = {"name": "steered", "prompts": 2, "blocks": 9, "acceptance_length": 2.5, "interval_95": [2.25, 2.75]}
    row |= {"acceptance_rates": [0.75, 0.5], "tokens_per_second": 10.0, "drafting_share": 0.25}
    identity = {"drafter": "x", "adapter": None, "steering_weights": None, **own}
    if not own:
        identity["steering_weights"] = fingerprint(directory / "steering")
    environment = {"vllm": "0.32.0", "torch": "2.13.0", "runner": "V1", "dtype": "float32", "eager": True}
    contender = {"name": "steered", "identity": identity, "steered": True, "peak_memory": [{"resident": 2**30}]}
    contender |= {"environment": environment | {"cores": 2, "cpu": "a processor"}}
    contender |= {"origin": {"versions": {"vllm-steer": "0.1.0"}, "date": "2026-11-22T00:00:00"}}
    settings = {"target": "target", "prompts": "p.jsonl", "number_of_prompts": 2, "max_tokens": 8, "batch": 1, "k": 2}
    summary = [{"temperature": 0.0, "rows": [row], "pairs": [], "categories": {}}]
    path.mkdir(parents=True)
    results = {"command": "vllm-steer bench", "settings": settings, "contenders": [contender], "summary": summary}
    (path / "results.json").write_text(json.dumps(results))
    return path


def engine_config(target: Path, drafter: Path | str | None, additional: Any = None, **keys: Any) -> Any:
    """What a server's start makes of its options, before any engine process."""
    from vllm.engine.arg_utils import EngineArgs

    spec = keys.pop("spec", {})
    if drafter is not None:
        spec = {"model": str(drafter), "num_speculative_tokens": 3} | spec
    return EngineArgs(
        model=str(target),
        speculative_config=spec or None,
        dtype="float32",
        max_model_len=256,
        additional_config=additional or {},
        **keys,
    ).create_engine_config()


def round_of(blocks: Blocks, ids: str, drafts: list[int] | None, start: list[int], accepted: list[int], on=True):
    """Tell `blocks` of a round as the injection does: windows from `start` on, drafts `accepted`."""
    out = np.zeros((2, len(ids)), dtype=np.int32)
    verified = blocks.begin([*ids], drafts, out, on)
    length = torch.tensor(accepted) + 1  # nothing rejected: a block's rows are its accepted drafts and the newest token
    count(verified, *torch.from_numpy(out), length, torch.zeros_like(length), torch.tensor(start) + length)
