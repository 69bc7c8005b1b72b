"""What lenience costs: how probable answers are under the target, how many are still its own, how many are right.

Measured for every contender of a benchmark with a lenient one, so that the lenient ones have something beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_steer.bench import block_counting, checks


def judge(
    llm: Any, prompts: Sequence[dict[str, Any]], answers: Sequence[Sequence[int]], run_code: bool
) -> list[dict[str, Any]]:
    """For each answer (token ids) {"nll", "tokens", "correct"}.

    "nll" is the answer's negative log-likelihood in nats under the target at temperature 1, summed over its tokens,
    from the engine's own log-probabilities of a prompt; "correct" is None where a prompt says nothing, or its tests may
    not be run.
    """
    from vllm import SamplingParams

    whole = [[*prompt["ids"], *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in whole], asked, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    found: list[dict[str, Any]] = []
    for prompt, answer, ids, output in zip(prompts, answers, whole, outputs, strict=True):
        start = len(prompt["ids"])
        nll = -sum(output.prompt_logprobs[i][ids[i]].logprob for i in range(start, len(ids)))
        right = None
        if (wanted := prompt.get("expected")) is not None:
            text = tokenizer.decode(list(answer), skip_special_tokens=True)
            right = checks.correct(wanted, prompt["text"], text, run_code)
        found.append({"nll": nll, "tokens": len(answer), "correct": right})
    return found


def summarise(answers: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """{"nll_per_token", "nll_95", "same_text": [n, of] or None, "correct": [n, of] or None} of one contender.

    `exact` are the answers of one that gives nothing up, at temperature 0; None: there is nothing to compare with.
    """
    table = np.array([(a["nll"], a["tokens"]) for a in answers], dtype=np.float64)
    interval = None
    if len(table) > 1:
        sums = block_counting.resample(len(table)) @ table
        interval = block_counting.interval(sums[:, 0] / np.maximum(sums[:, 1], 1))
    judged = [a["correct"] for a in answers if a["correct"] is not None]
    same = None
    if exact is not None:
        pairs = zip(answers, exact, strict=True)
        same = [sum(a["tokens_sha256"] == b["tokens_sha256"] for a, b in pairs), len(answers)]
    return {
        "nll_per_token": float(table[:, 0].sum() / max(1, table[:, 1].sum())),
        "nll_95": interval,
        "same_text": same,
        "correct": [sum(judged), len(judged)] if judged else None,
    }
