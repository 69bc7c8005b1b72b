"""Where something came from, for the record beside it: names without paths, weights by fingerprint, versions, date."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_steer import __version__
from vllm_steer.common.errors import SteeringError

VOLATILE = ("transformers_version", "_name_or_path")  # keys of config.json that saving a model again changes
SAMPLES, SAMPLE_BYTES = 16, 64 * 1024  # of each weight file; smaller files are read whole


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
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def fingerprint(model: str | Path) -> str:
    """64 hex digits that tell one model's weights from another's, wherever they lie and whatever they are called.

    Hashed are config.json without volatile keys, and of every weight file its size and evenly spaced samples: enough
    for models that were trained apart, and seconds for any size. A hub id is fetched if it is not in the cache yet.
    Raises SteeringError when there is no model.
    """
    directory, weights = _locate(str(model))
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        lasting = json.dumps({k: v for k, v in config.items() if k not in VOLATILE}, sort_keys=True)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SteeringError(f"cannot read the config.json of {model} ({error}): give a model directory") from None
    digest = hashlib.sha256(lasting.encode())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"\n{size}\n".encode())
        with open(path, "rb") as file:
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _locate(model: str) -> tuple[Path, list[Path]]:
    """The directory of a model and its weight files, in order: safetensors, else pickles."""
    for pattern in ("*.safetensors", "*.bin"):
        directory = Path(model) if Path(model).is_dir() else _snapshot(model, pattern)
        index = next(iter(sorted(directory.glob(f"{pattern}.index.json"))), None)
        if index is not None:  # a repository may hold other copies beside the files its index names
            return directory, [directory / name for name in _indexed(index)]
        if found := sorted(directory.glob(pattern)):
            return directory, found
    raise SteeringError(f"{model} has no weights (*.safetensors or *.bin): give a model directory or a hub id")


def _indexed(index: Path) -> list[str]:
    """The weight files an index names, in order: all of them beside it, whatever it says."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        strange = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SteeringError(f"cannot read {index} ({type(error).__name__}: {error}): copy it again") from None
    if not names:
        raise SteeringError(f"{index} names no weight file: copy the whole model again")
    if strange:
        raise SteeringError(f"{index} names {strange[0]!r}, which is no file beside it: copy the whole model again")
    return names


def _snapshot(model: str, pattern: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["config.json", "*.index.json", pattern]))
    except Exception as error:  # huggingface_hub raises a dozen unrelated types; all mean "could not fetch"
        raise SteeringError(
            f"{model}: no such directory, and not a hub id that can be fetched ({type(error).__name__}: {error}): "
            "check the name, the network, or HF_HUB_OFFLINE"
        ) from error
