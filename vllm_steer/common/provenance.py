"""Where something came from, for the record beside it: names without paths, weights by fingerprint, versions, date."""

from __future__ import annotations

import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_steer import __version__
from vllm_steer.common.identity import fingerprint

__all__ = ["commit", "cpu_name", "fingerprint", "origin", "public_name"]


def public_name(name: str) -> str:
    """A model's or file's name for the record: its own name without the path to it; a hub id stays as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def origin(*packages: str) -> dict[str, Any]:
    """Versions of this package and of `packages` (those installed), the source commit, and the date (UTC)."""
    versions = {"vllm-steer": __version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def commit() -> str | None:
    """The source commit when running from a git checkout; None for an installed package or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def cpu_name() -> str:
    """The first processor's model name, or its architecture where /proc has none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
