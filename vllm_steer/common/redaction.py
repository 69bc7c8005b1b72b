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
    r"(^|_)(token|key|api_?key|access_?key(_id)?|password|passwd|passphrase|secret|credentials?|authorization)$"
    r"|password$|secret$"
)
NO_SECRETS = re.compile(r"(^|_)(bos|eos|unk|pad|sep|cls|mask|image|additional_special)_token$")  # of a tokenizer
USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
# Inside other text a path needs two parts, and may not be the path of a URL or the second half of a hub id.
INNER_PATH = re.compile(r"(?<![\w.~:/-])~?/(?:[^\s/'\"=+,:;()\[\]{}]+/)+([^\s/'\"=+,:;()\[\]{}]*)")
WHOLE_PATH = re.compile(r"~?/[^\n]*|[A-Za-z]:\\[^\n]*")
COMMAND = re.compile(r"(vllm-steer|vllm|python\S*|torchrun) \S")


def is_secret(key: str) -> bool:
    """Whether the value of a key, an option or an environment variable must not be shown."""
    name = key.lstrip("-").replace("-", "_").rpartition(".")[2]
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # hfToken
    return SECRET.search(name) is not None and NO_SECRETS.search(name) is None


def redact(value: Any, *, paths: bool = False) -> Any:
    """JSON-able data as it may be published; with `paths`, paths stay. What needs no change is returned as it is."""
    if isinstance(value, dict):
        return {key: _masked(item) if is_secret(str(key)) else redact(item, paths=paths) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact(item, paths=paths) for item in value)
    return _text(value, paths) if isinstance(value, str) else value


def redact_words(words: list[str], *, paths: bool = False) -> list[str]:
    """A command's words as they may be published: `--key X`, `--key=X`, `--a.b-key X`, NAME=X and JSON."""
    shown, secret = [], False
    for word in words:
        name, equals, value = word.partition("=")
        option = word.startswith("-")
        named = bool(equals) and re.fullmatch(r"-{0,2}[\w.-]+", name) is not None
        if option or named:
            secret = is_secret(name)
            shown.append(word if not equals else f"{name}={MASK if secret else redact(value, paths=paths)}")
            secret = secret and option and not equals
        else:
            shown.append(MASK if secret else redact(word, paths=paths))  # an option may take several
    return shown


def _masked(value: Any) -> Any:
    return value if value is None or value == "" or isinstance(value, bool) else MASK


def _text(text: str, paths: bool) -> str:
    if text[:1] in ("{", "["):
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
    new = USER_INFO.sub(MASK, text)
    if new.startswith("file://") and not paths:
        new = new.removeprefix("file://")
    if not paths:
        new = _name(new) if WHOLE_PATH.fullmatch(new) else INNER_PATH.sub(lambda match: _name(match.group()), new)
    return text if new == text else new


def _name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name or path
