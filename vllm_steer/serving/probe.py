"""A vLLM engine opened for measuring: stepped from outside, its drafter timed, its memory and make-up read.

The engine runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0, set before vllm is imported): only then can its
workers be asked for times and memory. Every step of `LLMEngine` hands out what one scheduler step delivered, so a
request's share of it is one block. That also holds with asynchronous scheduling, where a step runs while the one before
is read: results still come back one scheduler step at a time, and a call may return nothing.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.reader import Counter

from vllm_steer.common import engine_options
from vllm_steer.common.lenience import Lenience
from vllm_steer.common.provenance import cpu_name
from vllm_steer.serving.plan import on_v2


@dataclass
class Delivery:
    """One answer as the engine delivered it."""

    steps: list[int] = field(default_factory=list)  # tokens per engine step, the prefill's first
    ids: list[int] = field(default_factory=list)
    finish: str | None = None  # "stop", "length", ...
    accepted: list[int] = field(default_factory=list)  # vLLM's own record: drafts accepted in each drafted step
    drafted: list[int] = field(default_factory=list)  # ... and proposed


@dataclass
class Clock:
    """Time and tokens, apart for steps in which a request was still without its first token, and all others."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    steps: list[tuple[int, float, int]] = field(default_factory=list)  # the others: requests, seconds, tokens


def open_engine(
    target: str,
    drafter: str | None,
    adapter: str | None,
    *,
    k: int,
    sampled: bool,
    batch: int,
    max_model_len: int,
    seed: int,
    options: dict[str, Any],
    tree: Sequence[int] | None = None,
    method: str | None = None,
    rows: int | None = None,
    blind: bool = False,
    lenience: Lenience | None = None,
    varying: bool = False,
) -> LLM:
    """An engine to be measured; without a drafter it does not speculate.

    `sampled`: whether a request may have a temperature above 0. `options` are further ones of vLLM's. `tree`: children
    of every node by depth, k deep; None: chains. `method`: vLLM's, of a block drafter; `rows`: of its trees; `blind`:
    its drafts do not depend on each other; `lenience`: what its output gives up; `varying`: its draft length, k at
    first, can be changed (`draft`).
    """
    options = (engine_options.for_trees() if tree is not None or rows is not None else {}) | options
    ours: dict[str, Any] = {"adapter": adapter, "tree": tree and list(tree), "tree_rows": rows}
    ours |= {"refine": False if blind else None, "lenience": lenience and asdict(lenience)}
    if ours := {key: value for key, value in ours.items() if value is not None}:
        additional = options.get("additional_config", {})
        options["additional_config"] = additional | {"vllm_steer": additional.get("vllm_steer", {}) | ours}
    if sampled:
        options = engine_options.for_sampling() | options
    if drafter is not None:
        options["per_request_spec_decode_metrics"] = "detailed"
        options["speculative_config"] = _speculative_config(drafter, k, sampled, method)
        if varying:
            options["speculative_config"]["num_speculative_tokens_per_batch_size"] = [[1, batch, k]]
    return LLM(
        target,
        **options,
        max_model_len=max_model_len,
        max_num_seqs=batch,
        seed=seed,
        enable_prefix_caching=False,  # a full hit is answered with placeholder drafts
        disable_log_stats=False,
    )


def _speculative_config(drafter: str, k: int, sampled: bool, method: str | None) -> dict[str, Any]:
    # Sampled requests lose acceptance with greedy drafts.
    drafts = "probabilistic" if sampled and method != "medusa" else "greedy"
    found: dict[str, Any] = {"model": drafter, "num_speculative_tokens": k, "draft_sample_method": drafts}
    return found if method is None else found | {"method": method}


def drive(
    llm: LLM,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    sampling: dict[str, Any] | None = None,
    finished: Callable[[], None] = lambda: None,
    before_step: Callable[[bool], None] = lambda prefilling: None,
) -> tuple[list[Delivery], Clock]:
    """Answer prompts (token ids), `batch` at a time, stepping the engine; request i is sampled with seed + i.

    `sampling` has further parameters of vLLM's; without them every one is neutral.
    `finished` is called for each answer, `before_step` with whether a request still waits for its first token.
    """
    engine, clock = llm.llm_engine, Clock()
    answers = [Delivery() for _ in prompts]
    waiting = deque(range(len(prompts)))
    live: set[int] = set()
    common: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens} | (sampling or {})
    common["output_kind"] = RequestOutputKind.DELTA
    while waiting or live:
        while waiting and len(live) < batch:
            live.add(i := waiting.popleft())
            asked = SamplingParams(**common, seed=seed + i if temperature else None)
            engine.add_request(str(i), {"type": "token", "prompt_token_ids": prompts[i]}, asked)
        prefilling = any(not answers[i].steps for i in live)
        before_step(prefilling)
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        tokens, serving = 0, len(live)
        for out in outputs:
            assert isinstance(out, RequestOutput)  # not a pooling model's
            i, delta = int(out.request_id), out.outputs[0]
            tokens += len(delta.token_ids)
            _deliver(answers[i], delta)
            if out.finished:
                live.remove(i)
                finished()
        if prefilling:
            clock.prefill_seconds += seconds
            clock.prefill_tokens += tokens
        else:
            clock.steps.append((serving, seconds, tokens))
            clock.decode_seconds += seconds
            clock.decode_tokens += tokens
    return answers, clock


def _deliver(answer: Delivery, delta: Any) -> None:
    answer.ids += delta.token_ids
    if delta.token_ids:
        answer.steps.append(len(delta.token_ids))
    answer.finish = delta.finish_reason
    if (metrics := delta.spec_decode_metrics) is not None:
        answer.accepted, answer.drafted = list(metrics.per_step_accepted), list(metrics.per_step_drafted)


def can_vary(llm: LLM) -> bool:
    """Whether `draft` can change the draft length: of an engine opened so, on V1. V2 makes every pass at any length."""
    return _scheduler(llm).dynamic_sd_lookup is not None and not on_v2(llm.llm_engine.vllm_config)


def draft(llm: LLM, k: int) -> None:
    """From now on draft k tokens per block, up to those the engine was opened with; while no request runs."""
    lookup = _scheduler(llm).dynamic_sd_lookup  # by batch size
    lookup[:] = [k] * len(lookup)


def _scheduler(llm: LLM) -> Any:
    core: Any = llm.llm_engine.engine_core
    return core.engine_core.scheduler


def preemptions(llm: LLM) -> int:
    """Requests vLLM has preempted so far: it answers their return with placeholder drafts."""
    return sum(m.value for m in llm.get_metrics() if isinstance(m, Counter) and m.name == "vllm:num_preemptions")


# --- asked of the workers, by llm.collective_rpc --------------------------------------------------------------------


def is_steered(worker: Any) -> bool:
    """Whether this worker's drafter is steered."""
    return getattr(_drafter(worker), "injection", None) is not None


def scale(worker: Any) -> float | None:
    """What this worker multiplies every delta by; None for a drafter that is not steered."""
    injection = getattr(_drafter(worker), "injection", None)
    return None if injection is None else float(injection.scale)


def own_sampling(llm: LLM) -> dict[str, Any]:
    """What the model's generation_config asks for beside the temperature, as a server applies it by default."""
    found = llm.llm_engine.model_config.get_diff_sampling_param()
    return {name: value for name, value in found.items() if name not in ("temperature", "max_tokens")}


def start_timing(worker: Any) -> None:
    """Time every proposal from now on; the device is synchronised around each."""
    drafter = _drafter(worker)
    propose = drafter.propose

    def timed(*args: Any, **keys: Any) -> Any:
        _synchronise()
        start = time.perf_counter()
        try:
            return propose(*args, **keys)
        finally:
            _synchronise()
            drafter.bench_seconds += time.perf_counter() - start

    drafter.bench_seconds = 0.0
    drafter.propose = timed


def reset_timing(worker: Any) -> None:
    """Forget the proposals so far."""
    _drafter(worker).bench_seconds = 0.0


def stop_timing(worker: Any) -> float:
    """Seconds in proposals since the start or the last reset; the drafter is as it was."""
    drafter = _drafter(worker)
    del drafter.propose  # the timer stood in the instance, before the class's own
    return drafter.bench_seconds


def memory(worker: Any) -> dict[str, int]:
    """Peak bytes of this worker: its process's resident set, and on a GPU what torch allocated and reserved."""
    found = {"resident": _peak_resident()}
    if torch.accelerator.is_available():
        caches = [c for c in worker.model_runner.kv_caches if isinstance(c, torch.Tensor)]
        found["allocated"] = torch.accelerator.max_memory_allocated()
        found["reserved"] = torch.accelerator.max_memory_reserved()
        found["kv_cache"] = sum({s.data_ptr(): s.nbytes() for s in (c.untyped_storage() for c in caches)}.values())
    return found


def describe(llm: LLM) -> dict[str, Any]:
    """What runs on what: model runner, arithmetic, scheduling, processors."""
    import vllm

    config = llm.llm_engine.vllm_config
    found: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "runner": "V2" if on_v2(config) else "V1",
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "eager": config.model_config.enforce_eager,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name()] * config.parallel_config.world_size
    return found


def _drafter(worker: Any) -> Any:
    """V1 calls it drafter, V2 speculator; None without speculation."""
    runner = worker.model_runner
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _peak_resident() -> int:
    """High-water mark of this process's resident memory in bytes (not getrusage: that starts at the parent's)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
