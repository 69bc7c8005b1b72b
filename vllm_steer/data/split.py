"""Which rows are held out of training, and how a resumed run holds out the same ones.

About a twentieth of the rows, 1 to 64, are held out by whole prompts: all samples of a prompt lie on one side. The
choice depends on the prompts and their categories alone, not on the order of the file nor on the run's seed, so runs
on the same data hold out the same rows and can be compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import write_json

log = logging.getLogger(__name__)

SEED = 0
SHARE, MOST = 20, 64  # of one row in twenty, the maximum
FILE = "held_out.json"  # beside the checkpoints of a run


@dataclass(frozen=True)
class Row:
    """One sequence of token ids; the first `prompt_length` of them are the prompt."""

    ids: tuple[int, ...]
    prompt_length: int
    category: str | None = field(default=None, compare=False)
    number: int = field(default=0, compare=False)  # its place among the rows that were read

    @property
    def prompt(self) -> tuple[int, ...]:
        """The token ids that identify the row's prompt; a row without a prompt counts as a prompt of its own."""
        return self.ids[: self.prompt_length or None]


def split_rows(rows: Sequence[Row], seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, both in the order of `rows`; no prompt is in both.

    Prompts are put in order by category, at random within it, and taken at equal steps, so each category is held out in
    proportion. A prompt with more rows than shall be held out in all is taken only when every prompt has.
    Raises SteeringError when there are no two prompts to put on two sides.
    """
    by_prompt: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    if len(by_prompt) < 2:
        what = "one usable row" if len(rows) == 1 else f"{len(rows)} rows of one prompt"
        raise SteeringError(f"{what} cannot be split into training and validation: give at least two prompts")
    wanted = _wanted(rows)
    fitting = [group for group in by_prompt.values() if len(group) <= wanted] or [min(by_prompt.values(), key=len)]
    rng = random.Random(seed)
    fitting.sort(key=lambda group: (group[0].category or "", hashlib.sha256(_text(group[0].prompt, seed)).digest()))
    count = min(len(fitting), max(1, round(wanted * len(fitting) / sum(map(len, fitting)))))
    start = rng.random()
    held = {fitting[int((start + i) * len(fitting) / count)][0].prompt for i in range(count)}
    return [row for row in rows if row.prompt not in held], [row for row in rows if row.prompt in held]


def last_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The split of runs that kept no record of it: the last twentieth of the file is held out."""
    if len(rows) < 2:
        raise SteeringError("one usable row cannot be split into training and validation: give at least two")
    held = _wanted(rows)
    return list(rows[:-held]), list(rows[-held:])


def split_of_run(rows: Sequence[Row], checkpoints: Path) -> tuple[list[Row], list[Row]]:
    """The split that a run to be resumed began with; one without a record began with `last_rows`.

    Raises SteeringError when the record cannot be read, or rows that were held out are not in the data any more.
    """
    path = checkpoints / FILE
    if not path.exists():
        training, held = last_rows(rows)
        log.warning("the run to resume held out the last %d rows, as was done then: so does the rest of it", len(held))
        return training, held
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["held_out"]
        wanted = sorted(map(str, stored))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SteeringError(f"{path} is damaged ({error}): start the training again in a new directory") from None
    keys = set(wanted)
    held = [row for row in rows if _key(row) in keys]
    if sorted(map(_key, held)) != wanted:
        raise SteeringError(
            f"{len(wanted)} rows were held out when this run began, and the data now has {len(held)} of them: give the "
            "same --data and options to resume, or a new --output"
        )
    return [row for row in rows if _key(row) not in keys], held


def store(held_out: Sequence[Row], checkpoints: Path) -> None:
    """Write the split of a new run beside its checkpoints, for `split_of_run`."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(checkpoints / FILE, {"rule": "prompts", "seed": SEED, "held_out": [_key(row) for row in held_out]})


def describe(rows: Sequence[Row], held_out: Sequence[Row], name: str) -> str:
    """What was held out of the file `name`, for the record."""
    prompts, trained = {row.prompt for row in held_out}, {row.prompt for row in rows}
    if shared := len(prompts & trained):
        return f"last {len(held_out)} rows of {name}, {shared} of their {len(prompts)} prompts also trained on"
    return f"{len(held_out)} rows of {name}, all rows of {len(prompts)} prompts"


def check_control(control: str, held_out: str) -> None:
    """Warn if the control was trained with another split: it may have seen the rows it is measured on here."""
    places = [Path(control) / name for name in ("training.json", "record/config.json")]  # the second: block drafters
    try:
        record = json.loads(next(path for path in places if path.exists()).read_text(encoding="utf-8"))
        found = record["acceptance"]["data"]
    except (StopIteration, OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # trained elsewhere, or not at all
    if found != held_out:
        log.warning(
            "--control %s held out %s, this run %s: its training may have seen rows that both are measured on",
            control, found, held_out,
        )  # fmt: skip


def in_file_order(rows: Sequence[Row], held_out: Sequence[Row]) -> tuple[list[Row], list[int], list[int]]:
    """All rows in the order they were read, and where the training rows and the held-out ones are among them."""
    everything = sorted([*rows, *held_out], key=lambda row: row.number)
    places = {row.number: place for place, row in enumerate(everything)}
    return everything, [places[row.number] for row in rows], [places[row.number] for row in held_out]


def _wanted(rows: Sequence[Row]) -> int:
    return min(MOST, max(1, len(rows) // SHARE))


def _key(row: Row) -> str:
    return hashlib.sha256(_text(row.ids, row.prompt_length)).hexdigest()


def _text(*values: Any) -> bytes:
    return json.dumps(values).encode()
