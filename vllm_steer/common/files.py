"""Files that others may read or write at the same time: replaced as a whole, and written by one process at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vllm_steer.common.errors import SteeringError

log = logging.getLogger(__name__)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file atomically: a reader sees the old contents or the new."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def refuse_used(output: Path, remedy: str = "give a new one") -> None:
    """Raises SteeringError unless `output` is absent or an empty directory."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise SteeringError(f"{output} exists and is not an empty directory: {remedy}")


@contextlib.contextmanager
def only_writer(lock: Path, what: str, *, wait: bool = False, keep: bool = False) -> Iterator[None]:
    """Hold the file `lock` while the block runs, so that no other process on this machine writes `what`.

    The kernel lets go of it when the process ends, however it ends. A network file system may not know such locks
    across machines.

    Args:
        wait: wait for the other process, saying so, instead of refusing.
        keep: leave the file behind; needed where processes wait for it.
    Raises:
        SteeringError: another process holds it, or the file cannot be made.
    """
    file = _locked(lock, what, wait)
    try:
        yield
    finally:
        if not keep:
            with contextlib.suppress(OSError):
                lock.unlink()  # before the lock is released: the next holder creates its own
        file.close()


def _locked(lock: Path, what: str, wait: bool) -> IO[str]:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a")  # noqa: SIM115  (open as long as the lock is held)
        except OSError as error:
            raise SteeringError(f"{what} cannot be written ({error}): give a directory that can be") from None
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise SteeringError(
                        f"another process is writing {what}: let it finish, or give another place to this one"
                    ) from None
                log.info("waiting for another process that is writing %s", what)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, lock):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its holder has just removed it


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
