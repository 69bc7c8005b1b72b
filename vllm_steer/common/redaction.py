"""What may be written or printed: secrets are masked and absolute paths cut to names, in one place for every record.

A key is secret if it ends in `_token`, `_key`, `password` or `secret`, or is one of a few others; `_tokens` are counts.
Its value is masked at any depth: in objects and lists, JSON inside text, command lines, and user-info of URLs.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import PurePosixPath
from typing import Any

MASK = "***"
SECRET = re.compile(
    r"(token|api_?keys?|access_?key(_id)?|passwords?|passwd|passphrase|secrets?|credentials?|authorization|bearer)$"
    r"|(^|_)(key|pass|pwd)$"
)
NO_SECRETS = re.compile(  # of a tokenizer, or a measure
    r"(^|_)(bos|eos|unk|pad|sep|cls|mask|image|audio|video|boi|eoi|eot|stop|additional_special|per)_token$"
)
USER_INFO = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
QUERY = re.compile(r"(?<=[?&;])([\w.-]+)=([^&#;\s'\"]+)")
NAMED = re.compile(
    r"(?<![\w.-])(['\"]?)([\w.-]{5,})\1(\s*[:=]\s*)(['\"]?)([^\s'\",;}&]+)"
)  # in text: hf_token=X, 'api_key': 'X'
BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
# Inside other text a path needs two parts, or an equals sign before it; the path of a URL and a hub id are none.
INNER_PATH = re.compile(
    r"(?<![\w.~/-])~?/(?:[^\s/'\"=+,:;()\[\]{}]+/)+([^\s/'\"=+,:;()\[\]{}]*)|(?<==)~?/[^\s/'\"=+,:;]+"
)
WHOLE_PATH = re.compile(r"~[\w-]*/[^\n]*|/[^\n]*|[A-Za-z]:[\\/][^\n]*|\\\\[^\n]*")
COMMAND = re.compile(r"(\w+=\S*\s+)*(\S*/)?(vllm-steer|vllm|python[\d.]*|torchrun)\s")


def is_secret(key: str) -> bool:
    """Whether the value of a key, an option or an environment variable must not be shown."""
    name = key.strip("-+").replace("-", "_").rpartition(".")[2]
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # hfToken
    return SECRET.search(name) is not None and NO_SECRETS.search(name) is None


def redact(value: Any, *, paths: bool = False) -> Any:
    """JSON-able data as it may be published; with `paths`, paths stay. What needs no change is returned as it is."""
    if isinstance(value, dict):
        return {
            redact(key, paths=paths): _masked(item) if is_secret(str(key)) else redact(item, paths=paths)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redact(item, paths=paths) for item in value)
    return _text(value, paths) if isinstance(value, str) else value


def redact_words(words: list[str], *, paths: bool = False) -> list[str]:
    """A command's words as they may be published: `--key X`, `--key=X`, `--a.b-key X`, NAME=X and JSON."""
    shown: list[str] = []
    expected = ""  # after a secret option: its "first" value, whatever that starts with, then "more" of them
    for word in words:
        name, equals, value = word.partition("=")
        if (expected == "first" and not word.startswith("--")) or (expected == "more" and not word.startswith("-")):
            shown.append(MASK)
            expected = "more"
        elif equals and re.fullmatch(r"-{0,2}[\w.-]+\+?", name):
            shown.append(f"{name}={MASK if is_secret(name) else redact(value, paths=paths)}")
            expected = ""
        else:
            expected = "first" if word.startswith("-") and is_secret(word) else ""
            shown.append(redact(word, paths=paths))
    return shown


def _masked(value: Any) -> Any:
    return value if value is None or value == "" or isinstance(value, bool) else MASK


def _text(text: str, paths: bool) -> str:
    if text.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            shown = redact(found, paths=paths)
            return text if shown == found else json.dumps(shown)
    if COMMAND.match(text):
        try:
            words = shlex.split(text)
        except ValueError:
            pass
        else:
            shown_words = redact_words(words, paths=paths)
            return text if shown_words == words else shlex.join(shown_words)
    new = BEARER.sub(rf"\1 {MASK}", USER_INFO.sub(MASK, text))
    new = QUERY.sub(lambda m: f"{m[1]}={MASK}" if is_secret(m[1]) else m[0], new)
    new = NAMED.sub(lambda m: m[0].removesuffix(m[5]) + MASK if is_secret(m[2]) else m[0], new)
    if not paths:
        new = new.replace("file:///", "/")
        new = _name(new) if WHOLE_PATH.fullmatch(new) else INNER_PATH.sub(lambda match: _name(match.group()), new)
    return text if new == text else new


def _name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name or path
