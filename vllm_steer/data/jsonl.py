"""The reader of JSONL: lines, texts and chats, under the same rules for every verb.

A line that cannot be used is left out, named in a warning and counted; the others are kept. A file is read as bytes
and split at line feeds only, so a line in another encoding spoils no other and U+2028 inside a string ends no line.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
NAMED = 100  # lines named in warnings, of one file; the rest is only counted


class LeftOut:
    """The lines of a source that cannot be used: the first ones are named in warnings, all are counted."""

    def __init__(self, source: str | Path):
        self.source, self.count, self.first = source, 0, ""

    def add(self, path: str | Path, number: int, reason: object) -> None:
        """Count line `number` of `path`, and say why it is left out."""
        self.count += 1
        self.first = self.first or f"line {number}: {reason}"
        if self.count <= NAMED:
            log.warning("%s, line %d left out: %s", path, number, reason)

    def say(self, kept: int) -> None:
        """Say how many lines were left out and how many are `kept`, if any was left out."""
        if self.count:
            log.warning("%s: %d of %d lines left out", self.source, self.count, self.count + kept)


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, undecoded, with their numbers from 1; a byte-order mark is skipped.

    Raises SteeringError when the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise SteeringError(f"cannot read {path}: {reason}; give a JSONL file") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def parse_line(line: bytes) -> Any:
    """The JSON value on a line. Raises SteeringError for anything else, and for a key given twice."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        raise SteeringError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise SteeringError(f"not valid JSON ({error})") from None


def check_text(what: str, text: Any, blank: bool = False) -> None:
    """Raises SteeringError unless `text` is whole Unicode, not empty and, unless `blank`, not of spaces only."""
    if not isinstance(text, str):
        raise SteeringError(f"{what} is {type(text).__name__}, allowed is a string")
    if not (text if blank else text.strip()):
        raise SteeringError(f"{what} is empty")
    check_surrogates(what, text)


def check_surrogates(what: str, text: str) -> None:
    """Raises SteeringError for half a character, which JSON can spell ("\\ud83d") and tokenizers crash on."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SteeringError(f"{what} has half a surrogate pair") from None


def check_prompt(prompt: Any) -> str | list[dict[str, Any]]:
    """The text or chat a model is to continue or answer, as chat templates take it.

    A message is {"role", "content": TEXT}; an assistant's message with "tool_calls" may have no content, which becomes
    "", and arguments that are JSON text become objects, as vLLM's server does.
    Raises SteeringError naming the message for anything else, and for a chat with nothing to answer.
    """
    if not isinstance(prompt, list):
        check_text("prompt", prompt)
        return prompt
    if not prompt:
        raise SteeringError("prompt has no messages")
    messages = [_message(message, number) for number, message in enumerate(prompt, start=1)]
    if messages[-1]["role"] not in ("user", "tool"):
        raise SteeringError(f"the last message is the {messages[-1]['role']}'s: there is nothing to answer")
    return messages


def check_tools(raw: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The "tools" of a line with a chat, None when it has none. Raises SteeringError for what no template can use."""
    tools = raw.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SteeringError(f"tools is {reprlib.repr(tools)}, allowed is a list of objects")
    if not isinstance(raw.get("prompt"), list):
        raise SteeringError("tools go with a prompt of chat messages, which the chat template joins with them")
    return tools


def _message(message: Any, number: int) -> dict[str, Any]:
    allowed = f"allowed are {', '.join(ROLES)}"
    if not isinstance(message, dict) or "role" not in message:
        raise SteeringError(f"message {number} has no role; {allowed}")
    role = message["role"]
    if role not in ROLES:
        raise SteeringError(f"message {number} has role {reprlib.repr(role)}; {allowed}")
    if not message.get("tool_calls"):
        if isinstance(message.get("content"), list):
            raise SteeringError(f"content of message {number} is a list of parts, allowed is a string: join its texts")
        check_text(f"content of message {number}", message.get("content"))
        return message
    if role != "assistant":
        raise SteeringError(f"message {number} has tool_calls and is the {role}'s: only the assistant calls tools")
    content = message.get("content")
    if content not in (None, ""):
        check_text(f"content of message {number}", content)
    calls = _tool_calls(message["tool_calls"], f"tool_calls of message {number}")
    return message | {"content": content or "", "tool_calls": calls}


def _tool_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    """OpenAI's tool calls with their arguments as objects."""
    try:
        found = []
        for call in calls:
            function = call["function"]
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = parse_line(arguments.encode("utf-8"))
            if not isinstance(arguments, dict):
                raise TypeError(type(arguments).__name__)
            check_text("name", function["name"])
            found.append(call | {"function": function | {"arguments": arguments}})
        return found
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError, SteeringError) as error:
        form = '[{"function": {"name": TEXT, "arguments": OBJECT or JSON text}}]'
        raise SteeringError(f"{what} cannot be used ({type(error).__name__}: {error}), allowed is {form}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
