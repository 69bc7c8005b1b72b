"""The injection inside vLLM: buffers, the op, its GPU kernel (interpreted), the modules it accepts."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import TRITON
from pairs import make_pair
from repository import ROOT
from torch import nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.serving.activation import SteeredActivation, gated_mlps
from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.spec_decode.attach import _warn_of_lost_fusion, steer_first_pass
from vllm_steer.serving.telemetry.block_counter import Blocks

K = 3
MAX_SEQS = 4
MAX_ROWS = 200


class SiluAndMul(nn.Module):
    """Same name and formula as vLLM's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


class MulAndSilu(SiluAndMul):
    """vLLM has this one too: the up-projection comes first."""


class Mlp(nn.Module):
    def __init__(self, act: nn.Module, width: int = 96):
        super().__init__()
        self.gate_up_proj = nn.Linear(4, 2 * width)
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
    return Plan(str(steered), None, scale, config.steered_layers, config.projection_size, MAX_SEQS, MAX_ROWS, K)


def injection(steered: Path, scale: float = 1.0, **keys: int) -> Injection:
    return Injection(make_plan(steered, scale), torch.device("cpu"), torch.float32, **keys)


def steer(found: Injection, states: torch.Tensor, *requests: tuple[int, int, int, int]) -> None:
    """One round's guides and window; a request is (rows of the target's pass, rejected ones, seq_len, prompt_len).

    `states` [requests, 3H] are those of the last accepted rows, all others are NaN: no one may read them.
    """
    device = found.entry.device
    lengths, rejected, seq_lens, prompt_lens = (
        torch.tensor(each, device=device) for each in zip(*requests, strict=True)
    )
    start = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), lengths.cumsum(0)])
    rows = torch.full((int(start[-1]), states.shape[-1]), torch.nan, device=device, dtype=states.dtype)
    rows[start[1:] - 1 - rejected] = states.to(device)
    found.set_guides(rows.chunk(3, -1), start, rejected)
    found.steer_window(start, rejected, seq_lens, prompt_lens[None].int())


def added(found: Injection, rows: int, slot: int) -> torch.Tensor:
    """What the forward adds to the up half of each row in one layer: [rows, F]. Eager and compiled must agree."""
    module = SteeredActivation(SiluAndMul(), found.deltas[:, slot], found.entry, found._cpu_rows)
    gate_up = torch.zeros(rows, 192)
    module(gate_up)
    assert not gate_up[:, :96].any()
    torch.testing.assert_close(found.deltas[found.entry[:rows], slot], gate_up[:, 96:])
    return gate_up[:, 96:]


def test_only_the_window_after_the_prompt_is_steered(steered: Path) -> None:
    found = injection(steered)
    states = torch.randn(2, 384, generator=torch.Generator().manual_seed(0))
    # request 0: rows 0..3 hold positions 7..10 and two rejected rows; request 1: rows 6.. hold prompt 0..2, newest 3
    steer(found, states, (5, 2, 12, 5), (3, 0, 3, 3))
    deltas = checkpoint.load(steered)(states)
    want = torch.zeros(11, 96)
    want[0:4] = deltas[0, 1]
    want[9] = deltas[1, 1]
    torch.testing.assert_close(added(found, 11, 1), want)


def test_a_long_prompt_between_two_windows_is_not_steered(steered: Path) -> None:
    found = injection(steered)
    states, long = torch.randn(2, 384), 100
    steer(found, states, (5, 2, 12, 9), (long, 0, long, long - 1))
    deltas = checkpoint.load(steered)(states)
    want = torch.zeros(long + 7, 96)
    want[2:4] = deltas[0, 1]
    want[-2:] = deltas[1, 1]
    torch.testing.assert_close(added(found, long + 7, 1), want)


def test_one_request_alone(steered: Path) -> None:
    found = injection(steered)
    states = torch.randn(1, 384)
    steer(found, states, (5, 1, 11, 8))
    want = torch.zeros(6, 96)
    want[2:5] = checkpoint.load(steered)(states)[0, 1]
    torch.testing.assert_close(added(found, 6, 1), want)


def test_a_round_without_a_steered_row_steers_none(steered: Path) -> None:
    found = injection(steered)
    steer(found, torch.randn(1, 384), (3, 0, 10, 11))
    assert not added(found, 4, 0).any() and not found.entry.any()


def test_later_passes_steer_one_row_a_request_and_off_steers_none(steered: Path) -> None:
    found = injection(steered, scale=0.5)
    states = torch.randn(2, 384)
    steer(found, states, (5, 2, 12, 5), (3, 0, 3, 3))
    found.steer_drafts(2)
    torch.testing.assert_close(added(found, 2, 0), checkpoint.load(steered)(states)[:, 0] * 0.5)
    assert found.entry.tolist() == [1, 2] + [0] * (MAX_ROWS - 2)
    found.off()
    assert not added(found, 2, 0).any() and not found.entry.any()


def test_a_scale_of_0_steers_no_row(steered: Path) -> None:
    found = injection(steered)
    steer(found, torch.randn(1, 384), (5, 1, 11, 8))
    found.scale = 0.0
    steer(found, torch.randn(1, 384), (5, 1, 11, 8))
    found.steer_drafts(1)
    assert not added(found, 6, 0).any()


def test_the_scale_can_change_between_rounds(steered: Path) -> None:
    found, states = injection(steered), torch.randn(1, 384)
    for scale in (1.0, 0.25, -2.0):
        found.scale = scale
        steer(found, states, (5, 1, 11, 8))
        torch.testing.assert_close(found.deltas[1], checkpoint.load(steered)(states)[0] * scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_guide_that_is_not_finite_drafts_unsteered_and_is_counted(steered: Path, bad: float) -> None:
    found = injection(steered)
    found.blocks = Blocks(MAX_SEQS, K, torch.device("cpu"))
    states = torch.randn(2, 384)
    states[1, 7] = bad
    steer(found, states, (5, 2, 12, 5), (3, 0, 3, 3))
    torch.testing.assert_close(found.deltas[1], checkpoint.load(steered)(states)[0])
    assert not found.deltas[2].any()
    counts = found.blocks.read()
    assert (counts.guides, counts.broken) == (1, 1) and 0 < counts.guide_norms < torch.inf


def test_float16_holds_states_of_1e4(steered: Path) -> None:
    found = Injection(make_plan(steered), torch.device("cpu"), torch.float16)
    states = 1e4 * torch.randn(2, 384).clamp(-3, 3)  # three of them add up to more than float16 holds
    found.set_guides(states.chunk(3, -1), torch.arange(3), found.none_rejected)
    want = checkpoint.load(steered)(states)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(found.deltas[1:3].float(), want, rtol=0.02, atol=0.01)


def test_tensor_parallel_shares_make_the_whole(steered: Path) -> None:
    states = torch.randn(3, 384)
    whole = injection(steered)
    whole.set_guides(states.chunk(3, -1), torch.arange(4), whole.none_rejected)
    shares = [injection(steered, tp_rank=rank, tp_size=2) for rank in range(2)]
    for share in shares:
        share.set_guides(states.chunk(3, -1), torch.arange(4), share.none_rejected)
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


def test_a_merged_projection_of_another_width_is_refused(steered: Path) -> None:
    with pytest.raises(SteeringError, match="writes 200 columns on this rank, the steering needs 192"):
        injection(steered).attach(Model(Mlp(SiluAndMul()), Mlp(SiluAndMul(), width=100)))


@pytest.mark.parametrize(
    ("quantization", "fused", "said"), [("fp8", True, True), ("fp8", False, False), (None, True, False)]
)
def test_a_lost_fusion_is_said(
    quantization: str | None, fused: bool, said: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    compilation = SimpleNamespace(pass_config=SimpleNamespace(fuse_act_quant=fused))
    draft = SimpleNamespace(draft_model_config=SimpleNamespace(quantization=quantization))
    with caplog.at_level(logging.INFO, "vllm.steer"):
        _warn_of_lost_fusion(SimpleNamespace(speculative_config=draft, compilation_config=compilation))
    assert ("the drafter is quantised (fp8): in its steered layers vLLM's fusion" in caplog.text) == said


def test_experts_and_vision_towers_have_no_mlp_of_the_decoder() -> None:
    model = Model(Mlp(SiluAndMul()), Mlp(SiluAndMul()))
    model.layers[0]["mlp"].shared_expert = Mlp(SiluAndMul())
    assert gated_mlps(model) == [layer["mlp"] for layer in model.layers]
    whole = nn.ModuleDict({"vision_tower": Model(Mlp(SiluAndMul())), "language_model": model})
    whole.language_model = model
    assert gated_mlps(whole) == [layer["mlp"] for layer in model.layers]
    model.layers[1]["other"] = Mlp(SiluAndMul())
    with pytest.raises(SteeringError, match="layer 1 of vLLM's Model has two MLPs"):
        gated_mlps(model)


def test_one_compiled_artifact_serves_all_layers_and_sizes(steered: Path) -> None:
    """vLLM keeps one artifact for pieces of equal code: no layer's number may be in it, nor a size."""
    found, codes = injection(steered), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(SteeredActivation.forward, fullgraph=True, dynamic=True, backend=backend)
    steer(found, torch.randn(2, 384), (5, 2, 12, 5), (3, 0, 3, 3))
    for slot, rows in ((0, 11), (1, 11), (1, 14)):
        module = SteeredActivation(SiluAndMul(), found.deltas[:, slot], found.entry, found._cpu_rows)
        gate_up = torch.randn(rows, 192)
        torch.testing.assert_close(compiled(module, gate_up.clone()), module(gate_up.clone()))
    assert len(set(codes)) == 1, codes


def test_the_gpu_kernels_compute_what_the_cpu_code_does() -> None:
    """In Triton's interpreter: that they are right, not that they are fast. benchmarks/gpu runs the same on a GPU."""
    import os

    from engines import ENV, runner_env

    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "kernels.py"), "--dry-run"]
    env = os.environ | ENV | runner_env("v2")
    env["PYTHONPATH"] = os.pathsep.join([str(TRITON), str(ROOT)])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"checks_passed": true' in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_on_a_gpu(steered: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as everywhere, from five launches of ours, without a wait for the device."""
    device = torch.device("cuda")
    found = Injection(make_plan(steered), device, dtype)
    found.blocks = Blocks(MAX_SEQS, K, device)
    states = torch.randn(3, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[2, 5] = torch.nan
    requests = ((5, 2, 12, 5), (3, 0, 3, 3), (4, 1, 9, 2))
    steer(found, states, *requests)
    want = checkpoint.load(steered)(states.float())
    want[2] = 0
    exact = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.deltas[1:4].float().cpu(), want, rtol=exact, atol=exact)
    entries = [1, 1, 1, 1, 0, 0, 0, 0, 0, 2, 3, 3, 3, 3, 0]
    assert found.entry.tolist() == entries + [0] * (MAX_ROWS - len(entries))
    assert found.blocks.guides[[0, 2]].tolist() == [2, 1]

    module = SteeredActivation(SiluAndMul(), found.deltas[:, 1], found.entry, found._cpu_rows)
    gate_up = torch.randn(15, 192, device=device, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    right = nn.functional.silu(gate) * (up + found.deltas[found.entry[:15], 1].double())
    torch.testing.assert_close(module(gate_up).double(), right, rtol=exact, atol=exact)

    lengths = torch.tensor([0, 5, 8, 12], device=device)
    rejected, seq_lens, _ = [torch.tensor(each, device=device) for each in list(zip(*requests, strict=True))[1:]]
    rows = torch.randn(12, 384, device=device, dtype=dtype)
    prompts, drafts = np.array([5, 3, 2]), [4, 0, 3]

    def round_of() -> None:
        steer_first_pass(found, rows.chunk(3, -1), lengths, rejected, seq_lens, ["a", "b", "c"], prompts, drafts)
        for _ in range(K - 1):
            found.steer_drafts(3)
        found.off()

    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    from kernels import launches

    counted = launches(round_of)  # raises for a wait
    ours = [name for name in counted if name.startswith("_") or "FillFunctor" in name or "Memcpy" in name]
    assert sum(counted[name] for name in ours) == 6 and sum(counted.values()) <= 12, counted
