"""Another steering for a running engine, between two rounds: the same checks as at start, every worker or none.

What may be loaded lies below one directory, which the server was told at start (`additional-config`, `vllm_steer`:
`adapters`), and is asked for by its name there. INITIAL is what the server started with.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import difference, fingerprint
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.serving.injection import INITIAL, Injection
from vllm_steer.serving.plan import Options

logger = logging.getLogger("vllm.steer")

SAME = ("target_layer_ids", "steered_layers", "rank")  # beside the sizes of target and drafter


def swap(injection: Injection, vllm_config: Any, name: object) -> str | None:
    """Take over the adapter called `name` on this worker, if all workers of the engine can. Returns why not, or None.

    Every worker calls this at the same step. Until they have agreed, and if they do not, the old steering serves.
    """
    try:
        staged, error = injection.place(_load(injection, vllm_config, name)), None
    except Exception as found:  # whatever is wrong with a file; what a worker raises would end its engine
        staged, error = None, str(found) if isinstance(found, SteeringError) else f"{type(found).__name__}: {found}"
    if not _all_agree(staged is not None):
        return error or "another worker of this engine refused the adapter: its own answer says why"
    assert staged is not None
    before = injection.adapter
    injection.take(staged, str(name))
    logger.warning("the steering changes from %s to %s, on request", before, name)
    return None


def _load(injection: Injection, vllm_config: Any, name: object) -> Steering:
    """The adapter, checked. Raises SteeringError for one that may not be loaded, is damaged, or does not fit."""
    if name == INITIAL:
        steering = checkpoint.load_steering(injection.plan.source, injection.plan.revision)
        _require_same_form(steering.config, injection.config, INITIAL)
        return steering
    path = find(Options.read(vllm_config.additional_config).adapters, name)
    steering = checkpoint.load(path)
    _require_same_form(steering.config, injection.config, str(name))
    _require_same_models(path, steering.config, injection.config, vllm_config.speculative_config.draft_model_config)
    return steering


def find(root: str | None, name: object) -> Path:
    """The directory of an adapter by its name below `root`. Raises SteeringError for a name that leads elsewhere."""
    if root is None:
        raise SteeringError(
            "this server was not told where adapters lie: start it with --additional-config "
            '\'{"vllm_steer": {"adapters": DIR}}\''
        )
    if not isinstance(name, str) or not name:
        raise SteeringError(f"adapter is {name!r}, allowed is the name of a directory below {root}, or {INITIAL!r}")
    home = Path(root).resolve()
    try:
        path = (home / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise SteeringError(f"adapter {name!r} is not a usable name ({error})") from None
    if path == home or not path.is_relative_to(home):
        raise SteeringError(f"adapter {name!r} leads out of {root}: only what lies below it may be loaded")
    if not path.is_dir():
        known = [
            each.name for each in sorted(home.glob("*")) if checkpoint.has_steering(each) and not each.is_symlink()
        ]
        raise SteeringError(f"there is no adapter {name!r} in {root}; there are {', '.join(known) or 'none'}")
    return path


def _require_same_form(new: SteeringConfig, old: SteeringConfig, name: str) -> None:
    sizes = {
        f"{role}.{key}": (value, getattr(getattr(old, role), key))
        for role in ("target", "drafter")
        for key, value in dataclasses.asdict(getattr(new, role)).items()
        if key != "name"
    }
    for key, (found, wanted) in (sizes | {key: (getattr(new, key), getattr(old, key)) for key in SAME}).items():
        if found != wanted:
            raise SteeringError(f"adapter {name!r} has {key} {found}, the running one {wanted}: it needs a restart")


def _require_same_models(path: Path, new: SteeringConfig, old: SteeringConfig, draft: Any) -> None:
    """Refuse a steering that was trained for another target or another drafter, where that is on record."""
    identity, running = (config.provenance.get("identity") or {} for config in (new, old))
    if None not in (identity.get("target"), running.get("target")) and identity["target"] != running["target"]:
        raise SteeringError(f"adapter {path.name!r} was trained for another target than the running one")
    running_drafter = fingerprint(draft.model, draft.revision)
    if checkpoint.has_drafter(path):  # its steering belongs to the drafter beside it; configs differ in our marker
        same = str(fingerprint(path)).split(":")[1] == running_drafter.split(":")[1]
        what = None if same else "the weights differ"
    elif (recorded := identity.get("drafter")) is not None:
        what = difference(recorded, running_drafter)
    else:
        logger.warning("adapter %s does not record the drafter it was trained for: only sizes were compared", path.name)
        return
    if what:
        raise SteeringError(
            f"adapter {path.name!r} was trained for another drafter than the running {draft.model}: {what}"
        )


def _all_agree(ready: bool) -> bool:
    """Whether every tensor-parallel worker of the engine is ready; each asks at the same time."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return ready
    flag = torch.tensor([int(ready)])
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(flag.item())
