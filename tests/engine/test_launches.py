"""What a draft round asks of a GPU, counted in real engines of both runners, without one.

The code for a GPU runs here on CPU tensors, its kernels in Triton's interpreter; every operator of torch that is not a
view and every kernel is recorded. One that waits for the device (`item`, a mask as an index, a copy to the host) would
be one more than these. Run as a script this file is an engine process that returns what it recorded.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import engine_process
import engines
import pytest
from repository import ROOT, SUPPORT

PAIR = ROOT / "examples" / "tiny_pair"
K, LAYERS = 4, 1
GEMMS = {"aten.addmm.out": 1, "aten.mm.out": 1}  # fuse, and project of full rank
HOST = {"aten.empty.memory_format": 1}  # pinned memory: what a GPU needs of the host goes there in one copy
OURS = {"_gather_kernel": 1, "_normalise_kernel": 1, "_window_kernel": 1, "_drafts_kernel": 1, "aten.zero_.default": 1}
ROUND = GEMMS | HOST | OURS | {"_steered_activation_kernel": LAYERS * K}  # the drafter's layers are eager here


def operators(found: Counter[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, counting the operators of torch that it calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not op.is_view:
                found[str(op)] += 1
            return op(*args, **(kwargs or {}))

    def call(*args: Any, **kwargs: Any) -> None:
        with Recorder():
            function(*args, **kwargs)

    return call


def launches(found: Counter[str], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter of a kernel, counting its launches; it is itself made of torch's operators."""
    from torch.utils._python_dispatch import _disable_current_modes

    def call(*args: Any, **kwargs: Any) -> None:
        found[name] += 1
        with _disable_current_modes():
            run(*args, **kwargs)

    return call


def eager_on_a_gpu(self: Any, gate_up: Any) -> Any:
    from vllm_steer.serving import kernels

    return kernels.steered_activation(gate_up, self.deltas, self.entry, self.form)


def record(proposer: Any, rounds: list[dict[str, int]]) -> None:
    """Give a live drafter the code for a GPU, and append what each of its rounds launches."""
    from vllm_steer.serving import activation, kernels

    found: Counter[str] = Counter()
    for name in ROUND:
        if (kernel := getattr(kernels, name, None)) is not None:
            kernel.run = launches(found, name, kernel.run)
    activation.SteeredActivation.forward = eager_on_a_gpu
    injection = proposer.injection
    injection._cpu = False
    begin = "begin_round" if hasattr(proposer, "begin_round") else "_steer_first_pass"  # V2, V1
    setattr(proposer, begin, operators(found, getattr(proposer, begin)))
    injection.steer_drafts, off = operators(found, injection.steer_drafts), operators(found, injection.off)

    def end_of_round() -> None:
        off()
        rounds.append(dict(found))
        found.clear()

    injection.off = end_of_round


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """As engine_process.serve_job, and "rounds": what each launched; [] for the code for a CPU."""
    from vllm_steer.serving import injection

    rounds: list[dict[str, int]] = []
    if job["env"].get("STEER_TEST_LAUNCHES"):
        sys.path.append(job["env"]["STEER_TEST_LAUNCHES"])  # V1 does not look for Triton
        injection._multiply_like_vllm = lambda steering: None  # it takes the weights away
    with engine_process.opened(job) as llm:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        proposer = getattr(runner, "drafter", None) or runner.speculator
        if job["env"].get("STEER_TEST_LAUNCHES"):
            record(proposer, rounds)
        tokens = [[list(o.outputs[0].token_ids) for o in engine_process.run_call(llm, call)] for call in job["calls"]]
        counts = proposer.injection.blocks.read()
    found = {"tokens": tokens, "rounds": rounds, "steered": counts.steered.tolist(), "guides": counts.guides}
    return {"calls": [found], "error": None, "metrics": {}}


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_round_launches_no_more_than_it_must(name: str) -> None:
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    prompts = [[byte + 3 for byte in json.loads(line)["prompt"].encode()][:20] for line in lines]
    calls = [{"prompts": prompts, "sampling": [{"max_tokens": n} for n in (6, 12, 24)]}]
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", str(ROOT))])
    runner = engines.Runner(name, __file__, PYTHONPATH=path, TRITON_INTERPRET="1")
    ways = ({}, {"STEER_TEST_LAUNCHES": str(engines.TRITON)})
    found = [runner.run(PAIR / "target", spec, calls, env) for env in ways]
    runner.close()
    for out in found:
        assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
    cpu, gpu = (out["calls"][0] for out in found)
    rounds = [each for each in gpu["rounds"] if each]
    assert len(rounds) > 6
    for each in rounds:
        assert each == ROUND
    assert sum(ROUND[each] for each in OURS) + 1 <= 8, "with the copy of the host's table: the budget of DESIGN.md"
    assert (gpu["tokens"], gpu["steered"], gpu["guides"]) == (cpu["tokens"], cpu["steered"], cpu["guides"])
    assert sum(map(sum, gpu["steered"])) > 6


if __name__ == "__main__":
    engine_process.main(serve_job)
