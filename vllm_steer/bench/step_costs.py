"""What an engine step costs at several batch sizes and draft lengths, in a process of its own: for `vllm-steer tune`.

python -m vllm_steer.bench.step_costs JOB RESULT      called by `measure_in_a_process`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vllm_steer.bench import block_counting, processes
from vllm_steer.bench.candidate import WARM_UP, Contender, count, drafting, open_engine


def measure_in_a_process(
    contender: Contender, lengths: Sequence[int], settings: dict[str, Any], prompts: list[Any]
) -> dict[int, dict[str, Any]]:
    """`measure` in a fresh Python under this process's environment. Raises SteeringError when it fails."""
    name = f"{contender.name}, k={max(lengths)}" if contender.drafter else contender.name
    job = [dataclasses.asdict(contender), list(lengths), settings, prompts]
    return {int(k): one for k, one in processes.run("vllm_steer.bench.step_costs", name, job).items()}


def work(
    raw: dict[str, Any], lengths: list[int], settings: dict[str, Any], prompts: list[dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """`measure`, from JSON."""
    return measure(Contender.from_dict(raw), lengths, settings, prompts)


def measure(
    contender: Contender, lengths: list[int], settings: dict[str, Any], prompts: list[dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Step times and acceptance of one way to serve, at several draft lengths where one engine can change its own.

    Lengths are measured by turns, prompt by prompt: a machine that drifts from one minute to the next would otherwise
    choose among them.

    Args:
        lengths: drafts per block, of a tree its depth.
        settings: "target", "batch" (sizes), "max_tokens", "temperature", "max_model_len", "engine", "seed".

    Returns {length: {"environment", "batches": [{"batch", "step", "draft", "tokens"}], "rates": acceptance by
    position}}, of all lengths or, from an engine that cannot change its length (V2), of the longest. "step" is the
    median time in seconds of an engine step while that many requests are decoding, "draft" what of it is spent in the
    drafter, "tokens" what a block delivers.
    """
    from vllm_steer.serving import probe

    sizes, sampled = settings["batch"], settings["temperature"] > 0
    several = len(lengths) > 1
    llm = open_engine(contender, settings, max(lengths), sampled, max(sizes), varying=several)
    try:
        if several and not probe.can_vary(llm):
            lengths = [max(lengths)]
        found = {k: _Way(contender, k if contender.drafter else 0) for k in lengths}
        for size in sizes:
            _at(llm, size, list(found.values()), settings, prompts)
        environment = probe.describe(llm)
        return {k: {"environment": environment, "batches": way.batches, "rates": way.rates} for k, way in found.items()}
    finally:
        llm.llm_engine.engine_core.shutdown()


@dataclass
class _Way:
    """One draft length of an engine, and what was measured at it; depth 0: without speculation."""

    contender: Contender
    depth: int
    batches: list[dict[str, Any]] = field(default_factory=list)
    answers: list[block_counting.Answer] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [rate or 0.0 for rate in block_counting.per_position(self.answers, self.depth)]

    def begin(self, llm: Any) -> None:
        """Let the engine draft so many tokens from now on."""
        from vllm_steer.serving import probe

        if probe.can_vary(llm):
            probe.draft(llm, self.depth)

    def drive(self, llm: Any, prompts: list[dict[str, Any]], max_tokens: int, **common: Any) -> tuple[list[Any], Any]:
        """Answer these prompts at once at this length: counted answers, and the clock."""
        from vllm_steer.serving import probe

        self.begin(llm)
        asked = block_counting.tokens_to_ask(max_tokens, self.depth)
        ids = [prompt["ids"] for prompt in prompts]
        deliveries, clock = probe.drive(llm, ids, max_tokens=asked, batch=len(ids), **common)
        drafts = self.contender.drafts(self.depth)
        raw = [count(p, d, max_tokens, self.depth, drafts) for p, d in zip(prompts, deliveries, strict=True)]
        return [block_counting.Answer.from_dict(each) for each in raw], clock


def _at(llm: Any, size: int, ways: list[_Way], settings: dict[str, Any], prompts: list[dict[str, Any]]) -> None:
    """Add to each way what it does at one batch size. Drafters are timed in a pass of their own."""
    most, seed = settings["max_tokens"], settings["seed"]
    common = {"temperature": settings["temperature"]}
    chosen = prompts[: size * max(1, settings["prompts"] // size)]
    groups = [chosen[first : first + size] for first in range(0, len(chosen), size)]
    full: list[list[float]] = [[] for _ in ways]
    answers: list[list[block_counting.Answer]] = [[] for _ in ways]
    ends = [prompt | {"ids": prompt["ids"][-WARM_UP:]} for prompt in groups[0]]
    for way in ways:
        way.drive(llm, ends, WARM_UP, seed=seed, **common)
    for number, group in enumerate(groups):
        turns = list(zip(ways, full, answers, strict=True))
        for way, seconds, counted in turns if number % 2 else reversed(turns):  # nobody is always the first
            some, clock = way.drive(llm, group, most, seed=seed + number * size, **common)
            seconds += [taken for requests, taken, _ in clock.steps if requests == size]
            counted += some
    for way, seconds, counted in zip(ways, full, answers, strict=True):
        draft = _drafting(llm, way, groups[0], settings) if way.depth else 0.0
        step = median(seconds) if seconds else float("nan")
        tokens = block_counting.acceptance_length(counted) or 1.0
        way.batches.append({"batch": size, "step": step, "draft": draft, "tokens": tokens})
        way.answers += counted


def _drafting(llm: Any, way: _Way, prompts: list[dict[str, Any]], settings: dict[str, Any]) -> float:
    """Seconds of a step that are the drafter's."""
    way.begin(llm)
    common = {"batch": len(prompts), "temperature": settings["temperature"], "seed": settings["seed"]}
    common["max_tokens"] = block_counting.tokens_to_ask(settings["max_tokens"], way.depth)
    timed = drafting(llm, [prompt["ids"] for prompt in prompts], common)
    return timed[0] / len(timed[1].steps) if timed is not None and timed[1].steps else 0.0


if __name__ == "__main__":
    processes.main(work)
