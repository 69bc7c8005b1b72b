"""What `vllm-steer generate` costs over plain vLLM: the same prompts and sampling, engines of their own, by turns.

Plain is `LLM.generate` over token ids, one call, detokenising as it does by default; both clocks start when the engine
is ready. A round is one of each, in processes of their own; the ratio is of the medians.

    python benchmarks/generation.py examples/tiny_pair/target examples/tiny_pair/heldout.jsonl --rounds 3 \
        --engine '{"dtype": "float32", "enforce_eager": true, "gpu_memory_utilization": 0.3}'
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from record import ENV, write_report


def ours(model: str, prompts: str, tokens: int, engine: str) -> float:
    """Response tokens per second as the command reports them."""
    from vllm_steer.data.generate import GenerateConfig, generate

    with tempfile.TemporaryDirectory() as folder:
        meta = generate(GenerateConfig(model, prompts, f"{folder}/out.jsonl", max_tokens=tokens, engine=engine))
    return meta["runs"][-1]["tokens_per_second"]


def plain(model: str, prompts: str, tokens: int, engine: str) -> float:
    """Response tokens per second of one `LLM.generate`."""
    import torch
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from vllm_steer.data.generate import response_seed
    from vllm_steer.data.prompts import encode_prompt, read_prompts

    tokenizer, found = AutoTokenizer.from_pretrained(model), read_prompts(prompts, None)
    whole_prompts = {} if torch.accelerator.is_available() else {"enable_chunked_prefill": False}  # as generate does
    llm = LLM(model, **(whole_prompts | json.loads(engine)))
    ids = [{"prompt_token_ids": encode_prompt(tokenizer, prompt.prompt, tools=prompt.tools)} for prompt in found]
    sampling = [
        SamplingParams(temperature=1.0, max_tokens=tokens, seed=response_seed(0, prompt.id, 0)) for prompt in found
    ]
    began = time.perf_counter()
    outputs = llm.generate(ids, sampling)
    seconds = time.perf_counter() - began
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def in_a_process(function: Any, *args: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("prompts", help="JSONL of prompts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="{}", help="engine arguments, JSON")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    os.environ.update(ENV)
    given = args.model, args.prompts, args.max_tokens, args.engine
    speeds: dict[str, list[float]] = {"plain": [], "generate": []}
    for _ in range(args.rounds):
        for name, function in (("plain", plain), ("generate", ours)):
            speeds[name].append(round(in_a_process(function, *given), 1))
    ratio = statistics.median(speeds["generate"]) / statistics.median(speeds["plain"])
    print(f"tokens per second, {args.rounds} rounds: plain vLLM {speeds['plain']}, generate {speeds['generate']}; "
          f"ratio {ratio:.3f}")  # fmt: skip
    if args.json:
        write_report(args.json, tokens_per_second=speeds, ratio=round(ratio, 3))


if __name__ == "__main__":
    main()
