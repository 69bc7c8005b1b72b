"""Training data: rows of a JSONL file as token ids with a known prompt length, padded into batches.

A line is one of (other keys, such as `generate` writes, are left alone; a "category" stratifies the held-out rows)
    {"prompt": TEXT or chat messages, "response": TEXT}     messages go through the tokenizer's chat template, with the
                                                            "tools" beside them
    {"text": TEXT}                                          no prompt: every token is a response
    {"prompt_ids": [...], "response_ids": [...]}            token ids, taken as they are
    {"request": {...}, "response": ...}                     an exchange of the OpenAI API, see gateway_log.py

Lines that cannot be used are left out, named and counted, as in prompt files (jsonl.py). Rows dropped or truncated by
the limits of a run (its length, the models' positions and vocabulary) are counted and reported; a run that keeps less
than half of the rows, or less than a tenth of the response tokens, is rejected.
"""

from __future__ import annotations

import hashlib
import logging
import reprlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.data import gateway_log
from vllm_steer.data.jsonl import LeftOut, check_prompt, check_text, check_tools, parse_line, read_lines
from vllm_steer.data.prompts import encode_prompt
from vllm_steer.data.split import Row, split_rows

__all__ = ["Row", "collate", "read_file", "read_rows", "sha256", "split_rows", "without_prompts"]

log = logging.getLogger(__name__)

FORMS = ({"prompt", "response"}, {"text"}, {"prompt_ids", "response_ids"})
ALLOWED = '{"prompt", "response"}, {"text"}, {"prompt_ids", "response_ids"} or {"request", "response"}'
LEAST_ROWS, LEAST_TOKENS = 1 / 2, 1 / 10  # share of rows and of response tokens that must remain


def read_rows(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    template: dict[str, Any] | None = None,
    positions: tuple[int, str] | None = None,
    embeddings: int | None = None,
) -> list[Row]:
    """`read_file` without its summary."""
    return read_file(path, tokenizer, max_length, template, positions, embeddings)[0]


def read_file(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    template: dict[str, Any] | None = None,
    positions: tuple[int, str] | None = None,
    embeddings: int | None = None,
    model: str | None = None,
) -> tuple[list[Row], str]:
    """Rows of a JSONL file cut to `max_length` tokens, and what was left out, in words ("" for nothing).

    Args:
        template: further variables of the chat template.
        positions: how many positions a model has, and its name; rows longer than that, once cut, are left out.
        embeddings: how many token ids the models have embeddings for, where a tokenizer may have more.
        model: of a gateway's log: the name the target was served under; answers of others are left out. None: of any.

    Left out and named are lines that are none of the forms above, or have ids outside the vocabulary of tokenizer or
    models; left out and counted are rows whose prompt leaves no room for a response, and rows beyond `positions`.
    Raises SteeringError when the file cannot be read, nothing is left, or too little (`LEAST_ROWS`, `LEAST_TOKENS`).
    """
    bad, limits = LeftOut(path), _Limits(path, max_length, positions)
    vocabulary = min(1 + max(tokenizer.get_vocab().values()), embeddings or sys.maxsize)
    rows: list[Row] = []
    for number, line in read_lines(path):
        try:
            row = limits.apply(_row(line, tokenizer, template, vocabulary, model))
        except gateway_log.NotAnswered as error:
            limits.skipped[str(error)] += 1
        except SteeringError as error:
            bad.add(path, number, error)
            limits.lost["ids outside the vocabulary"] += isinstance(error, _OutsideVocabulary)
        else:
            if row is not None:
                rows.append(replace(row, number=len(rows)))
    limits.kept = len(rows)
    bad.say(len(rows) + limits.lost.total() - limits.lost["ids outside the vocabulary"])
    limits.say()
    reasons = [f"{bad.count} lines left out, the first is {bad.first}"] if bad.count else []
    summary = "; ".join([*reasons, *limits.reasons()])
    if not rows:
        raise SteeringError(
            f"{path} has no row with a response within {max_length} tokens ({summary or 'it is empty'}): a line is "
            f"{ALLOWED}; raise --max-length for long prompts"
        )
    limits.require_enough(summary)
    return rows, summary


class _OutsideVocabulary(SteeringError):
    """Token ids that stand for no text: embeddings may be padded, and sampling may return an id of the padding."""


class _Limits:
    """Counts the rows and tokens lost to a run's maximum length and its models' positions."""

    def __init__(self, path: str | Path, length: int, positions: tuple[int, str] | None):
        self.path, self.length, self.positions = path, length, positions
        self.lost: Counter[str] = Counter()  # rows by reason
        self.skipped: Counter[str] = Counter()  # exchanges of a log that are nothing to train on, by reason
        self.kept = self.cut = 0  # rows
        self.cut_tokens = self.tokens = 0  # response tokens: cut off, and in all

    def apply(self, row: Row) -> Row | None:
        """The row truncated to the length, or None if nothing trainable is left."""
        if row.prompt_length >= len(row.ids):
            raise SteeringError("the response is empty")
        response, kept = len(row.ids) - row.prompt_length, min(len(row.ids), self.length) - row.prompt_length
        if kept <= 0:
            self.lost[f"prompts that leave no room for a response in {self.length} tokens (--max-length)"] += 1
            return None
        if self.positions and row.prompt_length + kept > self.positions[0]:
            count, whose = self.positions
            self.lost[f"longer than the {count} positions of {whose} (--max-length {count} would cut them)"] += 1
            return None
        self.tokens += response
        self.cut += kept < response
        self.cut_tokens += response - kept
        return replace(row, ids=row.ids[: self.length])

    def reasons(self) -> list[str]:
        """What was dropped and truncated, in words."""
        rows = self.kept + self.lost.total()
        found = [f"{count} of {rows} rows left out: {reason}" for reason, count in self.lost.items() if count]
        found += [f"{count} logged exchanges left out: {reason}" for reason, count in sorted(self.skipped.items())]
        if self.cut:
            share = f"{self.cut_tokens} of {self.tokens} response tokens"
            found.append(f"{self.cut} of {rows} rows cut to {self.length} tokens (--max-length), which takes {share}")
        return found

    def say(self) -> None:
        """Warn of every reason."""
        for reason in self.reasons():
            log.warning("%s: %s", self.path, reason)

    def require_enough(self, summary: str) -> None:
        """Raises SteeringError if too little is left to be intended."""
        rows = self.kept + self.lost.total()
        if self.kept < LEAST_ROWS * rows:
            raise SteeringError(
                f"only {self.kept} of the {rows} rows of {self.path} can be used, fewer than half: {summary}; change "
                "that, or leave those rows out of the file"
            )
        if self.tokens - self.cut_tokens < LEAST_TOKENS * self.tokens:
            raise SteeringError(
                f"--max-length {self.length} leaves {self.tokens - self.cut_tokens} of the {self.tokens} response "
                f"tokens of {self.path}, fewer than a tenth: raise it, or give shorter prompts"
            )


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


def without_prompts(rows: list[Row], others: list[Row]) -> list[Row]:
    """The rows whose prompt does not occur in `others`."""
    taken = {row.prompt for row in others}
    return [row for row in rows if row.prompt not in taken]


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _row(
    line: bytes, tokenizer: Any, template: dict[str, Any] | None, vocabulary: int, model: str | None = None
) -> Row:
    """A line's row, uncut. Raises SteeringError saying what is wrong with it."""
    raw = parse_line(line)
    if isinstance(raw, dict) and gateway_log.is_exchange(raw):
        raw = gateway_log.row(raw, model)
        template = (template or {}) | raw.pop("template", {})
    if not isinstance(raw, dict) or sum(form <= set(raw) for form in FORMS) != 1:
        found = reprlib.repr(sorted(raw)) if isinstance(raw, dict) else type(raw).__name__
        raise SteeringError(f"found {found}; a line is {ALLOWED}")
    if (category := raw.get("category")) is not None:
        check_text("category", category)
    if "text" in raw:
        check_text("text", raw["text"])
        prompt, response = [], tokenizer(raw["text"])["input_ids"]
    elif "prompt_ids" in raw:
        prompt, response = (_ids(raw[key], key) for key in ("prompt_ids", "response_ids"))
    else:
        tools = check_tools(raw)
        prompt = encode_prompt(tokenizer, check_prompt(raw["prompt"]), template, tools)
        check_text("response", raw["response"], blank=True)
        response = tokenizer(raw["response"], add_special_tokens=False)["input_ids"]
    for what, ids in (("prompt_ids", prompt), ("response_ids", response)):
        if outside := [i for i in ids if i >= vocabulary]:
            found = reprlib.repr(outside[0])
            raise _OutsideVocabulary(f"{what}: allowed are token ids from 0 to {vocabulary - 1}, found {found}")
    return Row((*prompt, *response), len(prompt), category)


def _ids(ids: Any, what: str) -> list[int]:
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        raise SteeringError(f"{what}: allowed is a list of token ids, found {reprlib.repr(ids)}")
    return ids
