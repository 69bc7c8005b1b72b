"""Prompt files and the built-in prompt sets; how a prompt becomes token ids.

A line is {"prompt": TEXT or chat messages} and may have "id" (default: "line-" and its number), "category" and "split"
(train, validation or test); other keys are ignored. A text is continued as it is, chat messages go through the model's
chat template.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError

log = logging.getLogger(__name__)

BUILTIN = ("chat", "code", "math", "summarise", "instructions")
FOLDER = Path(__file__).parent / "prompt_sets"
SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a text to continue, or chat messages ({"role", "content"}) to answer."""

    id: str
    prompt: str | list[dict[str, Any]]
    category: str | None = None


def is_builtin(source: str) -> bool:
    """Whether `source` names built-in sets rather than a file."""
    return source == "builtin" or source.startswith("builtin:")


def files(source: str) -> list[Path]:
    """The files behind a source: the file itself, or those of the built-in sets it names.

    Raises SteeringError for a built-in set that does not exist.
    """
    if not is_builtin(source):
        return [Path(source)]
    name = source.partition(":")[2]
    if name and name not in BUILTIN:
        allowed = ", ".join(f"builtin:{known}" for known in BUILTIN)
        raise SteeringError(f"{source} is not a built-in prompt set; there are {allowed}, and builtin for all of them")
    return [FOLDER / f"{known}.jsonl" for known in ([name] if name else BUILTIN)]


def read_prompts(source: str, split: str | None = None) -> list[Prompt]:
    """Prompts of a JSONL file or of `builtin[:NAME]`, in order; with `split`, only lines marked with it.

    A line that cannot be used is named in a warning and left out. Raises SteeringError when the file cannot be read or
    nothing is left.
    """
    if split not in (None, *SPLITS):
        raise SteeringError(f"split is {split!r}, allowed are {', '.join(SPLITS)}")
    found: dict[str, tuple[Prompt, str | None]] = {}
    bad = 0
    for path in files(source):
        category = path.stem if is_builtin(source) else None
        for number, line in _lines(path):
            try:
                prompt, mark = _parse(line, f"line-{number}", category)
                if prompt.id in found:
                    raise SteeringError(f"id {prompt.id!r} was used before")
            except SteeringError as error:
                bad += 1
                log.warning("%s, line %d left out: %s", path, number, error)
            else:
                found[prompt.id] = prompt, mark
    if bad:
        log.warning("%s: %d of %d lines left out", source, bad, bad + len(found))
    kept = [prompt for prompt, mark in found.values() if split in (None, mark)]
    if not kept:
        marked = f' with "split": "{split}"' if split and found else ""
        raise SteeringError(
            f'{source} has no usable line{marked}: a line is {{"prompt": TEXT or chat messages}}'
            + (f"; {bad} lines were left out, see above" if bad else "")
        )
    return kept


def encode_prompt(
    tokenizer: Any, prompt: str | list[dict[str, Any]], template: dict[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt: a text as the tokenizer takes it, messages through its chat template up to the answer.

    `template` has further variables for the template, like {"enable_thinking": False}.
    Raises SteeringError for messages that the template refuses.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    try:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **(template or {}))
    except Exception as error:  # jinja and transformers raise many types; all mean "not a chat this template takes"
        raise SteeringError(f"the chat template refused these messages ({error})") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers; undecoded, so that one in another encoding spoils no other."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SteeringError(f"cannot read {path}: {error.strerror}; give a JSONL file, or builtin") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse(line: bytes, default_id: str, category: str | None) -> tuple[Prompt, str | None]:
    """A line's prompt and split. Raises SteeringError saying what is wrong with it."""
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SteeringError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise SteeringError(f"not valid JSON ({error})") from None
    if not isinstance(raw, dict) or "prompt" not in raw:
        raise SteeringError('no object with the key "prompt"')
    prompt, name = raw["prompt"], default_id if raw.get("id") is None else raw["id"]
    if isinstance(prompt, list):
        _check_messages(prompt)
    else:
        _check_text("prompt", prompt)
    if type(name) is int:
        name = str(name)
    _check_text("id", name)
    if raw.get("category") is not None:
        _check_text("category", category := raw["category"])
    if raw.get("split") not in (None, *SPLITS):
        raise SteeringError(f"split is {raw['split']!r}, allowed are {', '.join(SPLITS)}")
    return Prompt(name, prompt, category), raw.get("split")


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise SteeringError("prompt has no messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise SteeringError(f"message {number} has no role; allowed are {', '.join(ROLES)}")
        if message["role"] not in ROLES:
            raise SteeringError(f"message {number} has role {message['role']!r}; allowed are {', '.join(ROLES)}")
        _check_text(f"content of message {number}", message.get("content"))
    if messages[-1]["role"] not in ("user", "tool"):
        raise SteeringError(f"the last message is the {messages[-1]['role']}'s: there is nothing to answer")


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise SteeringError(f"{what} is {type(text).__name__}, allowed is a string")
    if not text.strip():
        raise SteeringError(f"{what} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a character, "\ud83d"; tokenizers crash on it
        raise SteeringError(f"{what} has half a surrogate pair") from None
