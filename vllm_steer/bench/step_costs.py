"""What an engine step costs at several batch sizes, in one engine and a process of its own: for `vllm-steer tune`.

python -m vllm_steer.bench.step_costs JOB RESULT      called by `measure_in_a_process`
"""

from __future__ import annotations

import dataclasses
from statistics import median
from typing import Any

from vllm_steer.bench import block_counting, processes
from vllm_steer.bench.candidate import WARM_UP, Contender, count, drafting, open_engine


def measure_in_a_process(contender: Contender, k: int, settings: dict[str, Any], prompts: list[Any]) -> dict[str, Any]:
    """`measure` in a fresh Python under this process's environment. Raises SteeringError when it fails."""
    name = f"{contender.name}, k={k}" if contender.drafter else contender.name
    return processes.run("vllm_steer.bench.step_costs", name, [dataclasses.asdict(contender), k, settings, prompts])


def work(raw: dict[str, Any], k: int, settings: dict[str, Any], prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """`measure`, from JSON."""
    return measure(Contender.from_dict(raw), k, settings, prompts)


def measure(contender: Contender, k: int, settings: dict[str, Any], prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Step times and acceptance of one way to serve.

    Args:
        k: drafts per block, of a tree its depth.
        settings: "target", "batch" (sizes), "max_tokens", "temperature", "max_model_len", "engine", "seed".

    Returns {"environment", "batches": [{"batch", "step", "draft", "tokens"}], "rates": acceptance by position}. "step"
    is the median time in seconds of an engine step while that many requests are decoding, "draft" what of it is spent
    in the drafter, "tokens" what a step delivers for each request.
    """
    from vllm_steer.serving import probe

    sizes = settings["batch"]
    llm = open_engine(contender, settings, k, settings["temperature"] > 0, max(sizes))
    try:
        found = [_at(llm, size, contender, k, settings, prompts) for size in sizes]
        answers = [answer for _, some in found for answer in some]
        depth = k if contender.drafter else 0
        rates = [rate or 0.0 for rate in block_counting.per_position(answers, depth)]
        return {"environment": probe.describe(llm), "batches": [each for each, _ in found], "rates": rates}
    finally:
        llm.llm_engine.engine_core.shutdown()


def _at(
    llm: Any, size: int, contender: Contender, k: int, settings: dict[str, Any], prompts: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[block_counting.Answer]]:
    """Step times at one batch size, and the answers' blocks. The drafter is timed in a pass of its own."""
    from vllm_steer.serving import probe

    depth = k if contender.drafter else 0
    common = {"batch": size, "temperature": settings["temperature"], "seed": settings["seed"]}
    asked = block_counting.tokens_to_ask(settings["max_tokens"], depth)
    chosen = prompts[: size * max(1, settings["prompts"] // size)]
    ids = [prompt["ids"] for prompt in chosen]
    probe.drive(llm, ids[:size], max_tokens=WARM_UP, **common)
    deliveries, clock = probe.drive(llm, ids, max_tokens=asked, **common)
    full = [(seconds, tokens) for requests, seconds, tokens in clock.steps if requests == size]
    timed = drafting(llm, ids[:size], common | {"max_tokens": asked}) if depth else None
    draft = timed[0] / len(timed[1].steps) if timed is not None and timed[1].steps else 0.0
    raw = [
        count(prompt, delivery, settings["max_tokens"], depth, contender.drafts(depth))
        for prompt, delivery in zip(chosen, deliveries, strict=True)
    ]
    answers = [block_counting.Answer.from_dict(each) for each in raw]
    tokens = sum(tokens for _, tokens in full) / max(1, len(full)) / size
    step = median(seconds for seconds, _ in full) if full else float("nan")
    return {"batch": size, "step": step, "draft": draft, "tokens": tokens}, answers


if __name__ == "__main__":
    processes.main(work)
