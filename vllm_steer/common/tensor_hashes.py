"""Hashes of every tensor in weight files, remembered per file so that a large model is read once.

The memory is a directory of JSON files, one per weight file of 16 MiB or more: $VLLM_STEER_CACHE/tensors, by default
below $XDG_CACHE_HOME or ~/.cache. An entry holds for one path, inode, size, mtime and ctime; it is replaced as a whole,
carries its own checksum, and is made again when anything about it is wrong, so that losing it costs time only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError

log = logging.getLogger(__name__)

ENTRY_VERSION = 1
REMEMBER_FROM = 16 * 2**20  # bytes of a file; smaller ones are read each time
SHOW_AFTER = 1.0  # seconds of reading, after which progress is shown
SETTLED_NS = 2 * 10**9  # a file changed this recently could change again within one tick of the file system's clock
CHUNK = 2**23
Entry = tuple[str, str, tuple[int, ...], str]  # name, dtype, shape, SHA-256 of the bytes
DTYPES = {  # names of torch's in safetensors, so that a converted model keeps its identity
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"},
    **{"float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"},
    **{"bool": "BOOL"},
}
Advance = Callable[[int], Any]


def tensors_of(files: Iterable[Path], name: str) -> list[Entry]:
    """One entry per tensor of all files; a file that cannot be read as tensors is one entry of its bytes.

    `name` is shown with the progress. Raises SteeringError when a file changes while it is read, or cannot be read.
    """
    from tqdm import tqdm

    files = list(files)
    try:
        total = sum(path.stat().st_size for path in files)
        with tqdm(total=total, desc=f"hashing {name}", unit="B", unit_scale=True, delay=SHOW_AFTER) as bar:
            return [entry for path in files for entry in _remembered(path, bar.update)]
    except OSError as error:
        raise SteeringError(f"cannot read the weights of {name} ({error}): copy the file again") from None


def memory() -> Path:
    """The directory in which hashes are remembered."""
    if own := os.environ.get("VLLM_STEER_CACHE"):
        return Path(own) / "tensors"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-steer" / "tensors"


def _remembered(path: Path, advance: Advance) -> list[Entry]:
    real = path.resolve()
    state = _state(real)
    if state["size"] < REMEMBER_FROM:
        return _unchanged(real, state, advance)
    with _memory_of(real) as place:
        if place is not None and (found := _recall(place, state)) is not None:
            advance(state["size"])
            return found
        started = time.time_ns()
        entries = _unchanged(real, state, advance)
        if place is not None and max(state["mtime_ns"], state["ctime_ns"]) < started - SETTLED_NS:
            _remember(place, state, entries)
        return entries


def _unchanged(path: Path, state: dict[str, Any], advance: Advance) -> list[Entry]:
    entries = _read(path, advance)
    if _state(path) != state:
        raise SteeringError(f"{path} changed while it was read: let its writer finish, then start again")
    return entries


def _state(path: Path) -> dict[str, Any]:
    found = path.stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}  # ctime: nobody can set it back
    return {"path": str(path), "inode": found.st_ino, "size": found.st_size} | times


# --- the memory -----------------------------------------------------------------------------------------------------


@contextmanager
def _memory_of(path: Path) -> Iterator[Path | None]:
    """The file's entry, locked: a second process waits and reuses the first one's. None: nothing is remembered."""
    try:
        place = memory() / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(place.with_suffix(".lock"), "w")  # noqa: SIM115  (open as long as it is held)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home directory
        log.warning("hashes of %s are not remembered (%s): set VLLM_STEER_CACHE to a writable directory", path, error)
        yield None
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            log.info("%s cannot be locked: several processes may read %s at once", place, path)
        yield place


def _recall(place: Path, state: dict[str, Any]) -> list[Entry] | None:
    try:
        raw = json.loads(place.read_text(encoding="utf-8"))
        if raw["checksum"] != _checksum(raw["entry"]) or raw["entry"]["state"] != state:
            return None
        return [(name, dtype, tuple(shape), digest) for name, dtype, shape, digest in raw["entry"]["tensors"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _remember(place: Path, state: dict[str, Any], entries: list[Entry]) -> None:
    entry = {"state": state, "tensors": [list(item) for item in entries]}
    new = place.with_suffix(f".{os.getpid()}.new")
    try:
        new.write_text(json.dumps({"checksum": _checksum(entry), "entry": entry}) + "\n", encoding="utf-8")
        os.replace(new, place)
    except OSError as error:
        log.warning("hashes of %s are not remembered (%s)", state["path"], error)
        new.unlink(missing_ok=True)


def _checksum(entry: Any) -> str:
    return hashlib.sha256(json.dumps([ENTRY_VERSION, entry], sort_keys=True).encode()).hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def _read(path: Path, advance: Advance) -> list[Entry]:
    """Safetensors and pickled state dicts tensor by tensor, anything else by its bytes."""
    found = _safetensors(path, advance) if path.suffix == ".safetensors" else _pickled(path, advance)
    if found is None:
        size = path.stat().st_size
        return [("", "bytes", (size,), _hash_span(path, 0, size, advance))]
    return found


def _safetensors(path: Path, advance: Advance) -> list[Entry] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks the header: every byte of the data belongs to one tensor
            pass
    except (SafetensorError, ValueError):
        return None
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    spans = [(start + first, last - first) for first, last in (item["data_offsets"] for item in header.values())]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda span: _hash_span(path, span[0], span[1], advance), spans))
    return [
        (name, item["dtype"], tuple(item["shape"]), digest)
        for (name, item), digest in zip(header.items(), digests, strict=True)
    ]


def _hash_span(path: Path, start: int, size: int, advance: Advance) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size and (piece := file.read(min(CHUNK, size))):
            digest.update(piece)
            size -= len(piece)
            advance(len(piece))
    return digest.hexdigest()


def _pickled(path: Path, advance: Advance) -> list[Entry] | None:
    """Tensors of a PyTorch state dict, which is opened with `weights_only=True`; None if it is anything else."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        return [_pickled_entry(name, tensor, advance) for name, tensor in state.items()]
    except (OSError, MemoryError):
        raise
    except Exception:  # torch raises pickle, zip and runtime errors alike; loading the file reports it
        return None


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _pickled_entry(name: str, tensor: Any, advance: Advance) -> Entry:
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    advance(raw.nbytes)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return str(name), DTYPES.get(dtype, dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest()
