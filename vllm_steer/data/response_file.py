"""The file `vllm-steer generate` writes: rows of JSON, appended one by one, and the sidecar that says how it was made.

A row is {"id", "sample", "category", "prompt_ids", "response_ids", "finish": "stop" or "length"}.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.jsonl import parse_line

SYNC_SECONDS = 5.0  # seconds a power cut may lose; a killed process loses nothing


class ResponseFile:
    """The output: rows appended one by one, each on disk as the process knows it before the next is asked for.

    `done` has (id, sample) of every row in it, `tokens` their response tokens. Raises SteeringError when the file
    exists (without resume), does not (with it), is not one of ours, or another process writes it.
    """

    def __init__(self, path: str | Path, resume: bool):
        self._path = Path(path)
        self.done: set[tuple[str, int]] = set()
        self.tokens = 0
        if resume and not self._path.exists():
            raise SteeringError(f"{path} does not exist, there is nothing to resume: start without --resume")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = io.FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        try:
            self._lock()
            if resume:
                self._read_back()
            elif os.fstat(self._file.fileno()).st_size:
                raise SteeringError(f"{path} exists: give another --output, or --resume to go on with it")
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self.done:
            os.fsync(self._file.fileno())
        else:  # nothing to continue
            self._path.unlink()
            meta_path(self._path).unlink(missing_ok=True)
        self._file.close()

    def append(self, row: dict[str, Any]) -> bool:
        """Write a row, or return False for one that is there already (Ray runs a dead actor's open batches again)."""
        if (row["id"], row["sample"]) in self.done:
            return False
        left = memoryview(json.dumps(row).encode() + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise SteeringError(f"cannot write {self._path} ({error.strerror}): make room for it") from error
        self._count(row)
        return True

    def _count(self, row: dict[str, Any]) -> None:
        self.done.add((row["id"], row["sample"]))
        self.tokens += len(row["response_ids"])

    def _lock(self) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SteeringError(f"{self._path} is being written by another process: let it finish") from None

    def _read_back(self) -> None:
        """Count the existing rows and cut off an unfinished last line."""
        reader, end = io.BufferedReader(self._file), 0
        for number, line in enumerate(reader, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._count(parse_line(line))
            except (SteeringError, KeyError, TypeError):
                raise SteeringError(
                    f"{self._path}, line {number} is not a response row: delete the line, or give another --output"
                ) from None
            end += len(line)
        reader.detach()
        self._file.seek(end)
        self._file.truncate()


def meta_path(output: str | Path) -> Path:
    """The sidecar of an output: responses.jsonl has responses.meta.json."""
    return Path(output).with_suffix(".meta.json")
