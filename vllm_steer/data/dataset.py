"""Training data: rows of a JSONL file as token ids with a known prompt length, padded into batches.

A line is one of (other keys, such as `generate` writes, are left alone)
    {"prompt": TEXT or chat messages, "response": TEXT}     messages go through the tokenizer's chat template
    {"text": TEXT}                                          no prompt: every token is a response
    {"prompt_ids": [...], "response_ids": [...]}            token ids, taken as they are
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.prompts import encode_prompt

FORMS = ({"prompt", "response"}, {"text"}, {"prompt_ids", "response_ids"})
ALLOWED = '{"prompt", "response"}, {"text"} or {"prompt_ids", "response_ids"}'


@dataclass(frozen=True)
class Row:
    """One sequence of token ids; the first `prompt_length` of them are the prompt."""

    ids: tuple[int, ...]
    prompt_length: int


def read_rows(path: str | Path, tokenizer: Any, max_length: int) -> list[Row]:
    """Read a JSONL file, cutting rows to `max_length` tokens; rows left without a response are dropped.

    Raises SteeringError naming the line for anything that is not one of the forms above, and when no row is left.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SteeringError(f"cannot read {path}: {error.strerror}; give a JSONL file with lines {ALLOWED}") from None
    except UnicodeDecodeError as error:
        raise SteeringError(f"{path} is not UTF-8 ({error}): save it as UTF-8 JSONL") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line, f"{path}, line {number}", tokenizer)
        row = Row(row.ids[:max_length], row.prompt_length)
        if len(row.ids) > row.prompt_length:
            rows.append(row)
    if not rows:
        raise SteeringError(f"{path} has no row with a response within {max_length} tokens: raise --max-length")
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Right-pad rows: `input_ids` and `attention_mask` int64 [B, T], `prompt_lengths` int64 [B]."""
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "prompt_lengths": torch.tensor([row.prompt_length for row in rows]),
    }


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Training rows and validation rows: the last twentieth of the file, 1 to 64 rows, is held out."""
    if len(rows) < 2:
        raise SteeringError("one usable row cannot be split into training and validation: give at least two")
    held = min(64, max(1, len(rows) // 20))
    return rows[:-held], rows[-held:]


def without_prompts(rows: list[Row], others: list[Row]) -> list[Row]:
    """The rows whose prompt is no prompt of `others`."""
    taken = {row.ids[: row.prompt_length] for row in others if row.prompt_length}
    return [row for row in rows if row.ids[: row.prompt_length] not in taken]


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(line: str, where: str, tokenizer: Any) -> Row:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise SteeringError(f"{where}: not valid JSON ({error}); a line is {ALLOWED}") from None
    if not isinstance(raw, dict) or sum(form <= set(raw) for form in FORMS) != 1:
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise SteeringError(f"{where}: found {found}; a line is {ALLOWED}")
    if "text" in raw:
        return Row(tuple(_encode(raw["text"], f"{where}: text", tokenizer, special=True)), 0)
    if "prompt_ids" in raw:
        prompt, response = (_ids(raw[key], f"{where}: {key}", len(tokenizer)) for key in ("prompt_ids", "response_ids"))
    else:
        prompt = _prompt(raw["prompt"], where, tokenizer)
        response = _encode(raw["response"], f"{where}: response", tokenizer, special=False)
    return Row((*prompt, *response), len(prompt))


def _prompt(prompt: Any, where: str, tokenizer: Any) -> list[int]:
    if not isinstance(prompt, list):
        return _encode(prompt, f"{where}: prompt", tokenizer, special=True)
    try:
        return encode_prompt(tokenizer, prompt)
    except SteeringError as error:
        raise SteeringError(f"{where}: {error}") from error


def _encode(text: Any, what: str, tokenizer: Any, special: bool) -> list[int]:
    if not isinstance(text, str):
        raise SteeringError(f"{what} is {type(text).__name__}, allowed is a string")
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _ids(ids: Any, what: str, vocab_size: int) -> list[int]:
    if not isinstance(ids, list) or any(type(i) is not int or not 0 <= i < vocab_size for i in ids):
        raise SteeringError(f"{what}: allowed is a list of token ids from 0 to {vocab_size - 1}")
    return ids
