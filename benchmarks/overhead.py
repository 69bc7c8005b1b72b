"""What steering costs: a drafter steered with zero weights against stock `draft_model`, tokens per second.

Zero weights make both draft the same tokens in the same number of steps, so the ratio of their speeds is the cost of
steering alone: states, guides, deltas, injection. One eager V1 engine answers the same prompts by turns, steered and
with everything of ours taken out (wrapped activations, the proposer's hooks, the target's auxiliary states), so that
drift of the machine hits both alike: on a small machine it is larger than the cost, and two engines of a real pair do
not fit into memory. Prints one ratio per batch size: the median over rounds, and the lowest and highest.

    python benchmarks/overhead.py TARGET DRAFTER --rank 64 --batch 1 8
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ENV, write_report

from vllm_steer.serving.model import SteeredActivation

TEXT = "def read_lines(path, limit=None):\n    "


def zero_adapter(target: str, drafter: str, rank: int | None, layers: str, directory: Path) -> Path:
    """An adapter over `drafter` whose deltas are all zero."""
    from transformers import AutoConfig

    from vllm_steer import checkpoint
    from vllm_steer.config import SteeringConfig, default_target_layers, drafter_shape, target_shape
    from vllm_steer.steering import Steering

    big, small = (AutoConfig.from_pretrained(path) for path in (target, drafter))
    steered = range(small.num_hidden_layers) if layers == "all" else map(int, layers.split(","))
    config = SteeringConfig(
        target_shape(target, big),
        drafter_shape(drafter, small),
        default_target_layers(big.num_hidden_layers),
        tuple(steered),
        rank,
    )
    checkpoint.save(directory, Steering(config))
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


def compare(llm: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Alternate both forms on one batch size; the first round of each is thrown away."""
    from vllm import SamplingParams

    switch = Switch(llm)
    sampling = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    prompts = [f"# module {i}\n{TEXT}" for i in range(batch)]
    speeds: dict[bool, list[float]] = {False: [], True: []}
    answers = set()
    for i in range(args.rounds + 1):
        for on in (False, True) if i % 2 else (True, False):
            switch.set(on)
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            answers.add(tuple(tuple(o.outputs[0].token_ids) for o in outputs))
            if i:
                speeds[on].append(batch * args.tokens / seconds)
    switch.set(True)
    assert len(answers) == 1, "zero steering changed the output"
    ratios = [steered / stock for stock, steered in zip(speeds[False], speeds[True], strict=True)]
    return {
        "batch": batch,
        "stock_tokens_per_s": round(statistics.median(speeds[False]), 3),
        "steered_tokens_per_s": round(statistics.median(speeds[True]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "rounds": args.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("drafter", help="plain drafter; a zero adapter is made on the fly")
    parser.add_argument("--rank", type=int, default=None, help="rank of the zero steering (default: full rank)")
    parser.add_argument("--layers", default="all", help="steered drafter layers, e.g. 20,21,22 (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--k", type=int, default=5, help="draft length")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=6, help="timed runs of each form and batch size")
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
                f"[{r['ratio_range'][0]:.3f}, {r['ratio_range'][1]:.3f}] over {r['rounds']} rounds",
                flush=True,
            )
    if args.json:
        write_report(args.json, runner="V1, eager", rank=args.rank or "full", results=results)


if __name__ == "__main__":
    main()
