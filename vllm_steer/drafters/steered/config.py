"""`steering/config.json`, checked strictly: which target and drafter a steering module fits, and how it is built."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError, require_positive_int
from vllm_steer.drafters.models import DrafterShape, TargetShape, drafter_shape, target_shape

FORMAT_VERSION = 1
NUM_STATES = 3  # low, mid and high target layer (paper, section 3)


@dataclass(frozen=True)
class SteeringConfig:
    """One steering module. Sizes are counts; layer ids are 0-based and mean "the input of decoder layer i"."""

    target: TargetShape
    drafter: DrafterShape
    target_layer_ids: tuple[int, ...]  # three, distinct, ascending
    steered_layers: tuple[int, ...]  # drafter layers that receive a delta, ascending
    rank: int | None = None  # None: full-rank projection; r: H -> r -> L*F
    draft_length: int | None = None  # k it was trained for; None when unknown
    format_version: int = FORMAT_VERSION
    provenance: dict[str, Any] = field(default_factory=dict)  # command, versions, data: how it was made
    acceptance: dict[str, Any] = field(default_factory=dict)  # measured when trained; empty: not measured

    def __post_init__(self) -> None:
        _require_known("steering format", self.format_version)
        for shape in (self.target, self.drafter):
            for key, value in dataclasses.asdict(shape).items():
                if key != "name":
                    require_positive_int(f"{type(shape).__name__}.{key}", value)
        layers = self.target.num_hidden_layers
        _require_ids("target_layer_ids", self.target_layer_ids, layers)
        if len(self.target_layer_ids) != NUM_STATES:
            raise SteeringError(
                f"target_layer_ids {list(self.target_layer_ids)}: exactly {NUM_STATES} target layers are fused; "
                f"give {NUM_STATES} distinct ascending ids from 0 to {layers - 1}"
            )
        _require_ids("steered_layers", self.steered_layers, self.drafter.num_hidden_layers)
        if not self.steered_layers:
            raise SteeringError("steered_layers is empty: name at least one drafter layer to steer")
        if self.rank is not None:
            require_positive_int("rank", self.rank)
        if self.draft_length is not None:
            require_positive_int("draft_length", self.draft_length)

    @property
    def rank_text(self) -> str:
        """The rank in words."""
        return "full rank" if self.rank is None else f"rank {self.rank}"

    @property
    def num_steered(self) -> int:
        """L: how many drafter layers receive a delta."""
        return len(self.steered_layers)

    @property
    def projection_size(self) -> int:
        """L * F: width of the projection's output."""
        return self.num_steered * self.drafter.intermediate_size

    @classmethod
    def for_models(
        cls, target: Any, drafter: Any, names: tuple[str, str] = ("target", "drafter"), **options: Any
    ) -> SteeringConfig:
        """Build from two transformers configs. Defaults: three spread target layers, every drafter layer.

        Raises SteeringError for models without the sizes steering needs, or options that do not fit them.
        """
        shapes = target_shape(names[0], target), drafter_shape(names[1], drafter)
        given = {key: value for key, value in options.items() if value is not None}
        if "target_layer_ids" not in given:
            given["target_layer_ids"] = default_target_layers(shapes[0].num_hidden_layers)
        return cls(*shapes, **({"steered_layers": tuple(range(shapes[1].num_hidden_layers))} | given))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "steering/config.json") -> SteeringConfig:
        """Build from parsed JSON. Raises SteeringError on unknown, missing or ill-typed keys.

        The format version is looked at first: a newer format may have keys this version does not know.
        """
        if not isinstance(raw, dict):
            raise SteeringError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        _require_known(f"{where}: format", raw.get("format_version", FORMAT_VERSION))  # before its unknown keys
        raw = dict(raw)
        _check_keys(cls, raw, where)
        raw["target"] = _build(TargetShape, raw["target"], f"{where}: target")
        raw["drafter"] = _build(DrafterShape, raw["drafter"], f"{where}: drafter")
        for key in ("target_layer_ids", "steered_layers"):
            if not isinstance(raw[key], (list, tuple)):
                raise SteeringError(f"{where}: {key} is {raw[key]!r}, allowed is a list of layer ids")
            raw[key] = tuple(raw[key])
        for key in ("provenance", "acceptance"):
            if not isinstance(raw.get(key, {}), dict):
                raise SteeringError(f"{where}: {key} is {raw[key]!r}, allowed is an object")
        raw["acceptance"] = _with_new_names(raw.get("acceptance", {}))
        try:
            return cls(**raw)
        except SteeringError as error:
            raise SteeringError(f"{where}: {error}") from None

    @classmethod
    def read(cls, path: Path) -> SteeringConfig:
        """Read `steering/config.json`. Raises SteeringError if it is absent, not JSON, or not valid."""
        try:
            config = cls.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
            config.to_dict()  # nested too deeply to be copied: reported now rather than when it is saved again
        except SteeringError:
            raise
        except OSError as error:
            raise SteeringError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 4,300 digits
            raise SteeringError(f"{path} is not valid JSON ({error}): copy the file again from its source") from None
        return config


def _require_known(name: str, version: Any) -> None:
    require_positive_int(f"{name}_version", version)
    if version > FORMAT_VERSION:
        raise SteeringError(
            f"{name} version {version} is newer than this vllm-steer reads (at most {FORMAT_VERSION}): upgrade "
            "vllm-steer"
        )


NEW_NAMES = {"greedy": "agreement", "block_efficiency": "acceptance_length"}  # in what 0.1.0 recorded


def _with_new_names(acceptance: dict[str, Any]) -> dict[str, Any]:
    """Recorded acceptance, the keys of each measurement ("untrained", "trained", "control") as they are written now."""
    return {
        when: {NEW_NAMES.get(key, key): value for key, value in found.items()} if isinstance(found, dict) else found
        for when, found in acceptance.items()
    }


def default_target_layers(num_hidden_layers: int) -> tuple[int, int, int]:
    """Low, mid and high layer ids when none are given: 2, middle, third from the end (as EAGLE-3 picks them)."""
    if num_hidden_layers < NUM_STATES:
        raise SteeringError(f"a target of {num_hidden_layers} layers cannot give {NUM_STATES} distinct states")
    if num_hidden_layers < 7:
        return (num_hidden_layers - 3, num_hidden_layers - 2, num_hidden_layers - 1)
    return (2, num_hidden_layers // 2, num_hidden_layers - 3)


def check_pair(config: SteeringConfig, target: Any, drafter: Any) -> None:
    """Check a steering against the transformers configs of the models it is about to run with (None: not checked).

    Raises SteeringError naming the first value that differs.
    """
    if target is not None:
        _compare("target", config.target, target_shape(config.target.name, target))
    if drafter is not None:
        _compare("drafter", config.drafter, drafter_shape(config.drafter.name, drafter))


def _compare(role: str, wanted: TargetShape | DrafterShape, found: TargetShape | DrafterShape) -> None:
    for key, want in dataclasses.asdict(wanted).items():
        have = getattr(found, key)
        if have != want:
            raise SteeringError(
                f"this {role} has {key}={have}, the steering was trained for {key}={want} "
                f"({role} {wanted.name!r}): serve it with that {role}, or train a steering for this one"
            )


def _require_ids(name: str, ids: tuple[int, ...], count: int) -> None:
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count for i in ids):
        raise SteeringError(
            f"{name} {list(ids)}: allowed are ids from 0 to {count - 1} (id i is the input of decoder layer i)"
        )
    if list(ids) != sorted(set(ids)):
        raise SteeringError(f"{name} {list(ids)}: ids must be distinct and ascending, e.g. {sorted(set(ids))}")


def _check_keys(cls: type, raw: dict[str, Any], where: str) -> None:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(raw) - set(known))
    if unknown:
        raise SteeringError(f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    required = {
        n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(raw))
    if missing:
        raise SteeringError(f"{where}: key {missing[0]!r} is missing; needed are {', '.join(sorted(required))}")


def _build(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise SteeringError(f"{where} is {raw!r}, allowed is an object")
    _check_keys(cls, raw, where)
    name = raw["name"]  # it is printed: no lone surrogates, no control codes of a terminal
    if not isinstance(name, str) or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise SteeringError(f"{where}.name is {name!r}, allowed is a string without control characters")
    return cls(**raw)
