"""A disk cache of what does not change during training: the target's states, and the output of a frozen trunk.

    cache.json      what it was made from, how many rows are done
    states.bin      bfloat16 [tokens, 3H]   inputs of three target layers
    final.bin       bfloat16 [tokens, H]    what the target's head reads
    trunk.bin       bfloat16 [tokens, H2]   input of the first steered drafter layer, when everything below is frozen
    checksums.bin   uint32 [rows, tensors]  CRC-32 of each row's part of each file, names in alphabetical order

The files only grow; cache.json is replaced after each batch of rows, so a killed run goes on where it stopped. One
process fills a cache at a time, under a lock that ends with the process; the next one waits and then reads what the
first one wrote. All of it is checked when it is opened, and each row again when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer, write_json
from vllm_steer.common.identity import difference
from vllm_steer.data.dataset import Row, collate

log = logging.getLogger(__name__)

INDEX, SUMS, LOCK = "cache.json", "checksums.bin", ".lock"


class StateCache:
    """Rows and the tensors read for them; `fill` first, then index by row number."""

    def __init__(self, directory: str | Path, rows: list[Row], widths: dict[str, int], made_from: dict[str, Any]):
        """
        Args:
            widths: names and widths of the tensors kept per token, e.g. {"states": 3 * H, "final": H}.
            made_from: JSON-able description of models and options; a cache made from others is refused.
        """
        self.directory, self.rows, self.widths = Path(directory), rows, widths
        self.starts = np.cumsum([0, *(len(row.ids) for row in rows)]).tolist()
        digest = hashlib.sha256(json.dumps([[row.ids, row.prompt_length] for row in rows]).encode()).hexdigest()
        self.made_from = made_from | {"rows_sha256": digest, "widths": widths}
        self.names = sorted(widths)
        self._sums = np.zeros((0, len(widths)), np.uint32)
        self.done = self._open()

    def fill(self, read: Callable[[dict[str, Tensor]], dict[str, Tensor]], batch_size: int) -> None:
        """Compute what is missing: `read` maps a batch of `collate` to a tensor [B, T, width] per name.

        Waits while another process fills the same directory. Raises SteeringError when that was for something else.
        """
        if self.done == len(self.rows):
            return
        with only_writer(self.directory / LOCK, f"the cache {self.directory}", wait=True, keep=True):
            self.done = self._open()  # another process may have continued meanwhile
            try:
                self._fill(read, batch_size)
            except OSError as error:
                raise SteeringError(
                    f"the cache {self.directory} cannot be written ({error}): make room, or give another --cache; what "
                    "is there is kept"
                ) from error
        self._sums = self._read_sums()

    def _fill(self, read: Callable[[dict[str, Tensor]], dict[str, Tensor]], batch_size: int) -> None:
        sizes = {f"{name}.bin": self.starts[self.done] * 2 * width for name, width in self.widths.items()}
        sizes[SUMS] = self.done * 4 * len(self.names)
        self._write_index()  # before any row: a run with other rows or models is refused without waiting
        with (
            tqdm(total=self.starts[-1], initial=self.starts[self.done], unit="token", desc="caching states") as bar,
            _Appenders(self.directory, sizes) as out,
        ):
            for first in range(self.done, len(self.rows), batch_size):
                rows = self.rows[first : first + batch_size]
                found = read(collate(rows))
                for i, row in enumerate(rows):
                    for name in self.names:
                        tensor = found[name][i, : len(row.ids)].to("cpu", torch.bfloat16).contiguous()
                        data = tensor.view(torch.uint16).numpy().tobytes()
                        out.write(f"{name}.bin", data)
                        out.write(SUMS, np.uint32(zlib.crc32(data)).tobytes())
                out.flush()
                self.done = first + len(rows)
                self._write_index()
                bar.update(self.starts[self.done] - self.starts[first])

    def _write_index(self) -> None:
        write_json(self.directory / INDEX, {"made_from": self.made_from, "rows": self.done})

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`collate` of some rows, with each cached tensor right-padded beside it, bfloat16 [B, T, width].

        Raises SteeringError when what is read is not what was written.
        """
        out = collate([self.rows[i] for i in indices])
        for name, width in self.widths.items():
            padded = torch.zeros(*out["input_ids"].shape, width, dtype=torch.bfloat16)
            for j, i in enumerate(indices):
                piece = torch.from_numpy(self._row(name, i))
                padded[j, : len(piece)] = piece.view(torch.bfloat16)
            out[name] = padded
        return out

    def _row(self, name: str, i: int) -> np.ndarray:
        """One row of one tensor, checked: uint16 [tokens, width]."""
        found = self._stored(name, i)
        if zlib.crc32(found.data) != self._sums[i, self.names.index(name)]:
            raise SteeringError(
                f"{self.directory / name}.bin is damaged in row {i} of {len(self.rows)}: {self._remedy}"
            )
        return found

    def _stored(self, name: str, i: int) -> np.ndarray:
        width, path = self.widths[name], self.directory / f"{name}.bin"
        count = (self.starts[i + 1] - self.starts[i]) * width
        try:
            found = np.fromfile(path, np.uint16, count, offset=self.starts[i] * width * 2)
        except OSError as error:
            raise SteeringError(f"{path} cannot be read ({error}): {self._remedy}") from None
        if len(found) < count:
            raise SteeringError(f"{path} has become shorter than {INDEX} says: {self._remedy}")
        return found.reshape(-1, width)

    def _open(self) -> int:
        """How many rows are there, all of them checked. Raises SteeringError for a cache of other things or damage."""
        done = self._read_index()
        self._check_sizes(done)
        old = done > 0 and not (self.directory / SUMS).exists()
        self._sums = self._adopt(done) if old else self._read_sums()
        if len(self._sums) < done:
            raise SteeringError(f"{self.directory / SUMS} is shorter than {INDEX} says: {self._remedy}")
        with tqdm(total=self.starts[done], unit="token", desc="checking the cache", delay=1) as bar:
            for i in range(done):
                for name in self.names:
                    self._row(name, i)
                bar.update(self.starts[i + 1] - self.starts[i])
        return done

    @property
    def _remedy(self) -> str:
        return f"delete {self.directory} and start again"

    def _read_index(self) -> int:
        path = self.directory / INDEX
        if not path.exists():
            return 0
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            found, done = raw["made_from"], raw["rows"]
            if not isinstance(found, dict) or type(done) is not int or not done >= 0:
                raise ValueError("not what was written")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SteeringError(f"{path} is damaged ({error}): {self._remedy}") from None
        wanted = json.loads(json.dumps(self.made_from))
        for key in sorted(wanted.keys() | found.keys()):
            if what := difference(found.get(key), self.made_from.get(key)):
                raise SteeringError(
                    f"{self.directory} was made with {key} {found.get(key)}, this run has {wanted.get(key)}: "
                    f"{what}; give another --cache directory, or delete this one"
                )
        if done > len(self.rows):
            raise SteeringError(f"{path} says {done} rows of {len(self.rows)}: {self._remedy}")
        return done

    def _check_sizes(self, done: int) -> None:
        """A complete cache has exact sizes; a process may still be writing to one that is not."""
        for name, width in self.widths.items():
            path = self.directory / f"{name}.bin"
            size, wanted = path.stat().st_size if path.exists() else 0, self.starts[done] * width * 2
            if size < wanted or (size > wanted and done == len(self.rows)):
                how = "shorter" if size < wanted else "longer"
                raise SteeringError(f"{path} is {how} than {INDEX} says: {self._remedy}")

    def _adopt(self, done: int) -> np.ndarray:
        """Compute the checksums of a cache that has none, for this run and, if they can be written, for later ones."""
        log.warning("%s has no checksums yet: only its sizes are checked, and the checksums taken now", self.directory)
        sums = np.zeros((done, len(self.names)), np.uint32)
        for column, name in enumerate(self.names):
            for i in range(done):
                sums[i, column] = zlib.crc32(self._stored(name, i).data)
        new = self.directory / f"{SUMS}.{os.getpid()}"
        try:
            sums.tofile(new)
            os.replace(new, self.directory / SUMS)
        except OSError as error:
            log.warning("the checksums of %s cannot be kept (%s)", self.directory, error)
        return sums

    def _read_sums(self) -> np.ndarray:
        path = self.directory / SUMS
        if not path.exists():
            return np.zeros((0, len(self.names)), np.uint32)
        found = np.fromfile(path, np.uint32)
        return found[: len(found) // len(self.names) * len(self.names)].reshape(-1, len(self.names))


class _Appenders:
    """Files by name, cut to the given sizes (what a killed run wrote beyond its index) and appended to."""

    def __init__(self, directory: Path, sizes: dict[str, int]):
        self.files = {}
        for name, size in sizes.items():
            path = directory / name
            path.touch()
            os.truncate(path, size)
            self.files[name] = path.open("ab")

    def __enter__(self) -> _Appenders:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()

    def write(self, name: str, data: bytes) -> None:
        self.files[name].write(data)

    def flush(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
