"""Real vLLM engines for tests: a process per model runner that builds engines, runs prompts and records drafts.

The two runners are chosen by environment variables that vLLM reads when it is imported, so each lives in a process of
its own, started once per test session and fed one JSON job per line. V2 runs without a GPU on Triton's interpreter:
`make triton` puts Triton where only that process sees it.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 900  # seconds for one job, far beyond the longest: a test that hangs must end
DELTAS = 8  # numbers of a delta that tests look at
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


# In every process of a server, before vLLM is imported.
INTERPRETER = "import os, engines\nengines.pretend_triton_has_a_cpu_backend(os.environ['STEER_TEST_TRITON'])\n"


def server_env(runner: str, directory: Path) -> dict[str, str]:
    """What a `vllm serve` of this runner needs: for V2 here, an interpreter's start (in `directory`) that prepares
    Triton in each of its processes."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | runner_env(runner)
    if "STEER_TEST_TRITON" in env:
        (directory / "sitecustomize.py").write_text(INTERPRETER)
        paths = [str(directory), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return env


class Runner:
    """Client of one engine process; `script` is what runs there."""

    def __init__(self, runner: str, script: str = __file__, **env: str):
        self.name = runner
        self._done: dict[str, dict[str, Any]] = {}
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, script],
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

        "sampling" may be a list, one for each prompt, and so may "lora" (a directory or None); with "abort":
        {"after": steps, "prompts": [indices]} those prompts are aborted after that many engine steps, with "steer":
        {"after": steps, "scale": number} the switch is thrown then (its answers: "switched"), with "kill": {"after":
        steps, "rank": number} that worker is killed, where workers are Ray's actors. A call marked
        "refused" may be refused by vLLM; its result is then {"refused": vLLM's sentence}. "continues": i puts the
        prompts and answers of call i before the one prompt of this call.

        Returns {"calls": [{"tokens": [[ids]], "blocks": [[[position, [drafts]], ...] per prompt]}], "log": text,
        "error": None or the exception's text, "metrics": vLLM's counters}. A block's position is that of the newest
        token it continues; "deltas" [[position, the first DELTAS numbers of the delta it was drafted under], ...] go
        with the blocks. See `describe` and `watch_steering` for the rest of a call's result.
        """
        job = {"target": str(target), "spec": spec, "calls": calls, "env": env or {}, "llm": LLM_KEYS | llm}
        if (key := json.dumps(job, sort_keys=True)) in self._done:
            return self._done[key]
        mark = os.fstat(self._log.fileno()).st_size
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        hung = threading.Timer(PATIENCE, self._process.kill)  # its end is an empty line
        hung.start()
        line = self._process.stdout.readline()
        hung.cancel()
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


def assert_steered(call: dict[str, Any], lengths: set[int]) -> None:
    """Assert of one call's result that every proposal made as many passes as `lengths` says, and that steering changed
    at least a row for each request past its prompt in the first pass, and every request's row in the others."""
    assert sum(r["decoding"] for r in call["rounds"]) > 0, "nothing was drafted"
    for r in call["rounds"]:
        assert len(r["rows"]) in lengths and r["rows"][0] >= r["decoding"], r
        assert r["rows"][1:] == [r["requests"]] * (len(r["rows"]) - 1), r


@functools.cache
def _in_hugging_face(target: Path, steered: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_steer.drafters.steered import checkpoint

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval(), checkpoint.load(steered)


def assert_own_guides(call: dict[str, Any], target: Path, steered: Path, prompts: list[list[int]]) -> None:
    """Assert of one call's result that every proposal for every prompt was made under that prompt's own guide: the
    target's states, by Hugging Face, at the last position before the newest token of what this request really said."""
    import torch

    model, steering = _in_hugging_face(target, steered)
    compared = 0
    for prompt, answer, found in zip(prompts, call["tokens"], call["deltas"], strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
            want = steering(torch.cat([states[i][0] for i in steering.config.target_layer_ids], -1))[:, 0, :DELTAS]
        known = [(position - 1, delta) for position, delta in found if position <= len(want)]  # or a stop cut it off
        assert known, f"nothing was drafted for the prompt of {len(prompt)} tokens"
        got, want = torch.tensor([delta for _, delta in known]), want[[position for position, _ in known]]
        assert want.std(0).max() > 0.1 or len(known) == 1, "deltas alike would not tell one guide from another"
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        compared += len(known)
    assert compared > len(prompts)


# --- the engine process ---------------------------------------------------------------------------------------------


def record_blocks(model_runner: Any, blocks: list[tuple[str, int, list[int], list[float]]]) -> None:
    """Append (request id, position of the newest token, drafts, DELTAS numbers of its delta in the first steered layer;
    none of a plain drafter) for every proposal of a live engine."""
    v1 = hasattr(model_runner, "drafter")
    proposer = model_runner.drafter if v1 else model_runner.speculator
    original, injection = proposer.propose, getattr(proposer, "injection", None)

    def append(requests: list[str], newest: list[int], drafts: list[list[int]]) -> None:
        used = injection.deltas[1:, 0, :DELTAS].tolist() if injection else [[]] * len(newest)
        blocks.extend(zip(requests, newest, drafts, used, strict=False))

    def of_v1(**keys: Any) -> Any:
        last = keys["common_attn_metadata"].query_start_loc[1:] - 1
        if keys["num_rejected_tokens_gpu"] is not None:
            last = last - keys["num_rejected_tokens_gpu"]
        newest = (keys["target_positions"][last] + 1).tolist()
        drafts = original(**keys)
        append(model_runner.input_batch.req_ids, newest, drafts.tolist())
        return drafts

    def of_v2(batch: Any, *args: Any, **keys: Any) -> Any:
        last = batch.query_start_loc[1 : batch.num_reqs + 1] - 1 - args[5][: batch.num_reqs]
        newest = (batch.positions[last] + 1).tolist()
        drafts = original(batch, *args, **keys)
        append(batch.req_ids, newest, drafts.tolist())
        return drafts

    proposer.propose = of_v1 if v1 else of_v2


def watch_steering(model_runner: Any, rounds: list[dict[str, Any]]) -> None:
    """Append {"requests", "decoding", "rows"} for every proposal: how many requests, how many past their prompt, and
    in how many rows of each draft pass steering really changed what the first steered layer multiplies."""
    v1 = hasattr(model_runner, "drafter")
    proposer = model_runner.drafter if v1 else model_runner.speculator
    wrappers = [m for m in proposer.model.modules() if type(m).__name__ == "SteeredActivation"]
    rows: list[int] = []
    before: list[Any] = []

    def changed(_: Any, args: tuple[Any, ...]) -> None:
        if before:  # some families have one activation for all layers: the others' calls are not this wrapper's
            rows.append(int((args[0] != before.pop()).any(-1).sum()))

    if wrappers:
        wrappers[0].register_forward_pre_hook(lambda _, args: before.append(args[0].clone()))
        wrappers[0].act_fn.register_forward_pre_hook(changed)
    original = proposer.propose

    def propose(*args: Any, **keys: Any) -> Any:
        rows.clear()
        drafts = original(*args, **keys)
        if v1:
            metadata, n = keys["common_attn_metadata"], keys["common_attn_metadata"].batch_size()
            prompt = model_runner.input_batch.num_prompt_tokens[:n]
            length = metadata.seq_lens[:n].numpy()
        else:
            n, prompt = args[0].num_reqs, args[0].prefill_len_np[: args[0].num_reqs]
            length = args[0].seq_lens[:n].numpy()
        rounds.append({"requests": n, "decoding": int((length >= prompt).sum()), "rows": list(rows)})
        return drafts

    proposer.propose = propose


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def linear_methods(model_runner: Any) -> dict[str, list[str]]:
    """Names of vLLM's methods by which the linear layers of target and drafter multiply."""
    proposer = getattr(model_runner, "drafter", None) or getattr(model_runner, "speculator", None)
    models = {"target": model_runner.model} | ({"drafter": proposer.model} if proposer else {})
    names = lambda model: {type(m.quant_method).__name__ for m in model.modules() if hasattr(m, "quant_method")}  # noqa: E731
    return {role: sorted(name for name in names(model) if "Linear" in name) for role, model in models.items()}


def sampling_params(options: dict[str, Any]) -> Any:
    """vLLM's SamplingParams of JSON options: greedy and 32 tokens unless told; "structured_outputs" as an object."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True} | options
    if structured := options.pop("structured_outputs", None):
        options["structured_outputs"] = StructuredOutputsParams(**structured)
    if bias := options.pop("logit_bias", None):
        options["logit_bias"] = {int(token): value for token, value in bias.items()}
    return SamplingParams(**options)


def run_call(llm: Any, call: dict[str, Any]) -> list[Any]:
    """vLLM's RequestOutputs of one call of a job, in the order of its prompts."""
    from vllm.lora.request import LoRARequest

    prompts, n = [{"prompt_token_ids": p} for p in call["prompts"]], len(call["prompts"])
    each = lambda value: value if isinstance(value, list) else [value] * n  # noqa: E731
    sampling = [sampling_params(s) for s in each(call["sampling"])]
    paths = each(call.get("lora"))
    loras = [path and LoRARequest(path, 1 + paths.index(path), path) for path in paths]
    if not {"abort", "steer", "kill"} & call.keys():
        return llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras)
    engine, last, step = llm.llm_engine, {}, 0
    for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        engine.add_request(str(i), {"type": "token"} | prompt, params)
    while engine.has_unfinished_requests():
        if "abort" in call and step == call["abort"]["after"]:
            engine.abort_request([str(i) for i in call["abort"]["prompts"]])
        if "steer" in call and step == call["steer"]["after"]:
            call["switched"] = llm.collective_rpc("steer", args=(call["steer"]["scale"],))
        if "kill" in call and step == call["kill"]["after"]:
            import ray

            executor = engine.engine_core.engine_core.model_executor
            ray.kill(executor.ray_worker_handles[call["kill"]["rank"]].actor)
        last |= {out.request_id: out for out in engine.step()}
        step += 1
    return [last[str(i)] for i in range(n)]


def describe(outs: list[Any]) -> dict[str, Any]:
    """What a call produced, one entry for each prompt: tokens, the tokens of all its samples, text, why it ended, how
    many tokens of the prompt came from the prefix cache."""
    number = lambda rows: [row and {str(t): p.logprob for t, p in row.items()} for row in rows or []]  # noqa: E731
    firsts = [o.outputs[0] for o in outs]
    return {
        "tokens": [list(c.token_ids) for c in firsts],
        "all": [[list(c.token_ids) for c in o.outputs] for o in outs],
        "texts": [c.text for c in firsts],
        "ends": [[c.finish_reason, c.stop_reason] for c in firsts],
        "logprobs": [number(c.logprobs) for c in firsts],
        "prompt_logprobs": [number(o.prompt_logprobs) for o in outs],
        "cached": [o.num_cached_tokens for o in outs],
    }


@contextmanager
def opened(job: dict[str, Any], **more: Any) -> Iterator[Any]:
    """The vLLM engine of a job, shut down at the end; `more` are further options of it."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(job["target"], speculative_config=job["spec"], **job["llm"], **more)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of `Runner.run` in this process."""
    from vllm.exceptions import VLLMValidationError

    with opened(job) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        blocks: list[tuple[str, int, list[int], list[float]]] = []
        rounds: list[dict[str, Any]] = []
        if job["spec"]:
            record_blocks(worker.model_runner, blocks)
            watch_steering(worker.model_runner, rounds)
        results = []
        for call in job["calls"]:
            blocks.clear()
            rounds.clear()
            if (before := call.get("continues")) is not None:
                earlier = zip(job["calls"][before]["prompts"], results[before]["tokens"], strict=True)
                call["prompts"] = [prompt + tokens + call["prompts"][0] for prompt, tokens in earlier]
            try:
                outs = run_call(llm, call)
            except VLLMValidationError as error:
                if not call.get("refused"):
                    raise
                results.append({"refused": str(error)})
                continue
            by_request: dict[int, list[Any]] = {}
            for request, *block in blocks:  # vLLM's id is "<index>-<random>"
                by_request.setdefault(int(request.split("-")[0].split("_")[-1]), []).append(block)
            made = [by_request.get(int(o.request_id.split("-")[0]), []) for o in outs]
            results.append(
                describe(outs)
                | {
                    "blocks": [[[position, drafts] for position, drafts, _ in each] for each in made],
                    "deltas": [[[position, delta] for position, _, delta in each] for each in made],
                    "rounds": list(rounds),
                    "switched": call.get("switched"),
                }
            )
        counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        found = {
            "async_scheduling": bool(llm.llm_engine.vllm_config.scheduler_config.async_scheduling),
            "linear": linear_methods(worker.model_runner),
        }
        return {"calls": results, "error": None, "metrics": counters} | found


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


def main(serve: Callable[[dict[str, Any]], dict[str, Any]] = serve_job) -> None:
    """Answer jobs from standard input, one JSON object a line, until it ends."""
    if path := os.environ.get("STEER_TEST_TRITON"):
        pretend_triton_has_a_cpu_backend(path)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not reach the answers
    for line in sys.stdin:
        job = json.loads(line)
        with environment(job["env"]):
            try:
                answer = serve(job)
            except BaseException as error:
                traceback.print_exc()
                answer = {"calls": [], "error": f"{type(error).__name__}: {error}"}
        gc.collect()  # the engine and its KV cache, before the next job makes its own
        sys.stderr.flush()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
