"""Prompt files and the built-in prompt sets; how a prompt becomes token ids.

A line is {"prompt": TEXT or chat messages} and may have "id" (default: "line-" and its number), "category", "split"
(train, validation or test) and, beside messages, "tools"; for `bench` to judge answers by, "answer", a number, or
"entry_point" and "test", a function and Python that defines `check(function)`. Other keys are ignored. A text is
continued as it is, chat messages and tools go through the model's chat template. The rules for texts and chats are in
jsonl.py.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.jsonl import (
    LeftOut,
    check_prompt,
    check_surrogates,
    check_text,
    check_tools,
    parse_line,
    read_lines,
)

BUILTIN = ("chat", "code", "math", "summarise", "instructions")
FOLDER = Path(__file__).parent / "prompt_sets"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a text to continue, or chat messages ({"role", "content"}) to answer."""

    id: str
    prompt: str | list[dict[str, Any]]
    category: str | None = None
    tools: list[dict[str, Any]] | None = None  # descriptions for the chat template
    expected: dict[str, str] | None = None  # what a right answer is: {"answer"} or {"entry_point", "test"}

    def to_dict(self) -> dict[str, Any]:
        """The fields; `tools` only if there are any, as before there could be, and never what is expected."""
        left_out = {"expected"} if self.tools else {"expected", "tools"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}


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
    left_out = LeftOut(source)
    for path in files(source):
        category = path.stem if is_builtin(source) else None
        for number, line in read_lines(path):
            try:
                prompt, mark = _parse(line, f"line-{number}", category)
                if prompt.id in found:
                    raise SteeringError(f"id {prompt.id!r} was used before")
            except SteeringError as error:
                left_out.add(path, number, error)
            else:
                found[prompt.id] = prompt, mark
    left_out.say(len(found))
    kept = [prompt for prompt, mark in found.values() if split in (None, mark)]
    if not kept:
        marked = f' with "split": "{split}"' if split and found else ""
        raise SteeringError(
            f'{source} has no usable line{marked}: a line is {{"prompt": TEXT or chat messages}}'
            + (f"; {left_out.count} lines were left out, see above" if left_out.count else "")
        )
    return kept


def encode_prompt(
    tokenizer: Any,
    prompt: str | list[dict[str, Any]],
    template: dict[str, Any] | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a prompt: a text as the tokenizer takes it, messages through its chat template up to the answer.

    `template` has further variables for the template, like {"enable_thinking": False}; `tools` are described to it.
    Raises SteeringError for messages that the template refuses, and for tools that it ignores.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if getattr(tokenizer, "chat_template", "") is None:
        raise SteeringError("the model has no chat template: give prompts of plain text, or an instruction-tuned model")
    variables = dict(template or {})
    if tools and "tools" in variables:
        raise SteeringError("the line and the chat template's variables both have tools: give one of them")
    text = _render(tokenizer, prompt, variables | ({"tools": tools} if tools else {}))
    if tools and text == _render(tokenizer, prompt, variables):
        raise SteeringError("the chat template ignores tools: leave them out, or give a model that uses them")
    check_surrogates("the chat", text)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer: Any, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    except Exception as error:  # jinja and transformers raise many types; all mean "not a chat this template takes"
        raise SteeringError(f"the chat template refused these messages ({error})") from error


def _parse(line: bytes, default_id: str, category: str | None) -> tuple[Prompt, str | None]:
    """A line's prompt and split. Raises SteeringError saying what is wrong with it."""
    raw = parse_line(line)
    if not isinstance(raw, dict) or "prompt" not in raw:
        raise SteeringError('no object with the key "prompt"')
    prompt, tools = check_prompt(raw["prompt"]), check_tools(raw)
    name = default_id if raw.get("id") is None else raw["id"]
    if type(name) is int:
        name = str(name)
    check_text("id", name)
    if raw.get("category") is not None:
        check_text("category", category := raw["category"])
    if raw.get("split") not in (None, *SPLITS):
        raise SteeringError(f"split is {reprlib.repr(raw['split'])}, allowed are {', '.join(SPLITS)}")
    return Prompt(name, prompt, category, tools, _expected(raw)), raw.get("split")


def _expected(raw: dict[str, Any]) -> dict[str, str] | None:
    """What a prompt's line says about a right answer, None for nothing that can be compared: an answer is a number."""
    answer = raw.get("answer")
    if isinstance(answer, str) and any(map(str.isdecimal, answer)):
        return {"answer": answer}
    if all(isinstance(raw.get(key), str) for key in ("entry_point", "test")):
        return {key: raw[key] for key in ("entry_point", "test")}
    return None
