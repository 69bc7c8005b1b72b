"""The draft round on a GPU: are its kernels right, how many launches and waits has it, how long does it take.

Needs torch, triton, transformers, safetensors and wrapt, not vLLM; about two minutes on an H100.

    PYTHONPATH=. python benchmarks/gpu/kernels.py --out benchmarks/results/gpu_kernels.json
    PYTHONPATH=. TRITON_INTERPRET=1 python benchmarks/gpu/kernels.py --dry-run        # the checks alone, on a CPU

1. Every kernel of serving/kernels.py against plain torch in float64, on random inputs of awkward sizes.
2. One engine's rounds through serving/injection.py: guides, window, drafts, off. Kernels are counted by torch's
   profiler, waits for the device are errors, times are medians of event timings.
3. The activation of one layer: vLLM's formula unsteered, our eager kernel, and compiled tensor code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import write_report

from vllm_steer.drafters.models import DrafterShape, TargetShape
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.serving import activation, kernels
from vllm_steer.serving.injection import Injection
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.spec_decode.attach import steer_first_pass
from vllm_steer.serving.telemetry.block_counter import Blocks, Verified, count

K = 5
EPS = 1e-5
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of the norm


class SiluAndMul(nn.Module):
    """vLLM's formula under vLLM's name."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, 2F] -> [T, F]."""
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


# --- 1: the kernels are right ----------------------------------------------------------------------------------------


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the wanted norm; a NaN is infinitely wrong."""
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(torch.inf))


def check_activation(device: str, dtype: torch.dtype, rows: int, width: int, form: str) -> float:
    """A delta of NaN in entry 0 must not be read."""
    gate_up = torch.randn(rows, 2 * width + 3, device=device).to(dtype)[:, : 2 * width]
    deltas = torch.randn(5, 3, width, device=device).to(dtype)[:, 1]
    deltas[0] = torch.nan
    entry = torch.randint(0, 5, (rows + 4,), device=device, dtype=torch.int32)
    gate, up = gate_up.double().chunk(2, -1)
    gate = activation._gate(gate, form)
    wanted = gate * (up + deltas.double()[entry[:rows]].nan_to_num(0))
    return error(kernels.steered_activation(gate_up, deltas, entry, form), wanted)


def check_gather(device: str, dtype: torch.dtype, requests: int, hidden: int) -> float:
    """Three tensors of states, one of them strided; all rows but the last accepted ones are NaN."""
    length = torch.randint(1, 7, (requests,), device=device)
    rejected = (torch.rand(requests, device=device) * length).int()
    start = torch.cat([torch.zeros(1, device=device, dtype=torch.int64), length.cumsum(0)]).int()
    last = (start[1:] - 1 - rejected).long()
    states = torch.full((int(start[-1]), 3 * hidden + 1), torch.nan, device=device, dtype=dtype)[:, : 3 * hidden]
    states[last] = torch.randn(requests, 3 * hidden, device=device).to(dtype)
    out = torch.full((requests, 3 * hidden), torch.nan, device=device, dtype=dtype)
    kernels.gather_states(states.chunk(3, -1), start, rejected, out, 0.25)
    return error(out, 0.25 * states[last].double())


def check_normalise(device: str, dtype: torch.dtype, requests: int, hidden: int) -> float:
    """The last guide is broken: its row is zeros, and it is counted apart."""
    guide = (3 * torch.randn(requests + 1, hidden, device=device) + 1).to(dtype)
    guide[-1, hidden // 2] = torch.inf
    weight, bias = (torch.randn(hidden, device=device).to(dtype) for _ in range(2))
    out = torch.full_like(guide, torch.nan)
    tally = torch.zeros(3, device=device, dtype=torch.float64)
    kernels.normalise_guides(guide, weight, bias, out, EPS, 0.5, tally)
    wanted = nn.functional.layer_norm(guide.double(), (hidden,), weight.double(), bias.double(), EPS)
    wanted[-1] = 0
    sums = torch.tensor([requests, 2 * float(guide[:-1].double().norm(dim=-1).sum()), 1])
    if error(tally.cpu(), sums) > 1e-5:
        return float("inf")
    return error(out, wanted)


def check_rows(device: str, requests: int) -> float:
    """The window, the blocks and the drafts against plain code, row for row; every row is written."""
    length = torch.randint(1, K + 2, (requests,))
    length[requests // 2] = 3000  # a prompt
    rejected = (torch.rand(requests) * length.clamp_max(K + 1)).int()
    seq_lens = (length + torch.randint(0, 9, (requests,))).int()
    prompt_lens = (seq_lens - torch.randint(0, 9, (requests,))).int()
    start = torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)]).int()
    wanted = torch.zeros(int(start[-1]) + requests + 1500, dtype=torch.int32)
    for i in range(requests):
        newest = int(start[i] + i + length[i] - rejected[i])
        for row in range(max(int(start[i]) + i, newest - K - 1), newest + 1):
            position = row - int(start[i]) - i + int(seq_lens[i] - length[i])
            wanted[row] = i + 1 if position >= prompt_lens[i] else 0
    previous = torch.randperm(requests) - (torch.rand(requests) < 0.3).int() * requests  # below 0: not there
    drafts = (length - 1).clamp_max(K)
    before = torch.zeros(requests, dtype=torch.int32)
    before[previous[previous >= 0]] = (seq_lens - length)[previous >= 0].int()
    before[::5] += 1  # skipped a round
    table = torch.stack([prompt_lens, previous.clamp_min(-1), drafts]).int()
    entry = torch.empty_like(wanted).to(device)
    wrong = 0
    for integer in (torch.int32, torch.int64):  # the runners' integers have 32 or 64 bits
        there = [each.to(device, integer) for each in (start, rejected, seq_lens)]
        counted = [Verified(torch.zeros(2 * (K + 1) ** 2, dtype=torch.float64), before, -before, (K + 1) ** 2, K + 1)
                   for _ in range(2)]  # fmt: skip
        count(counted[0], table[1], table[2], length, rejected, seq_lens)
        found = Verified(*(each.to(device, copy=True) for each in counted[1][:3]), *counted[1][3:])
        for window in (0, K + 2):
            entry.fill_(-1)
            kernels.steer_window(entry, *there, table.to(device), window, found if window else None)
            wrong += int((entry.cpu() != (wanted if window else 0)).sum())
        wrong += sum(int((mine.cpu() != right).sum()) for mine, right in zip(found[:3], counted[0][:3], strict=True))
    for each in (1, 4):
        entry.fill_(-1)
        kernels.steer_drafts(entry, requests, each)
        wanted = torch.zeros_like(wanted)
        rows = torch.arange(1, requests + 1).repeat_interleave(each)[: len(wanted)]
        wanted[: len(rows)] = rows
        wrong += int((entry.cpu() != wanted).sum())
    return float(wrong)


def check_pages(device: str, pages: int) -> float:
    """Copies of pages in three layers of two sizes, some of them onto themselves, against plain code."""
    caches = [
        torch.randn(pages, *shape, device=device).to(torch.float16) for shape in ((2, 8, 16), (2, 8, 16), (4, 999, 2))
    ]
    order = torch.randperm(pages)
    source, to = order[: pages // 2].clone(), order[pages // 2 : 2 * (pages // 2)].clone()
    to[::3] = source[::3]
    wanted = [cache.cpu().index_copy(0, to, cache.cpu()[source]) for cache in caches]
    words = [cache.stride(0) // 2 for cache in caches]
    addresses = torch.tensor([cache.data_ptr() for cache in caches], device=device)
    kernels.copy_pages(
        addresses, torch.tensor(words, device=device), max(words), source.to(device), to.to(device, torch.int32)
    )
    return float(sum(int((cache.cpu() != right).sum()) for cache, right in zip(caches, wanted, strict=True)))


def check_kernels(device: str, small: bool) -> dict[str, Any]:
    """The largest error of each kernel and type, and whether all are within their tolerance."""
    torch.manual_seed(0)
    worst: dict[str, float] = {}
    passed = True
    types = (torch.float32, torch.float16) if small else tuple(TOLERANCE)  # the interpreter has no bfloat16
    for dtype in types:
        sizes = ((3, 70), (1, 1)) if small else ((1, 1), (3, 70), (256, 3072), (8, 4864), (64, 14336))
        for n, width in sizes:
            found = {f"activation {form}": check_activation(device, dtype, n, width, form) for form in
                     ("silu", "gelu", "gelu_tanh")}  # fmt: skip
            found["gather"] = check_gather(device, dtype, n, width)
            found["normalise"] = check_normalise(device, dtype, n, max(width, 2))
            for name, value in found.items():
                key = f"{name} {str(dtype).removeprefix('torch.')}"
                worst[key] = max(worst.get(key, 0), value)
                passed &= value <= TOLERANCE[dtype]
    for requests in (1, 3, 40) if small else (1, 3, 64, 256, 1024):
        worst["rows"] = max(worst.get("rows", 0), check_rows(device, requests))
        worst["pages"] = max(worst.get("pages", 0), check_pages(device, 4 * requests))
    return {"checks_passed": passed and worst["rows"] == worst["pages"] == 0, "worst_error": worst}


# --- 2: a round ------------------------------------------------------------------------------------------------------


class Round:
    """An engine's steering, and a draft round of it as the runners call it."""

    def __init__(self, path: Path, config: SteeringConfig, requests: int, max_num_seqs: int):
        device = torch.device("cuda")
        plan = Plan(str(path), None, 1.0, config.steered_layers, config.projection_size, max_num_seqs, 8192 + 1024, K)
        self.injection = Injection(plan, device, torch.bfloat16)
        self.injection.blocks = Blocks(max_num_seqs, K, device)
        rows, hidden = requests * (K + 1), config.target.hidden_size
        self.requests = requests
        self.states = [torch.randn(rows, hidden, device=device, dtype=torch.bfloat16) for _ in range(3)]
        self.start = torch.arange(0, rows + 1, K + 1, device=device, dtype=torch.int32)
        self.rejected = torch.randint(0, K + 1, (requests,), device=device, dtype=torch.int32)
        self.seq_lens = torch.full((requests,), 500, device=device, dtype=torch.int32)
        self.host = [str(i) for i in range(requests)], np.full(requests, 100), [K] * requests

    def __call__(self) -> None:
        """Guides, window, k - 1 passes, off; the drafter's own passes are not ours."""
        steer_first_pass(self.injection, self.states, self.start, self.rejected, self.seq_lens, *self.host)
        for _ in range(K - 1):
            self.injection.steer_drafts(self.requests)
        self.injection.off()


def launches(run: Any) -> dict[str, int]:
    """Device activities of one call, by name; waiting for the device raises."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return dict(Counter(event.name for event in profile.events() if event.device_type.name == "CUDA"))


def microseconds(run: Any, repeats: int = 50) -> dict[str, float]:
    """Median times of a call: `device` between two events with the queue kept full, `host` until it returns."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    host, device = [], []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # about a millisecond: the host runs ahead
        began.record()
        then = time.perf_counter()
        run()
        host.append(1e6 * (time.perf_counter() - then))
        ended.record()
        torch.cuda.synchronize()
        device.append(1e3 * began.elapsed_time(ended))
    return {"device": round(statistics.median(device), 1), "host": round(statistics.median(host), 1)}


PAIRS = {  # target's H and layers, drafter's H, F and layers
    "Qwen3-8B / 0.6B": (4096, 36, 1024, 3072, 28),
    "Llama-3.1-8B / 3.2-1B": (4096, 32, 2048, 8192, 16),
}


def measure_rounds(scratch: Path) -> list[dict[str, Any]]:
    """One row for each pair, rank, max_num_seqs and batch."""
    found = []
    for name, (target_hidden, target_layers, hidden, width, layers) in PAIRS.items():
        for rank in (64, None):
            target = TargetShape("target", target_hidden, target_layers, 1000)
            drafter = DrafterShape("drafter", hidden, layers, width, 1000)
            states = (3, target_layers // 2, target_layers - 3)
            config = SteeringConfig(target, drafter, states, tuple(range(layers)), rank)
            steering = Steering(config, device="cuda", dtype=torch.bfloat16)
            nn.init.normal_(steering.output.weight, std=0.01)
            path = scratch / f"{hidden}-{rank}"
            checkpoint.save(path, steering.cpu())
            for most, batch in ((256, 1), (256, 8), (256, 64), (1024, 1), (1024, 256)):
                run = Round(path, config, batch, most)
                row = {"pair": name, "rank": rank, "max_num_seqs": most, "batch": batch, "us": microseconds(run)}
                found.append(row | {"launches": launches(run)})
                print(json.dumps(row), flush=True)
                del run
    return found


# --- 3: a layer's activation -----------------------------------------------------------------------------------------


def measure_activation() -> list[dict[str, Any]]:
    """Microseconds a layer, by replaying a graph of 20 layers: launch gaps left out."""
    found = []
    for width in (3072, 8192):
        for rows in (1, 8, 64, 384):
            deltas = torch.randn(257, 20, width, device="cuda", dtype=torch.bfloat16)
            entry = torch.arange(1, 8193, device="cuda", dtype=torch.int32) % 257
            inputs = torch.randn(20, rows, 2 * width, device="cuda", dtype=torch.bfloat16)
            modules = [activation.SteeredActivation(SiluAndMul(), deltas[:, i], entry, activation.CpuRows())
                       for i in range(20)]  # fmt: skip
            plain, steered = torch.compile(SiluAndMul()), torch.compile(_compiled)
            ways = {
                "unsteered, compiled": lambda i, x=inputs, f=plain: f(x[i]),
                "steered, compiled": lambda i, x=inputs, f=steered, d=deltas, e=entry: f(x[i], d[:, i], e),
                "steered, eager kernel": lambda i, x=inputs, m=modules: m[i](x[i]),
            }
            row: dict[str, Any] = {"width": width, "rows": rows}
            for name, way in ways.items():
                graph = _captured(lambda way=way: [way(i) for i in range(20)])
                row[name] = round(microseconds(graph.replay)["device"] / 20, 3)
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def _compiled(gate_up: Tensor, deltas: Tensor, entry: Tensor) -> Tensor:
    module = activation.SteeredActivation(SiluAndMul(), deltas, entry, activation.CpuRows())
    return module(gate_up)


def _captured(run: Any) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write; without it the results are printed")
    parser.add_argument("--dry-run", action="store_true", help="the checks alone, on a CPU by Triton's interpreter")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is seen here: give --dry-run to run the checks in Triton's interpreter")
    results = check_kernels("cpu" if args.dry_run else "cuda", small=args.dry_run)
    print(json.dumps(results), flush=True)
    if not args.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            results |= {"gpu": torch.cuda.get_device_name(), "activation_us": measure_activation()}
            results["rounds"] = measure_rounds(Path(scratch))
    if args.out is not None:
        write_report(args.out, **results)
    return 0 if results["checks_passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
