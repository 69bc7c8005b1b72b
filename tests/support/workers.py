"""Engines of several workers for tests: engines.py's jobs, recorded in every worker process, wherever it runs.

`several("tensor")` starts a process whose engines have vLLM's own worker processes, `several("ray")` one with a Ray
cluster of its own. Jobs with one worker run there too, so that nothing else differs; so do jobs on a vLLM that is not
the one installed: see `pretended`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_process
import engines
import recording
from repository import SUPPORT


def several(kind: str, directory: Path, runner: str = "v1") -> engines.Runner:
    """A process for engines of several workers; `kind` is "tensor" or "ray". Its workers start in `directory`'s way."""
    path = os.pathsep.join(p for p in (str(SUPPORT), os.environ.get("PYTHONPATH", "")) if p)
    more = {"PYTHONPATH": path} | engines.server_env(runner, directory)
    more |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}  # each worker would take all cores
    if kind == "ray":
        patient = {"RAY_CGRAPH_get_timeout": "120"}  # seconds for a step, of 10: this machine may be busy
        more |= {"STEER_TEST_RAY": "1", "RAY_DEDUP_LOGS": "0"} | patient
    return engines.Runner(runner, __file__, **more)


# --- asked of the workers, by llm.collective_rpc --------------------------------------------------------------------


def start_recording(worker: Any) -> None:
    """Record every proposal of this worker."""
    runner = worker.model_runner
    runner.test_blocks, runner.test_rounds = [], []
    recording.record_blocks(runner, runner.test_blocks)
    recording.watch_steering(runner, runner.test_rounds)


def take_records(worker: Any) -> dict[str, Any]:
    """What this worker did since it was last asked; "deltas" [L, F share] are those of the batch's first row."""
    runner = worker.model_runner
    injection = getattr(getattr(runner, "drafter", None) or runner.speculator, "injection", None)
    found = {
        "pid": os.getpid(),
        "rank": worker.rank,
        "ray_actor": "ray" in sys.modules and sys.modules["ray"].get_runtime_context().get_actor_id() is not None,
        "blocks": list(runner.test_blocks),
        "rounds": list(runner.test_rounds),
        "deltas": injection and injection.deltas[1].tolist(),
    }
    runner.test_blocks.clear()
    runner.test_rounds.clear()
    return found


# --- the engine process ---------------------------------------------------------------------------------------------


def pretend_cpus_are_rays_gpus() -> None:
    """vLLM names no resource of Ray's for its CPU platform; its Ray executors refuse CPUs for that alone."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def start_as_a_ray_worker() -> None:
    """What Ray runs first in its workers: as on a cluster that was started without this process's environment."""
    pretend_cpus_are_rays_gpus()
    os.environ.pop("STEER_DISABLE", None)


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster for one engine, if this process is for such: Ray keeps an engine's place after it has gone."""
    if not os.environ.get("STEER_TEST_RAY"):
        yield
        return
    import ray

    pretend_cpus_are_rays_gpus()
    hook = {"worker_process_setup_hook": "workers.start_as_a_ray_worker"}
    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, runtime_env=hook)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def pretended(version: str | None, broken: list[str]) -> Iterator[None]:
    """Another vLLM: its version, and an attribute gone in the modules whose seams are `broken`."""
    import vllm

    from vllm_steer.serving import patches, patching

    before = vllm.__version__, patches.SEAMS
    lost = lambda seam: dataclasses.replace(seam, needs=("vllm:gone",)) if seam.module in broken else seam  # noqa: E731
    patching.undo()
    patches.SEAMS = tuple(lost(seam) for seam in patches.SEAMS)
    patches.install()
    vllm.__version__ = version or before[0]
    try:
        yield
    finally:
        patching.undo()
        vllm.__version__, patches.SEAMS = before
        patches.install()


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """As engine_process.serve_job, without metrics; each call's result has "workers" by rank, see `take_records`.

    The job's environment may ask for another vLLM: STEER_TEST_VERSION, and in STEER_TEST_BROKEN modules by comma.
    """
    broken = os.environ.get("STEER_TEST_BROKEN", "")
    with cluster(), pretended(os.environ.get("STEER_TEST_VERSION"), broken.split(",")):
        return {"calls": run_calls(job), "error": None, "metrics": {}}


def run_calls(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of a job's calls, from one engine."""
    with engine_process.opened(job) as llm:
        results = []
        if job["spec"]:
            llm.collective_rpc(start_recording)
        for call in job["calls"]:
            outs = engine_process.run_call(llm, call)
            workers = llm.collective_rpc(take_records) if job["spec"] else []
            for worker in workers:
                by_prompt: dict[str, list[Any]] = {out.request_id.partition("-")[0]: [] for out in outs}
                for request, position, drafts, _ in worker["blocks"]:
                    by_prompt[request.partition("-")[0]].append([position, drafts])
                worker["blocks"] = list(by_prompt.values())
            workers.sort(key=lambda worker: worker["rank"])
            results.append(engine_process.describe(outs) | {"workers": workers, "switched": call.get("switched")})
        return results


if __name__ == "__main__":
    engine_process.main(serve_job)
