"""The settings a run was started with, stored beside its checkpoints; `--resume` compares them and rejects differences.

    run.json    every option that shapes the weights, models by identity and data by hash, whatever they are called

Options of FREE may change. `--steps` is one of them: the rest of the run follows the schedule of the new number.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import write_json
from vllm_steer.common.identity import difference, fingerprint
from vllm_steer.common.provenance import origin, public_name
from vllm_steer.data import split
from vllm_steer.data.dataset import Row, sha256
from vllm_steer.training.config import TrainConfig

log = logging.getLogger(__name__)

FILE, VERSION = "run.json", 1
FREE = {
    *("output", "resume", "steps", "save_every", "keep", "control", "cache", "report_to"),
    *("gradient_checkpointing", "ray", "workers"),  # the number of processes is compared as "processes"
}


def store(config: TrainConfig, checkpoints: Path) -> None:
    """Write the record of a new run."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    record = {"version": VERSION, "names": _names(config), "settings": _settings(config), "resumed": []}
    write_json(checkpoints / FILE, record)


def require_same(config: TrainConfig, checkpoint: Path) -> None:
    """Compare a run to be resumed from `checkpoint` with its record.

    Raises SteeringError naming the first option that differs, or a record that cannot be read.
    """
    path = checkpoint.parent / FILE
    names: dict[str, Any] = {}
    if path.exists():
        record = _read(path)
        before, names = record["settings"], record["names"]
    else:
        before = _of_old_run(checkpoint)
        log.warning(
            "%s was started by a version that kept no record of its options: only %s can be compared, give all others "
            "as they were",
            checkpoint.parent.parent, ", ".join(map(options.flag, before)),
        )  # fmt: skip
    now, known = _settings(config), path.exists()
    defaults = {field.name: field.default for field in dataclasses.fields(config)} if known else {}
    for key in sorted(before.keys() | defaults.keys() & now.keys()):
        recorded = before.get(key, defaults.get(key))  # an option newer than the run had its default value
        if difference(recorded, now.get(key)):
            was, given = names.get(key, recorded), _names(config).get(key, now.get(key))
            what = options.flag(key) if key in vars(config) else f"the number of {key}"
            if was == given:  # another model or file of the same name
                given = f"another of that name ({difference(recorded, now.get(key))})"
            raise SteeringError(
                f"{what} was {_shown(was)} when {checkpoint.parent.parent} was started, and is {_shown(given)} now: "
                "give the same to resume, or a new --output to start anew"
            )


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is whole: its trainer_state.json is what the Trainer writes last."""
    found = sorted((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in reversed(found):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed while it was written
            continue
        return path
    return None


def provenance(config: TrainConfig) -> dict[str, Any]:
    """How a checkpoint was made: the whole configuration, the data's hashes, versions, source commit, date (UTC)."""
    given = dataclasses.asdict(config)
    given |= {key: public_name(given[key]) for key in ("target", "drafter", "output", "cache", "control") if given[key]}
    given["data"] = [public_name(path) for path in config.data]
    return {
        "command": options.command("train", given),
        "identity": {name: fingerprint(model) for name in ("target", "drafter") if (model := getattr(config, name))},
        "data_sha256": {public_name(path): sha256(path) for path in config.data},
    } | origin("torch", "transformers")


def begin(config: TrainConfig, held_out: list[Row], checkpoints: Path, last: Path | None) -> None:
    """Keep what a run that begins was given, or note that one goes on from its checkpoint `last`."""
    if last is None:
        split.store(held_out, checkpoints)
        store(config, checkpoints)
    else:
        note_resume(config, last)


def note_resume(config: TrainConfig, checkpoint: Path) -> None:
    """Add to the record that the run was resumed from `checkpoint`."""
    path = checkpoint.parent / FILE
    if path.exists():
        record = _read(path)
        step, date = int(checkpoint.name.rpartition("-")[2]), datetime.now(UTC).isoformat(timespec="seconds")
        record["resumed"].append({"at_step": step, "steps": config.steps, "date": date})
        write_json(path, record)


def resumptions(checkpoints: Path) -> dict[str, Any]:
    """{"resumed": ...} for the provenance of a resumed run, else {}."""
    path = checkpoints / FILE
    found = _read(path)["resumed"] if path.exists() else []
    return {"resumed": found} if found else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] > VERSION:
            raise SteeringError(f"{path} is version {record['version']}, known is {VERSION}: upgrade vllm-steer")
        if not all(
            isinstance(record[key], kind) for key, kind in (("settings", dict), ("names", dict), ("resumed", list))
        ):
            raise ValueError("not what was written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, SteeringError):
            raise
        raise SteeringError(f"{path} is damaged ({error}): start the training again in a new directory") from None
    return record


def _settings(config: TrainConfig) -> dict[str, Any]:
    found = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    found = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    found |= {key: fingerprint(name) for key in ("target", "drafter") if (name := getattr(config, key))}
    found["data"] = [sha256(path) for path in config.data]
    found["chat_template_kwargs"] = config.template_options
    found["processes"] = config.workers if config.ray else int(os.environ.get("WORLD_SIZE", 1))
    return found


def _names(config: TrainConfig) -> dict[str, Any]:
    """The names of models and files, for error messages."""
    names: dict[str, Any] = {key: public_name(name) for key in ("target", "drafter") if (name := getattr(config, key))}
    return names | {"data": [public_name(path) for path in config.data]}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _of_old_run(checkpoint: Path) -> dict[str, Any]:
    """The options that a checkpoint itself records."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        optimizer = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
        parts = [name for name in ("steering", "drafter") if any(key.startswith(f"{name}.") for key in shapes)]
        rates = [group["initial_lr"] for group in optimizer["param_groups"]]
        found = {"batch_size": state["train_batch_size"]}
        found["mode"] = "joint" if len(parts) == 2 else {"steering": "steer", "drafter": "distill"}[parts[0]]
        found |= dict(zip([{"steering": "lr", "drafter": "drafter_lr"}[part] for part in parts], rates, strict=True))
        if "steering" in parts:
            found["rank"] = next(
                (shape[0] for key, shape in shapes.items() if key.endswith("project.down.weight")), None
            )
        return found
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise SteeringError(f"{checkpoint} is damaged ({error}): delete it to resume from the one before") from None
