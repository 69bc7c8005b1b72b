"""The process of engines.Runner: it reads jobs from standard input, builds an engine for each, and runs its calls."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import interpreter
from recording import linear_methods, record_blocks, watch_steering


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


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
    if not {"abort", "steer", "refine", "kill"} & call.keys():
        return llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras)
    engine, last, step = llm.llm_engine, {}, 0
    for i, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        engine.add_request(str(i), {"type": "token"} | prompt, params)
    while engine.has_unfinished_requests():
        if "abort" in call and step == call["abort"]["after"]:
            engine.abort_request([str(i) for i in call["abort"]["prompts"]])
        if "steer" in call and step == call["steer"]["after"]:
            call["switched"] = llm.collective_rpc(
                "steer", kwargs={k: v for k, v in call["steer"].items() if k != "after"}
            )
        if "refine" in call and step == call["refine"]["after"]:
            call["switched"] = llm.collective_rpc("refine", args=(call["refine"]["on"],))
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


def plant(fault: str | None) -> None:
    """Break draft trees on purpose, from now on in this process: "forks" or "commits" copy no pages."""
    if fault is None:
        return
    from vllm_steer.serving.trees import layout

    original = getattr(layout.Rows, fault)

    def onto_itself(rows: Any) -> Any:
        source, to = original(rows)
        return (source, source) if fault == "forks" else (to, to)

    setattr(layout.Rows, fault, onto_itself)


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of `Runner.run` in this process."""
    from vllm.exceptions import VLLMValidationError

    plant(os.environ.get("STEER_TEST_FAULT"))
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


def main(serve: Callable[[dict[str, Any]], dict[str, Any]] = serve_job) -> None:
    """Answer jobs from standard input, one JSON object a line, until it ends."""
    if path := os.environ.get("STEER_TEST_TRITON"):
        interpreter.pretend_triton_has_a_cpu_backend(path)
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
