"""What never changes while a drafter trains, computed once and kept on disk: the target's states, and a frozen trunk.

    cache.json    what it was made from, how many rows are done, where each row starts
    states.bin    bfloat16 [tokens, 3H]   inputs of three target layers
    final.bin     bfloat16 [tokens, H]    what the target's head reads
    trunk.bin     bfloat16 [tokens, H2]   input of the first steered drafter layer, when everything below is frozen

The files only grow; cache.json is replaced after each batch of rows, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import difference
from vllm_steer.data.dataset import Row, collate
from vllm_steer.data.response_file import write_json

INDEX = "cache.json"


class StateCache:
    """Rows and the tensors read for them; `fill` first, then index by row number."""

    def __init__(self, directory: str | Path, rows: Sequence[Row], widths: dict[str, int], made_from: dict[str, Any]):
        """
        Args:
            widths: names and widths of the tensors kept per token, e.g. {"states": 3 * H, "final": H}.
            made_from: JSON-able description of models and options; a cache made from others is refused.
        """
        self.directory, self.rows, self.widths = Path(directory), rows, widths
        self.starts = np.cumsum([0, *(len(row.ids) for row in rows)]).tolist()
        digest = hashlib.sha256(json.dumps([[row.ids, row.prompt_length] for row in rows]).encode()).hexdigest()
        self.made_from = made_from | {"rows_sha256": digest, "widths": widths}
        self.done = self._read_index()

    def fill(self, read: Callable[[dict[str, Tensor]], dict[str, Tensor]], batch_size: int) -> None:
        """Compute what is missing: `read` maps a batch of `collate` to a tensor [B, T, width] per name."""
        if self.done == len(self.rows):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with (
            tqdm(total=self.starts[-1], initial=self.starts[self.done], unit="token", desc="caching states") as bar,
            _Appenders(
                self.directory, {name: self.starts[self.done] * 2 * w for name, w in self.widths.items()}
            ) as out,
        ):
            for first in range(self.done, len(self.rows), batch_size):
                rows = self.rows[first : first + batch_size]
                found = read(collate(rows))
                for i, row in enumerate(rows):
                    for name in self.widths:
                        tensor = found[name][i, : len(row.ids)].to("cpu", torch.bfloat16).contiguous()
                        out.write(name, tensor.view(torch.uint16).numpy().tobytes())
                out.flush()
                self.done = first + len(rows)
                write_json(self.directory / INDEX, {"made_from": self.made_from, "rows": self.done})
                bar.update(self.starts[self.done] - self.starts[first])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`collate` of some rows, with each cached tensor right-padded beside it, bfloat16 [B, T, width]."""
        rows = [self.rows[i] for i in indices]
        out = collate(rows)
        for name, width in self.widths.items():
            kept = np.memmap(self.directory / f"{name}.bin", np.uint16, "r", shape=(self.starts[-1], width))
            padded = torch.zeros(*out["input_ids"].shape, width, dtype=torch.bfloat16)
            for j, i in enumerate(indices):
                piece = torch.from_numpy(kept[self.starts[i] : self.starts[i + 1]].copy())
                padded[j, : len(piece)] = piece.view(torch.bfloat16)
            out[name] = padded
        return out

    def _read_index(self) -> int:
        path = self.directory / INDEX
        if not path.exists():
            return 0
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            found, done = raw["made_from"], raw["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise SteeringError(f"{path} is damaged ({error}): delete {self.directory} and start again") from None
        wanted = json.loads(json.dumps(self.made_from))
        for key in sorted(wanted.keys() | found.keys()):
            if what := difference(found.get(key), self.made_from.get(key)):
                raise SteeringError(
                    f"{self.directory} was made with {key} {found.get(key)}, this run has {wanted.get(key)}: "
                    f"{what}; give another --cache directory, or delete this one"
                )
        for name, width in self.widths.items():
            kept = self.directory / f"{name}.bin"
            if not kept.exists() or kept.stat().st_size < self.starts[done] * width * 2:
                raise SteeringError(f"{kept} is shorter than {path} says: delete {self.directory} and start again")
        return done


class _Appenders:
    """One file a tensor name, cut to the given sizes (what a killed run wrote beyond its index) and appended to."""

    def __init__(self, directory: Path, sizes: dict[str, int]):
        self.files = {}
        for name, size in sizes.items():
            path = directory / f"{name}.bin"
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
