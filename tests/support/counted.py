"""Engines for test_blocks.py: jobs like those of engines.py, and every block of them counted three times.

By the drafter itself (`blocks`), by the evaluator (probe.drive), and by the scheduler, which knows which drafts are
placeholders: those of requests it has only just admitted, and (V1) zeros after a step that drafted nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import engine_process


def watch_scheduler(scheduler: Any, verified: list[dict[str, Any]]) -> None:
    """Append {"step", "admitted": in this step, "drafts": [ids; on V2 the scheduler sees -1 only], "accepted": number}
    for every request in every step that verified drafts."""
    schedule, stats, last, steps = scheduler.schedule, scheduler.make_spec_decoding_stats, {}, itertools.count()

    def of_schedule(*args: Any, **keys: Any) -> Any:
        out = schedule(*args, **keys)
        last.clear()
        admitted = {request.req_id for request in out.scheduled_new_reqs} | out.scheduled_cached_reqs.resumed_req_ids
        last.update(step=next(steps), admitted=admitted)
        last.update({id: list(tokens) for id, tokens in out.scheduled_spec_decode_tokens.items()})
        return out

    def of_stats(*args: Any, **keys: Any) -> Any:
        id, accepted = keys["request_id"], keys["num_accepted_tokens"]
        about = {"step": last["step"], "admitted": id in last["admitted"]}
        verified.append(about | {"drafts": last[id], "accepted": accepted})
        return stats(*args, **keys)

    scheduler.schedule, scheduler.make_spec_decoding_stats = of_schedule, of_stats


def serve_job(job: dict[str, Any]) -> dict[str, Any]:
    """Calls are {"prompts": [[ids]], "max_tokens": n, "batch": requests at a time, "scale": number}."""
    from vllm_steer.serving import probe

    with engine_process.opened(job, per_request_spec_decode_metrics="detailed") as llm:
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        drafter = getattr(runner, "drafter", None) or runner.speculator
        injection, blocks = getattr(drafter, "injection", None), drafter.blocks
        verified: list[dict[str, Any]] = []
        watch_scheduler(core.scheduler, verified)
        results = []
        for call in job["calls"]:
            if injection is not None:
                injection.scale = call["scale"]
            verified.clear()
            before, preempted = blocks.read(), probe.preemptions(llm)
            answers, _ = probe.drive(
                llm, call["prompts"], batch=call["batch"], temperature=0, max_tokens=call["max_tokens"], seed=0
            )
            after = blocks.read()
            results.append(
                {
                    "verified": list(verified),
                    "answers": [{"tokens": a.ids, "accepted": a.accepted} for a in answers],
                    "steered": (after.steered - before.steered).tolist(),
                    "unsteered": (after.unsteered - before.unsteered).tolist(),
                    "accepted": after.accepted - before.accepted,
                    "accepted_at": [b - a for a, b in zip(before.accepted_at, after.accepted_at, strict=True)],
                    "rows": [b - a for a, b in zip(before.rows, after.rows, strict=True)],
                    "guides": after.guides - before.guides,
                    "norms": after.guide_norms - before.guide_norms,
                    "preempted": probe.preemptions(llm) - preempted,
                }
            )
        return {"calls": results, "error": None, "metrics": {}}


if __name__ == "__main__":
    engine_process.main(serve_job)
