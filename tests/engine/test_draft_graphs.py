"""V2's decode passes as CUDA graphs, without CUDA: a fake graph records the callable and runs it again.

What is shown: the arithmetic of the captured loop, padding, the choice between graph and eager code, that a replay
needs nothing but the buffers `_prepare` fills and no attribute bound after the capture, and that steering's entries are
those of the round. Not shown: that CUDA can capture it, what attention backends refresh in place, memory, speed.
Run as a script this file is an engine process.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from types import MethodType, SimpleNamespace
from typing import Any

import engine_process
import engines
import pytest
from recording import record_blocks
from repository import ROOT, SUPPORT

PAIR = ROOT / "examples" / "tiny_pair"
K = 4
SIZES = [2, 4]  # a batch of one or three is padded, one of five is eager
SETTING = "STEER_TEST_GRAPHS"


class FakeGraph:
    """What torch.cuda.CUDAGraph is to vLLM's manager."""

    def __init__(self, run: Any, speculator: Any, size: int, replays: list[int]):
        self.run, self.speculator, self.size, self.replays = run, speculator, size, replays

    def replay(self) -> None:
        poison(self.speculator)
        self.replays.append(self.size)
        self.run()


def poison(speculator: Any) -> None:
    """What the graph must write itself, before it reads it."""
    speculator.draft_tokens[:, 1:] = 1
    speculator.current_draft_step.fill_(0)
    speculator.block_tables.slot_mappings.fill_(-1)


def install(found: dict[str, Any], rebind: bool) -> None:
    """Make the CPU look able to capture. `rebind`: break the rule that buffers are bound once."""
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

    from vllm_steer.serving.spec_decode import draft_graphs

    graphed, manager = draft_graphs.GraphedSpeculator, draft_graphs.SpeculatorCudaGraphManager
    decide, capture, prepare = graphed.init_cudagraph_manager, manager.capture, graphed._prepare
    type(current_platform).get_global_graph_pool = lambda self: None

    def init_cudagraph_manager(self: Any, mode: Any) -> None:
        compilation = self.vllm_config.compilation_config
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, max(SIZES)
        self.supports_decode_metadata_update = True
        self.attn_cg_support = SimpleNamespace(min_cg_support=AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE)
        decide(self, CUDAGraphMode.FULL_DECODE_ONLY)

    def capture_of_a_copy(self: Any, loop: Any, *args: Any, **kwargs: Any) -> None:
        """A graph has baked in the addresses of what the speculator held: so has this copy."""
        self.frozen = copy.copy(loop.__self__)
        self.live = loop.__self__
        capture(self, MethodType(loop.__func__, self.frozen), *args, **kwargs)

    def fake_capture(self: Any, create: Any, progress_bar_desc: str = "") -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            create(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            run = lambda forward=forward: forward(CUDAGraphMode.NONE)  # noqa: E731
            self.graphs[desc] = FakeGraph(run, self.live, desc.num_reqs, found["replays"])
        self._graphs_captured = True

    def refresh(self: Any, metadata: dict[str, Any], padded: int) -> None:
        """The CPU's backend plans on the host, so it is planned anew; the backends of a GPU refresh in place."""
        n = found.get("requests") or padded
        shape = BatchExecutionDescriptor(CUDAGraphMode.FULL, padded, padded, uniform_token_count=1)
        new = self._build_uniform_attn_metadata(
            batch_desc=shape,
            num_reqs=n,
            num_query_per_req=1,
            seq_lens_cpu_upper_bound=self.input_buffers.seq_lens.clone(),
            step=0,
        )
        metadata.update(new)

    def prepare_and_tell(self: Any, batch: Any, rejected: Any, requests: int, padded: int) -> None:
        found["requests"] = requests
        if rebind:
            self.draft_tokens = self.draft_tokens.clone()
        for name in ("positions", "seq_lens", "input_ids"):  # of rows that no request owns
            getattr(self.input_buffers, name)[requests:padded] = 3
        self.input_buffers.query_start_loc[requests + 1 :] = torch.iinfo(torch.int32).max
        prepare(self, batch, rejected, requests, padded)

    graphed.init_cudagraph_manager, graphed._prepare = init_cudagraph_manager, prepare_and_tell
    graphed._update_draft_decode_metadata = refresh
    manager.capture, CudaGraphManager.capture = capture_of_a_copy, fake_capture


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """Calls as engine_process has them, with "blocks"; "replays": sizes of the graphs replayed."""
    found: dict[str, Any] = {"replays": []}
    if setting := job["env"].get(SETTING):
        install(found, rebind=setting == "rebound")
    with engine_process.opened(job) as llm:
        speculator = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator
        injection = getattr(speculator, "injection", None)
        if setting:
            if (filters := speculator._filters) is not None:  # as vLLM's warm-up leaves them, which is before capture
                filters.active = filters._any_top_k = True
                filters._requests, filters._top_k[:] = 1, 1
            speculator.capture()
            found["entries"] = [int(injection.entry.any()), int(injection.deltas[0].any())] if injection else [0, 0]
        pointers = [injection.entry.data_ptr(), injection.deltas.data_ptr()] if injection else []
        blocks: list[Any] = []
        record_blocks(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner, blocks)
        tokens = [[list(o.outputs[0].token_ids) for o in engine_process.run_call(llm, call)] for call in job["calls"]]
        if injection:
            assert pointers == [injection.entry.data_ptr(), injection.deltas.data_ptr()]
    by_request: dict[str, Any] = {}
    for request, position, drafts, _ in blocks:
        by_request.setdefault(request.split("-")[0], []).append([position, drafts])
    return {"calls": [found | {"tokens": tokens, "blocks": by_request}], "error": None, "metrics": {}}


@functools.cache
def run(model: str, method: str, setting: str, temperature: float = 0.0) -> dict[str, Any]:
    """Six requests, five at a time, that end one after the other."""
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    prompts = [[byte + 3 for byte in json.loads(line)["prompt"].encode()][: 9 + 5 * i] for i, line in enumerate(lines)]
    each = [{"max_tokens": 5 + 2 * i, "seed": i, "temperature": temperature} for i in range(len(prompts))]
    spec = {"model": str(PAIR / model), "num_speculative_tokens": K, "draft_sample_method": method}
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", str(ROOT))])
    runner = engines.Runner("v2", __file__, PYTHONPATH=path)
    keys = {"additional_config": {"vllm_steer": {"draft_graphs": bool(setting)}}, "max_num_seqs": 5}
    calls = [{"prompts": prompts, "sampling": each}]
    out = runner.run(PAIR / "target", spec, calls, {SETTING: setting} if setting else {}, **keys)
    runner.close()
    assert out["error"] is None, f"{out['error']}\n{out['log'][-5000:]}"
    return out["calls"][0] | {"log": out["log"]}


@pytest.mark.parametrize(
    ("model", "method", "temperature"),
    [
        ("steered", "greedy", 0.0),
        pytest.param("steered", "probabilistic", 0.9, marks=pytest.mark.slow),
        pytest.param("drafter", "greedy", 0.0, marks=pytest.mark.slow),
    ],
    ids=["steered", "steered-sampled", "plain"],
)
def test_replayed_drafts_are_the_eager_ones(model: str, method: str, temperature: float) -> None:
    eager, graphs = run(model, method, "", temperature), run(model, method, "on", temperature)
    assert graphs["entries"] == [0, 0], "no row may be steered while a graph is captured"
    assert set(graphs["replays"]) == set(SIZES) and eager["replays"] == []
    assert graphs["blocks"] == eager["blocks"] and graphs["tokens"] == eager["tokens"]
    rounds = {position for blocks in eager["blocks"].values() for position, _ in blocks}
    assert len(rounds) > 12


def test_a_buffer_bound_anew_shows() -> None:
    """The comparison can fail: a graph writes where the buffer was when it was captured."""
    eager, graphs = run("steered", "greedy", ""), run("steered", "greedy", "rebound")
    assert graphs["blocks"] != eager["blocks"]
    assert graphs["tokens"] == eager["tokens"], "wrong drafts are rejected: the output stays the target's"


def test_why_there_are_none_is_said(runners: Any) -> None:
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
    keys = {"additional_config": {"vllm_steer": {"draft_graphs": True}}}
    found = runners("v2").run(PAIR / "target", spec, [], **keys)
    assert found["error"] is None
    assert "draft_graphs: cudagraph_mode has no full graphs of decodes, so the drafter's passes" in found["log"]


if __name__ == "__main__":
    engine_process.main(serve_job)
