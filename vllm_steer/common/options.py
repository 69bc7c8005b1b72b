"""A verb's options as the fields of one frozen dataclass: default and help stand beside the field, nowhere else."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.redaction import redact

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def option(default: Any, text: str, **how: Any) -> Any:
    """A field and its option; `dataclasses.MISSING` as default makes it required, `how` goes to `add_argument`."""
    return dataclasses.field(default=default, metadata={"help": text, **how})


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """One `--option` per field of a dataclass; a field that is False by default becomes a switch."""
    for item in dataclasses.fields(config):
        how = dict(item.metadata)
        if item.default is dataclasses.MISSING:
            how["required"] = True
        elif isinstance(item.default, bool):
            how["action"] = "store_true"
        else:
            how.setdefault("type", str if item.default in (None, ()) else type(item.default))
            how["default"] = item.default
            how["help"] += "" if item.default in (None, ()) else f" (default: {item.default})"
        parser.add_argument(flag(item.name), **how)


def from_arguments(config: type[Config], args: argparse.Namespace) -> Config:
    """The dataclass from what argparse read."""
    values = {item.name: getattr(args, item.name) for item in dataclasses.fields(config)}
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def flag(name: str) -> str:
    """A field's name as it is typed: max_tokens is --max-tokens."""
    return "--" + name.replace("_", "-")


def json_object(name: str, text: str) -> dict[str, Any]:
    """The value of an option that takes a JSON object. Raises SteeringError for anything else."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SteeringError(f"{flag(name)} is not valid JSON ({error}): give an object, '{{\"key\": value}}'") from None
    if not isinstance(found, dict):
        raise SteeringError(f"{flag(name)} is {text}, allowed is a JSON object, '{{\"key\": value}}'")
    return found


def command(verb: str, values: dict[str, Any]) -> str:
    """The command line that gives these values, for the record, redacted; None and False are left out."""
    values = redact(values)
    words = ["vllm-steer", verb]
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(flag(name))
        if value is not True:
            words += map(str, value) if isinstance(value, (tuple, list)) else [str(value)]
    return shlex.join(words)
