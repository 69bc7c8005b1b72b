"""The injection inside vLLM: buffers, the op, its GPU kernel (interpreted), the modules it accepts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import TRITON
from pairs import make_pair
from repository import SUPPORT
from torch import nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.serving.injection import Injection, SteeredActivation, gated_mlps
from vllm_steer.serving.plan import Plan

K = 3
MAX_SEQS = 4


class SiluAndMul(nn.Module):
    """Same name and formula as vLLM's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


class MulAndSilu(SiluAndMul):
    """vLLM has this one too: the up-projection comes first."""


class Mlp(nn.Module):
    def __init__(self, act: nn.Module):
        super().__init__()
        self.gate_up_proj = nn.Linear(4, 8)
        self.act_fn = act


class Model(nn.Module):
    def __init__(self, *mlps: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": mlp}) for mlp in mlps)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("injection"), "llama")[2]


def make_plan(steered: Path, scale: float = 1.0) -> Plan:
    config = checkpoint.load(steered).config
    return Plan(str(steered), None, scale, config.steered_layers, config.projection_size, MAX_SEQS, K)


def injection(steered: Path, scale: float = 1.0, **keys: int) -> Injection:
    return Injection(make_plan(steered, scale), torch.device("cpu"), torch.float32, **keys)


def steer(
    found: Injection,
    states: torch.Tensor,
    rows: list[int],
    positions: list[int],
    prompts: list[int],
    starts: tuple[int, ...] = (0, 6),
) -> None:
    found.set_guides(states)
    starts = starts[: len(rows)]
    found.steer_window(*(torch.tensor(x) for x in (rows, positions, starts, prompts)))


def test_only_the_window_after_the_prompt_is_steered(steered: Path) -> None:
    found = injection(steered)
    states = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))
    # request 0: rows 0..3 hold positions 7..10 and two rejected rows; request 1: rows 6.. hold prompt 0..2, newest 3
    steer(found, states, rows=[3, 9], positions=[10, 3], prompts=[5, 3])
    deltas = checkpoint.load(steered)(states)
    gate_up = torch.zeros(11, 2 * 96)
    torch.ops.vllm_steer.inject(gate_up, found.deltas, found.rows, found.requests, found.count, 1)
    want = torch.zeros(11, 96)
    want[0:4] = deltas[0, 1]
    want[9] = deltas[1, 1]
    torch.testing.assert_close(gate_up[:, 96:], want)
    assert not gate_up[:, :96].any()


def test_a_long_prompt_between_two_windows_is_not_steered(steered: Path) -> None:
    found = injection(steered)
    states, gap = torch.randn(2, 384), 4 * found.rows.numel()
    steer(found, states, rows=[3, gap + 2], positions=[10, 9], prompts=[9, 9], starts=(0, 6))
    deltas = checkpoint.load(steered)(states)
    gate_up = torch.zeros(gap + 4, 2 * 96)
    torch.ops.vllm_steer.inject(gate_up, found.deltas, found.rows, found.requests, found.count, 1)
    want = torch.zeros(gap + 4, 96)
    want[2:4] = deltas[0, 1]
    want[gap + 2] = deltas[1, 1]
    torch.testing.assert_close(gate_up[:, 96:], want)


def test_one_request_alone(steered: Path) -> None:
    found = injection(steered)
    states = torch.randn(1, 384)
    steer(found, states, rows=[4], positions=[10], prompts=[8], starts=(0,))
    gate_up = torch.zeros(6, 192)
    torch.ops.vllm_steer.inject(gate_up, found.deltas, found.rows, found.requests, found.count, 1)
    want = torch.zeros(6, 96)
    want[2:5] = checkpoint.load(steered)(states)[0, 1]
    torch.testing.assert_close(gate_up[:, 96:], want)


def test_a_round_without_a_steered_row_steers_none(steered: Path) -> None:
    found = injection(steered)
    steer(found, torch.randn(1, 384), rows=[3], positions=[10], prompts=[11])
    gate_up = torch.zeros(4, 192)
    torch.ops.vllm_steer.inject(gate_up, found.deltas, found.rows, found.requests, found.count, 0)
    assert not gate_up.any()


def test_later_passes_steer_one_row_a_request_and_off_steers_none(steered: Path) -> None:
    found = injection(steered, scale=0.5)
    states = torch.randn(2, 384)
    steer(found, states, rows=[3, 9], positions=[10, 3], prompts=[5, 3])
    found.steer_drafts(2)
    gate_up = torch.zeros(2, 192)
    torch.ops.vllm_steer.inject(gate_up, found.deltas, found.rows, found.requests, found.count, 0)
    torch.testing.assert_close(gate_up[:, 96:], checkpoint.load(steered)(states)[:, 0] * 0.5)
    found.off()
    torch.ops.vllm_steer.inject(gate_up, found.deltas, found.rows, found.requests, found.count, 0)
    torch.testing.assert_close(gate_up[:, 96:], checkpoint.load(steered)(states)[:, 0] * 0.5)


def test_tensor_parallel_shares_make_the_whole(steered: Path) -> None:
    states = torch.randn(3, 384)
    whole = injection(steered)
    whole.set_guides(states)
    shares = [injection(steered, tp_rank=rank, tp_size=2) for rank in range(2)]
    for share in shares:
        share.set_guides(states)
    torch.testing.assert_close(torch.cat([share.deltas for share in shares], -1), whole.deltas)


def test_tensor_parallel_must_divide(steered: Path) -> None:
    with pytest.raises(SteeringError, match="FFN width 96 does not divide by tensor_parallel_size 5"):
        injection(steered, tp_size=5)


def test_a_checkpoint_that_changed_under_a_starting_server(steered: Path) -> None:
    changed = dataclasses.replace(make_plan(steered), projection_size=7)
    with pytest.raises(SteeringError, match="changed while the server was starting"):
        Injection(changed, torch.device("cpu"), torch.float32)


def test_only_gate_first_activations_are_wrapped(steered: Path) -> None:
    model = Model(Mlp(SiluAndMul()), Mlp(SiluAndMul()))
    injection(steered).attach(model)
    assert all(isinstance(layer["mlp"].act_fn, SteeredActivation) for layer in model.layers)
    assert len(gated_mlps(Model(Mlp(SiluAndMul()), Mlp(MulAndSilu())))) == 1
    with pytest.raises(SteeringError, match="has 1 MLPs with a merged gate_up_proj .* this family cannot be steered"):
        injection(steered).attach(Model(Mlp(SiluAndMul()), Mlp(MulAndSilu())))


KERNEL = """
import sys
sys.path[:0] = sys.argv[1:]
from interpreter import pretend_triton_has_a_cpu_backend
pretend_triton_has_a_cpu_backend(sys.argv[1])
import torch
from vllm_steer.serving import injection  # registers the op
from vllm_steer.serving.kernels import inject
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):
    deltas = torch.randn(5, 3, 70).to(dtype); deltas[0] = 0
    rows = torch.tensor([4, 0, 0, 0, 7, 2, 9, 9]); requests = torch.tensor([1, 0, 2, 0, 3, 4, 1, 2])
    count = torch.tensor([6, 0, 0], dtype=torch.int32)
    base = torch.randn(10, 140).to(dtype)
    for layer in range(3):
        a, b = base.clone(), base.clone()
        torch.ops.vllm_steer.inject(a, deltas, rows, requests, count, layer)
        inject(b, deltas, rows, requests, count, layer)
        assert torch.equal(a, b) and not torch.equal(a, base)
    inject(b, deltas, rows, requests, count * 0, 0)
print("equal")
"""


def test_the_gpu_kernel_computes_what_the_cpu_op_does() -> None:
    """In Triton's interpreter: that it is right, not that it is fast; no GPU was used."""
    import os

    from engines import ENV, runner_env

    command = [sys.executable, "-c", KERNEL, str(TRITON), str(SUPPORT)]
    done = subprocess.run(command, env=os.environ | ENV | runner_env("v2"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]
