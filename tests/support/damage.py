"""Ways to damage files, and what a damaged file may do: be refused in a sentence, quickly, or load what it should."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import samples
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from repository import ROOT
from torch import nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.models import DrafterShape, TargetShape
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering

PARTS = [n / 10 for n in range(10)]  # 0 %, 10 %, ... 90 %
SECONDS = 1.0  # of processor time, for refusing a file of a few kilobytes
GOLDEN = ROOT / "tests/golden/tiny_qwen3"
fuzz = settings(max_examples=1000, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
VALID = samples.valid_config()
fewer = settings(fuzz, max_examples=400)

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, -1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.0, 1.0, 1e308, float("nan"), float("inf"), True]
)
TEXTS = st.text(max_size=8) | st.sampled_from(["1", "../../x", "/etc/passwd", "\x00", "\x1b[31m", "\ud800", "Ａ‮é"])
JUNK = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def engine_config(target: Path, drafter: Path, adapter: Path | None = None) -> Any:
    """What a server start does before any engine process."""
    return samples.engine_config(target, drafter, {"vllm_steer": {"adapter": str(adapter)}} if adapter else {})


def copy_of(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to))


def cuts(path: Path) -> Iterator[None]:
    """The file cut at every tenth of its length, then whole again."""
    whole = path.read_bytes()
    for part in PARTS:
        path.write_bytes(whole[: int(len(whole) * part)])
        yield
    path.write_bytes(whole)


def small(rank: int | None = 4) -> Steering:
    """A steering of a few hundred weights, none trivial."""
    config = SteeringConfig(
        TargetShape(**VALID["target"]), DrafterShape(**VALID["drafter"]), (1, 4, 6), (0, 2), rank, draft_length=5
    )
    torch.manual_seed(0)
    steering = Steering(config).requires_grad_(False)
    for parameter in steering.parameters():
        nn.init.normal_(parameter, std=0.5)
    return steering


def check_loading(directory: Path, expected: Steering, tolerance: float = 0.0) -> str:
    """Load: refused with one of its files named, or these weights; `tolerance` of the largest delta is allowed."""
    begin = time.process_time()
    try:
        found = checkpoint.load_for(directory, SimpleNamespace(**VALID["target"]), SimpleNamespace(**VALID["drafter"]))
    except SteeringError as error:
        assert any(word in str(error) for word in (*checkpoint.FILES, "the steering was trained for"))
        assert len(str(error)) < 5000 and "\n" not in str(error)
        return "refused"
    finally:
        assert time.process_time() - begin < SECONDS
    for key in ("target_layer_ids", "steered_layers", "rank"):
        assert getattr(found.config, key) == getattr(expected.config, key)
    if tolerance:
        states = torch.randn(16, 3 * 12, generator=torch.Generator().manual_seed(7))
        want = expected(states)
        assert (found(states) - want).abs().max() <= tolerance * want.abs().max()
    else:
        assert all(torch.equal(found.state_dict()[name], want) for name, want in expected.state_dict().items())
    return "loaded"
