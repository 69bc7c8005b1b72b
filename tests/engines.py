"""Real vLLM engines for tests: a process per model runner that builds engines, runs prompts and records drafts.

The two runners are chosen by environment variables that vLLM reads when it is imported, so each lives in a process of
its own, started once per test session and fed one JSON job per line. V2 runs without a GPU on Triton's interpreter:
`make triton` puts Triton where only that process sees it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRITON = Path(sys.prefix) / "share" / "triton-interpreter"
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "TOKENIZERS_PARALLELISM": "false",
}
LLM_KEYS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "gpu_memory_utilization": 0.3,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "block_size": 32,
    "seed": 0,
}


def runner_env(runner: str) -> dict[str, str]:
    """The environment under which vLLM uses model runner "v1" or "v2" on the CPU."""
    if runner == "v1":
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    assert (TRITON / "triton").is_dir(), f"Triton is not in {TRITON}: run `make triton` (V2 needs its interpreter here)"
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "STEER_TEST_TRITON": str(TRITON)}


class Runner:
    """Client of one engine process."""

    def __init__(self, runner: str, **env: str):
        self.name = runner
        self._done: dict[str, dict[str, Any]] = {}
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | ENV | runner_env(runner) | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(
        self,
        target: Path,
        spec: dict[str, Any] | None,
        calls: list[dict[str, Any]],
        env: dict[str, str] | None = None,
        **llm: Any,
    ) -> dict[str, Any]:
        """Build one engine, run `calls` ({"prompts": [[ids]], "sampling": {...}}), close it; once per distinct job.

        Returns {"calls": [{"tokens": [[ids]], "blocks": [[[position, [drafts]], ...] per prompt]}], "log": text,
        "error": None or the exception's text, "metrics": vLLM's counters}. A block's position is that of the newest
        token it continues.
        """
        job = {"target": str(target), "spec": spec, "calls": calls, "env": env or {}, "llm": LLM_KEYS | llm}
        if (key := json.dumps(job, sort_keys=True)) in self._done:
            return self._done[key]
        mark = os.fstat(self._log.fileno()).st_size
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        self._log.seek(mark)
        log = self._log.read().decode(errors="replace")
        assert line, f"the {self.name} engine process died:\n{log[-4000:]}"
        self._done[key] = json.loads(line) | {"log": log}
        return self._done[key]

    def generate(self, target: Path, spec: dict[str, Any] | None, prompts: list[list[int]], **keys: Any) -> dict:
        """`run` for one call; sampling options max_tokens, temperature, ... and engine options by name."""
        names = ("max_tokens", "temperature", "seed", "top_p", "n", "logprobs")
        sampling = {k: keys.pop(k) for k in names if k in keys}
        out = self.run(target, spec, [{"prompts": prompts, "sampling": sampling}], **keys)
        assert out["error"] is None, f"{out['error']}\n{out['log'][-6000:]}"
        return out["calls"][0] | {"log": out["log"], "metrics": out["metrics"]}

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


# --- the engine process ---------------------------------------------------------------------------------------------


def record_blocks(model_runner: Any, blocks: list[tuple[str, int, list[int]]]) -> None:
    """Append (request id, position of the newest token, drafts) for every proposal of a live engine."""
    v1 = hasattr(model_runner, "drafter")
    proposer = model_runner.drafter if v1 else model_runner.speculator
    original = proposer.propose

    def of_v1(**keys: Any) -> Any:
        last = keys["common_attn_metadata"].query_start_loc[1:] - 1
        if keys["num_rejected_tokens_gpu"] is not None:
            last = last - keys["num_rejected_tokens_gpu"]
        newest = (keys["target_positions"][last] + 1).tolist()
        drafts = original(**keys)
        blocks.extend(zip(model_runner.input_batch.req_ids, newest, drafts.tolist(), strict=False))
        return drafts

    def of_v2(batch: Any, *args: Any, **keys: Any) -> Any:
        last = batch.query_start_loc[1 : batch.num_reqs + 1] - 1 - args[5][: batch.num_reqs]
        newest = (batch.positions[last] + 1).tolist()
        drafts = original(batch, *args, **keys)
        blocks.extend(zip(batch.req_ids, newest, drafts.tolist(), strict=True))
        return drafts

    proposer.propose = of_v1 if v1 else of_v2


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of `Runner.run` in this process."""
    import gc

    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(job["target"], speculative_config=job["spec"], **job["llm"])
    try:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        blocks: list[tuple[str, int, list[int]]] = []
        if job["spec"]:
            record_blocks(worker.model_runner, blocks)
        results = []
        for call in job["calls"]:
            sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 32, "ignore_eos": True} | call["sampling"]))
            blocks.clear()
            outs = llm.generate([{"prompt_token_ids": p} for p in call["prompts"]], sampling, use_tqdm=False)
            by_request: dict[int, list[Any]] = {}
            for request, position, drafts in blocks:  # vLLM's id is "<index>-<random>"
                by_request.setdefault(int(request.split("-")[0].split("_")[-1]), []).append([position, drafts])
            results.append(
                {
                    "tokens": [list(o.outputs[0].token_ids) for o in outs],
                    "all": [[list(c.token_ids) for c in o.outputs] for o in outs],
                    "blocks": [by_request.get(int(o.request_id.split("-")[0]), []) for o in outs],
                }
            )
        counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        return {"calls": results, "error": None, "metrics": counters}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def pretend_triton_has_a_cpu_backend(path: str) -> None:
    """Make vLLM's CPU build, and inductor, accept a Triton that only interprets.

    vLLM wants the key "cpu" among Triton's backends; inductor asks the active driver and its compiler for a hash.
    """
    import types

    sys.path.insert(0, path)
    import triton.backends
    from triton.backends.compiler import GPUTarget

    driver = type(
        "InterpreterDriver",
        (),
        {
            "is_active": staticmethod(lambda: True),
            "get_current_target": lambda self: GPUTarget("cpu", 0, 1),
            "get_active_torch_device": lambda self: __import__("torch").device("cpu"),
        },
    )
    compiler = type(
        "InterpreterCompiler",
        (),
        {
            "__init__": lambda self, target: None,
            "supports_target": staticmethod(lambda target: target.backend == "cpu"),
            "hash": lambda self: "interpreter",
        },
    )
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=compiler)
    _fill_the_interpreters_gaps()


def _fill_the_interpreters_gaps() -> None:
    """What vLLM's probabilistic drafts use and Triton 3.9 cannot interpret: `mask & scalar` in a store, and log1p."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    libdevice.log1p = lambda x: tl.log(1.0 + x)

    builder = interpreter.InterpreterBuilder
    original = builder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, policy: Any) -> Any:
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return original(self, ptrs, value, mask, policy)

    builder.create_masked_store = create_masked_store


def main() -> None:
    if path := os.environ.get("STEER_TEST_TRITON"):
        pretend_triton_has_a_cpu_backend(path)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not reach the answers
    for line in sys.stdin:
        job = json.loads(line)
        with environment(job["env"]):
            try:
                answer = serve_job(job)
            except BaseException as error:
                traceback.print_exc()
                answer = {"calls": [], "error": f"{type(error).__name__}: {error}"}
        sys.stderr.flush()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
