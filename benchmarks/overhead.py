"""What steering costs: a drafter steered with zero weights against stock `draft_model`, tokens per second.

Zero weights make both draft the same tokens in the same number of steps, so the ratio of their speeds is the cost of
steering alone: states, guides, deltas, injection. One eager V1 engine answers the same prompts again and again; every
other engine step (one verification and one draft round) is steered, in between everything of ours is taken out
(wrapped activations, the proposer's hooks, the target's auxiliary states), and the next answer swaps the two. So every
step is timed in both forms within seconds: a small machine drifts by more than the cost, and two engines of a real
pair do not fit into its memory. Prints one ratio of speeds per batch size with a 95 % bootstrap interval over steps.

    python benchmarks/overhead.py TARGET DRAFTER --rank 64 --batch 1 8
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ENV, interval, write_report

from vllm_steer.serving.injection import SteeredActivation

TEXT = "def read_lines(path, limit=None):\n    "


def zero_adapter(target: str, drafter: str, rank: int | None, layers: str, directory: Path) -> Path:
    """An adapter over `drafter` whose deltas are all zero."""
    from vllm_steer.drafters.models import read_model_config
    from vllm_steer.drafters.steered import checkpoint
    from vllm_steer.drafters.steered.config import SteeringConfig
    from vllm_steer.drafters.steered.module import Steering

    steered = None if layers == "all" else tuple(map(int, layers.split(",")))
    configs = (read_model_config(path) for path in (target, drafter))
    checkpoint.save(directory, Steering(SteeringConfig.for_models(*configs, rank=rank, steered_layers=steered)))
    return directory


class Switch:
    """Takes steering out of a live V1 engine, and puts it back."""

    def __init__(self, llm: Any):
        self.runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.injection = self.runner.drafter.injection
        self.layers = self.injection.config.target_layer_ids
        modules = self.runner.drafter.model.modules()
        self.mlps = [(m, m.act_fn) for m in modules if isinstance(getattr(m, "act_fn", None), SteeredActivation)]
        assert self.mlps, "the engine is not steered"

    def set(self, on: bool) -> None:
        for mlp, wrapper in self.mlps:
            mlp.act_fn = wrapper if on else wrapper.act_fn
        self.runner.drafter.injection = self.injection if on else None
        self.runner.use_aux_hidden_state_outputs = on
        self.runner.get_model().set_aux_hidden_state_layers(self.layers if on else ())


def build(args: argparse.Namespace, adapter: Path) -> Any:
    """The engine, steered."""
    from vllm import LLM

    return LLM(
        args.target,
        speculative_config={"model": args.drafter, "num_speculative_tokens": args.k},
        additional_config={"vllm_steer": {"adapter": str(adapter)}},
        dtype=args.dtype,
        max_model_len=512,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        seed=0,
    )


def generate(llm: Any, switch: Switch, prompts: list[str], tokens: int, first: bool) -> tuple[list[float], list, list]:
    """One greedy batch, every other engine step steered: seconds and form of each step, and the answers."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{time.monotonic_ns()}-{i}", prompt, sampling)
    seconds, forms, answers, on = [], [], [], first
    while engine.has_unfinished_requests():
        switch.set(on)
        start = time.perf_counter()
        answers += [tuple(out.outputs[0].token_ids) for out in engine.step() if out.finished]
        seconds.append(time.perf_counter() - start)
        forms.append(on)
        on = not on
    switch.set(True)
    return seconds, forms, sorted(answers)


def compare(llm: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Pairs of rounds that differ in which steps are steered; the first pair is thrown away, and so is each prefill."""
    switch = Switch(llm)
    prompts = [f"# module {i}\n{TEXT}" for i in range(batch)]
    pairs: list[tuple[float, float]] = []  # stock and steered seconds of the same step
    tokens, known = 0, None
    for i in range(args.rounds + 1):
        (one, first, answer), (two, second, again) = (
            generate(llm, switch, prompts, args.tokens, on) for on in (False, True)
        )
        known = known or answer
        assert answer == again == known, "zero steering changed the output"
        assert [not on for on in first] == second, "zero steering changed the number of steps"
        if i:
            pairs += [(b, a) if on else (a, b) for a, b, on in zip(one[1:], two[1:], first[1:], strict=True)]
            tokens += batch * (args.tokens - 1)
    stock, steered = map(sum, zip(*pairs, strict=True))
    return {
        "batch": batch,
        "stock_tokens_per_s": round(tokens / stock, 3),
        "steered_tokens_per_s": round(tokens / steered, 3),
        "ratio": round(stock / steered, 4),
        "interval_95": interval(pairs, ratio, 4),
        "steps": len(pairs),
        "extra_ms_per_step": round(1e3 * (steered - stock) / len(pairs), 2),
    }


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Speed of the steered steps over that of the stock ones."""
    stock, steered = map(sum, zip(*pairs, strict=True))
    return stock / steered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", help="plain drafter; a zero adapter is made on the fly")
    parser.add_argument("--rank", type=int, default=None, help="rank of the zero steering (default: full rank)")
    parser.add_argument("--layers", default="all", help="steered drafter layers, e.g. 20,21,22 (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--k", type=int, default=5, help="draft length")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=6, help="timed pairs of answers per batch size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    os.environ.update(ENV)
    with tempfile.TemporaryDirectory() as folder:
        adapter = zero_adapter(args.target, args.drafter, args.rank, args.layers, Path(folder))
        llm = build(args, adapter)
        results = []
        for batch in args.batch:
            r = compare(llm, batch, args)
            results.append(r)
            print(
                f"batch {batch}: stock {r['stock_tokens_per_s']:.2f} tokens/s, steered "
                f"{r['steered_tokens_per_s']:.2f}, ratio {r['ratio']:.3f} "
                f"[{r['interval_95'][0]:.3f}, {r['interval_95'][1]:.3f}] over {r['steps']} steps, "
                f"{r['extra_ms_per_step']:+.1f} ms a step",
                flush=True,
            )
    if args.json:
        write_report(args.json, runner="V1, eager", rank=args.rank or "full", results=results)


if __name__ == "__main__":
    main()
