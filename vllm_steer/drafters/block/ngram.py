"""A counted bigram beside a block drafter (draft refinement, arXiv 2404.09221): who follows whom, and how often.

ngram/config.json         sizes, alpha, what it was counted from
ngram/model.safetensors   successors int32 [V, S]      the S most frequent successors of each token, -1 for none
                          log_probs  float16 [V, S]    of these
                          floor      float32 [V]       of every other token
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_steer.common.errors import SteeringError, require_positive_int
from vllm_steer.drafters.safe_tensors import read_tensors
from vllm_steer.drafters.steered.checkpoint import own_file

FOLDER = "ngram"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
SMOOTHING = 0.05  # added to every count
MAX_ALPHA = 10.0


@dataclass(frozen=True)
class NgramConfig:
    """config.json."""

    vocab_size: int  # V
    successors: int  # S
    alpha: float  # weight of the bigram's log-probability against the drafter's, tuned for greedy drafts
    alpha_sampled: float  # the same for drafts at temperature 1
    target: str | None = None  # fingerprint of the target whose vocabulary it counts
    provenance: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "successors", "format_version"):
            require_positive_int(name, getattr(self, name))
        if self.format_version > 1:
            raise SteeringError(f"format_version is {self.format_version}, known is 1: upgrade vllm-steer")
        for name in ("alpha", "alpha_sampled"):
            require_alpha(name, getattr(self, name))


def require_alpha(name: str, value: Any) -> None:
    """Raise SteeringError unless a weight of the bigram is a number that can be one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_ALPHA:
        raise SteeringError(f"{name} is {value!r}, allowed is a number from 0 to {MAX_ALPHA:g}")


@dataclass(frozen=True)
class Ngram:
    """The tables, on one device."""

    config: NgramConfig
    successors: Tensor  # int64 [V, S]; 0 where there is none
    boosts: Tensor  # float32 [V, S]: log-probability above the row's floor; 0 where there is no successor
    floor: Tensor  # float32 [V]

    def dense(self) -> Tensor:
        """All log-probabilities, float32 [V, V]."""
        size = self.config.vocab_size
        return self.floor[:, None].repeat(1, size).scatter_add(1, self.successors, self.boosts)

    def to(self, device: Any) -> Ngram:
        """A copy on another device."""
        return Ngram(self.config, *(x.to(device) for x in (self.successors, self.boosts, self.floor)))

    def save(self, directory: str | Path) -> Path:
        """Write `directory/ngram/`, which must not be there yet; whole or not at all."""
        folder = Path(directory) / FOLDER
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as scratch:
            new = Path(scratch) / FOLDER
            new.mkdir(mode=0o755)
            (new / CONFIG).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
            none = self.boosts == 0
            tensors = {
                "successors": self.successors.int().masked_fill(none, -1),
                "log_probs": (self.floor[:, None] + self.boosts).masked_fill(none, 0.0).half(),
                "floor": self.floor,
            }
            save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, new / WEIGHTS)
            (new / WEIGHTS).chmod(0o644)
            try:
                new.rename(folder)
            except OSError as error:
                raise SteeringError(
                    f"{folder} cannot be written ({error}): remove it, or give another --output"
                ) from None
        return folder


def has_ngram(directory: str | Path) -> bool:
    """Whether a bigram lies beside a local drafter."""
    return (Path(directory) / FOLDER).is_dir()


def load(directory: str | Path) -> Ngram:
    """Read and check `directory/ngram/`. Raises SteeringError naming what is missing, damaged or does not fit."""
    directory = Path(directory)
    folder = directory / FOLDER
    if not folder.is_dir():
        raise SteeringError(f"{directory} has no {FOLDER}/ folder: count one with `vllm-steer ngram`")
    config = _read_config(own_file(folder / CONFIG, directory))
    size, most = config.vocab_size, config.successors
    shapes = {"successors": (size, most), "log_probs": (size, most), "floor": (size,)}
    found = read_tensors(own_file(folder / WEIGHTS, directory), shapes, {"successors": (torch.int32,)})
    successors = found["successors"]
    if int(successors.min()) < -1 or int(successors.max()) >= size:
        raise SteeringError(f"{folder / WEIGHTS}: successors has token ids outside 0 to {size - 1}: copy it again")
    if bool((found["log_probs"] > 0).any()) or bool((found["floor"] > 0).any()):
        raise SteeringError(f"{folder / WEIGHTS}: log-probabilities above 0: copy it again")
    return _tables(config, successors, found["log_probs"].float(), found["floor"].float())


def _tables(config: NgramConfig, successors: Tensor, log_probs: Tensor, floor: Tensor) -> Ngram:
    none = successors < 0
    return Ngram(
        config,
        successors.long().clamp(min=0),
        (log_probs - floor[:, None]).masked_fill(none, 0.0),
        floor.clone(),
    )


def _read_config(path: Path) -> NgramConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SteeringError(f"{path} is missing or damaged ({error}): copy the whole {FOLDER}/ folder again") from None
    names = [each.name for each in fields(NgramConfig)]
    if not isinstance(raw, dict) or (unknown := sorted(raw.keys() - set(names))):
        raise SteeringError(f"{path}: unknown keys {unknown if isinstance(raw, dict) else raw!r}; allowed are {names}")
    try:
        return NgramConfig(**raw)
    except TypeError as error:
        raise SteeringError(f"{path} is not complete ({error}): copy it again") from None
    except SteeringError as error:
        raise SteeringError(f"{path}: {error}") from None


def count(rows: Iterable[Sequence[int]], config: NgramConfig) -> Ngram:
    """What follows what in sequences of token ids.

    A probability is (n + d) / (N + d V) with d = SMOOTHING; tokens beyond the most frequent share the floor, d in
    place of n + d.
    """
    pairs: Counter[tuple[int, int]] = Counter()
    for ids in rows:
        pairs.update(itertools.pairwise(ids))
    vocab_size = config.vocab_size
    totals = torch.zeros(vocab_size, dtype=torch.float64)
    by_token: dict[int, list[tuple[int, int]]] = {}
    for (token, after), number in pairs.items():
        totals[token] += number
        by_token.setdefault(token, []).append((number, after))
    most = config.successors
    best, log_probs = torch.full((vocab_size, most), -1, dtype=torch.int32), torch.zeros(vocab_size, most)
    below = (totals + SMOOTHING * vocab_size).log()
    for token, found in by_token.items():
        found.sort(key=lambda pair: (-pair[0], pair[1]))
        top = found[:most]
        best[token, : len(top)] = torch.tensor([after for _, after in top], dtype=torch.int32)
        log_probs[token, : len(top)] = torch.tensor(
            [math.log(number + SMOOTHING) - float(below[token]) for number, _ in top]
        )
    return _tables(config, best, log_probs, (math.log(SMOOTHING) - below).float())
