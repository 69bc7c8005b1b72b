"""vLLM's engine fed token ids and read answer by answer: in this process, or one in each actor of Ray Data.

Every request has its own seed, so an answer does not depend on what else is in the batch, on the order, or on the
machine, as far as floating point allows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from vllm_steer.common import engine_options
from vllm_steer.common.errors import SteeringError

BATCH = 8  # requests a Ray task carries: answers reach the driver, and are safe, in groups of these
TASKS = 64  # tasks an actor works on at once; BATCH * TASKS requests are offered to its engine


@dataclass(frozen=True)
class Request:
    """One answer to be written. `id` and `sample` name it, `seed` decides it."""

    id: str
    sample: int
    category: str | None
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built and samples; `options` are further engine arguments of vLLM."""

    model: str
    max_model_len: int | None
    max_tokens: int
    temperature: float
    options: dict[str, Any]
    sampling: str = "neutral"  # or "served": what the model's generation_config asks for beside the temperature


class Engine:
    """One vLLM engine. `add` requests while it is not `full`; `step` returns the rows that finished."""

    def __init__(self, config: EngineConfig):
        # In this process: a `kill -9` then leaves no engine behind that holds the device, and there is no work here
        # that would overlap with it.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            from vllm import LLM
        except ImportError as error:
            raise SteeringError(f"this needs vLLM ({error}): pip install 'vllm-steer[gpu]', or [cpu]") from error
        options = engine_options.for_sampling() | config.options
        self.config = config
        try:
            self._llm = LLM(config.model, max_model_len=config.max_model_len, **options)
        except SteeringError:
            raise
        except (TypeError, ValueError) as error:
            raise SteeringError(f"vLLM does not start {config.model} with these options: {error}") from error
        self._engine = self._llm.llm_engine
        self.context = self._engine.model_config.max_model_len
        self._window = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs  # running, and as many ready to
        own = self._engine.model_config.get_diff_sampling_param() if config.sampling == "served" else {}
        self.own_sampling = {key: value for key, value in own.items() if key not in ("temperature", "max_tokens")}
        self._open: dict[str, Request] = {}
        self._refused: list[dict[str, Any]] = []
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._open or self._refused)

    @property
    def full(self) -> bool:
        """Whether further requests would only queue."""
        return len(self._open) >= self._window

    def add(self, request: Request) -> None:
        """Queue a request. One whose prompt leaves no room for an answer comes back with the key "dropped"."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not 0 < len(request.prompt_ids) < self.context:
            reason = f"{len(request.prompt_ids)} tokens, allowed are 1 to {self.context - 1}"
            self._refused.append({"id": request.id, "sample": request.sample, "dropped": reason})
            return
        sampling = SamplingParams(
            **self.own_sampling,
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
            seed=request.seed,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._count += 1
        self._open[str(self._count)] = request
        self._engine.add_request(str(self._count), {"type": "token", "prompt_token_ids": request.prompt_ids}, sampling)

    def step(self) -> list[dict[str, Any]]:
        """One forward pass of the engine; the rows that are complete after it, as they are written to the file."""
        from vllm import RequestOutput

        rows, self._refused = self._refused, []
        for output in self._engine.step() if self._open else []:
            if output.finished:
                assert isinstance(output, RequestOutput)  # not a pooling model's
                request, answer = self._open.pop(output.request_id), output.outputs[0]
                if answer.finish_reason not in ("stop", "length"):
                    raise SteeringError(f"vLLM gave up on prompt {request.id}: {answer.finish_reason}")
                rows.append(
                    {
                        "id": request.id,
                        "sample": request.sample,
                        "category": request.category,
                        "prompt_ids": request.prompt_ids,
                        "response_ids": list(answer.token_ids),
                        "finish": answer.finish_reason,
                    }
                )
        return rows

    def run(self, requests: Iterable[Request]) -> Iterator[dict[str, Any]]:
        """Rows of all requests as they finish, keeping the engine full."""
        for request in requests:
            self.add(request)
            while self.full:
                yield from self.step()
        while self.busy:
            yield from self.step()

    def close(self) -> None:
        """Release the device."""
        self._engine.engine_core.shutdown()


# --- Ray ------------------------------------------------------------------------------------------------------------


class Worker:
    """An engine in a Ray actor. Ray calls it with one batch per thread; a thread of its own steps for all of them."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._inbox: queue.SimpleQueue[tuple[Request, Future]] = queue.SimpleQueue()
        threading.Thread(target=self._drive, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """A batch of requests in JSON to their rows in JSON (strings: Arrow has nothing to guess)."""
        futures: list[Future[Any]] = []
        for text in batch["request"]:
            futures.append(Future())
            self._inbox.put((Request(**json.loads(text)), futures[-1]))
        try:
            rows = [future.result() for future in futures]
        except SteeringError as error:  # Ray would bury the message under tracebacks
            rows = [{"error": str(error)}]
        return {"row": [json.dumps(row) for row in rows]}

    def _drive(self) -> None:
        waiting: dict[tuple[str, int], Future] = {}
        try:
            engine = Engine(self._config)
            while True:
                while not engine.full:
                    try:
                        request, future = self._inbox.get(block=not engine.busy)
                    except queue.Empty:
                        break
                    waiting[request.id, request.sample] = future
                    engine.add(request)
                for row in engine.step():
                    waiting.pop((row["id"], row["sample"])).set_result(row)
        except BaseException as error:
            for future in waiting.values():
                future.set_exception(error)
            while True:  # later callers get the same answer
                self._inbox.get()[1].set_exception(error)


def run_on_ray(config: EngineConfig, requests: Iterable[Request], workers: int) -> Iterator[dict[str, Any]]:
    """Rows of all requests as they finish, from `workers` engines, one per actor, on the cluster Ray finds.

    An actor that dies is restarted by Ray and its open batches are run again, so a row can come twice, the same.
    Raises SteeringError when Ray is missing or the cluster is too small.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise SteeringError(f"--ray needs Ray ({error}): pip install 'vllm-steer[ray]'") from error
    if not ray.is_initialized():
        ray.init()  # a cluster named by RAY_ADDRESS, else a new one on this machine
    devices = config.options.get("tensor_parallel_size", 1)
    have = ray.cluster_resources()
    kind = "GPU" if have.get("GPU", 0) else "CPU"
    if have.get(kind, 0) < devices * workers:
        raise SteeringError(
            f"{workers} workers need {devices * workers} {kind}s and the Ray cluster has {int(have.get(kind, 0))}: "
            "lower --workers, or join more machines"
        )
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    items = [{"request": json.dumps(dataclasses.asdict(request))} for request in requests]
    rows = ray.data.from_items(items, override_num_blocks=-(-len(items) // BATCH)).map_batches(
        Worker,
        fn_constructor_args=[config],
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(
            size=workers, max_tasks_in_flight_per_actor=TASKS, enable_true_multi_threading=True
        ),
        max_concurrency=TASKS,
        **{"num_gpus" if kind == "GPU" else "num_cpus": devices},
    )
    for found in rows.iter_rows():
        row = json.loads(found["row"])
        if "error" in row:
            raise SteeringError(row["error"])
        yield row
