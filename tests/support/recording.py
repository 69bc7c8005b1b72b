"""What a live engine drafts, and under which deltas: recorded in its process for the tests to look at."""

from __future__ import annotations

from typing import Any

from engines import DELTAS


def record_blocks(model_runner: Any, blocks: list[tuple[str, int, list[int], list[float]]]) -> None:
    """Append (request id, position of the newest token, drafts, DELTAS numbers of its delta in the first steered layer;
    none of a plain drafter) for every proposal of a live engine."""
    v1 = hasattr(model_runner, "drafter")
    proposer = model_runner.drafter if v1 else model_runner.speculator
    original, injection = proposer.propose, getattr(proposer, "injection", None)

    def append(requests: list[str], newest: list[int], drafts: list[list[int]]) -> None:
        used = injection.deltas[1:, 0, :DELTAS].tolist() if injection else [[]] * len(newest)
        blocks.extend(zip(requests, newest, drafts, used, strict=False))

    def of_v1(**keys: Any) -> Any:
        if "common_attn_metadata" not in keys:  # Medusa heads
            batch, drafts = model_runner.input_batch, original(**keys)
            append(batch.req_ids, (batch.num_tokens_no_spec[: len(batch.req_ids)] - 1).tolist(), drafts.tolist())
            return drafts
        last = keys["common_attn_metadata"].query_start_loc[1:] - 1
        if keys["num_rejected_tokens_gpu"] is not None:
            last = last - keys["num_rejected_tokens_gpu"]
        newest = (keys["target_positions"][last] + 1).tolist()
        drafts = original(**keys)
        append(model_runner.input_batch.req_ids, newest, drafts.tolist())
        return drafts

    def of_v2(batch: Any, *args: Any, **keys: Any) -> Any:
        last = batch.query_start_loc[1 : batch.num_reqs + 1] - 1 - args[5][: batch.num_reqs]
        newest = (batch.positions[last] + 1).tolist()
        drafts = original(batch, *args, **keys)
        append(batch.req_ids, newest, drafts.tolist())
        return drafts

    proposer.propose = of_v1 if v1 else of_v2


def watch_steering(model_runner: Any, rounds: list[dict[str, Any]]) -> None:
    """Append {"requests", "decoding", "rows"} for every proposal: how many requests, how many past their prompt, and
    in how many rows of each draft pass steering really changed what the first steered layer multiplies."""
    v1 = hasattr(model_runner, "drafter")
    proposer = model_runner.drafter if v1 else model_runner.speculator
    wrappers = [m for m in proposer.model.modules() if type(m).__name__ == "SteeredActivation"]
    rows: list[int] = []
    before: list[Any] = []

    def changed(_: Any, args: tuple[Any, ...]) -> None:
        if before:  # some families have one activation for all layers: the others' calls are not this wrapper's
            rows.append(int((args[0] != before.pop()).any(-1).sum()))

    if wrappers:
        wrappers[0].register_forward_pre_hook(lambda _, args: before.append(args[0].clone()))
        wrappers[0].act_fn.register_forward_pre_hook(changed)
    original = proposer.propose

    def propose(*args: Any, **keys: Any) -> Any:
        rows.clear()
        drafts = original(*args, **keys)
        if v1 and "common_attn_metadata" not in keys:
            return drafts
        if v1:
            metadata, n = keys["common_attn_metadata"], keys["common_attn_metadata"].batch_size()
            prompt = model_runner.input_batch.num_prompt_tokens[:n]
            length = metadata.seq_lens[:n].numpy()
        else:
            n, prompt = args[0].num_reqs, args[0].prefill_len_np[: args[0].num_reqs]
            length = args[0].seq_lens[:n].numpy()
        rounds.append({"requests": n, "decoding": int((length >= prompt).sum()), "rows": list(rows)})
        return drafts

    proposer.propose = propose


def linear_methods(model_runner: Any) -> dict[str, list[str]]:
    """Names of vLLM's methods by which the linear layers of target and drafter multiply."""
    proposer = getattr(model_runner, "drafter", None) or getattr(model_runner, "speculator", None)
    models = {"target": model_runner.model} | ({"drafter": proposer.model} if proposer else {})
    names = lambda model: {type(m.quant_method).__name__ for m in model.modules() if hasattr(m, "quant_method")}  # noqa: E731
    return {role: sorted(name for name in names(model) if "Linear" in name) for role, model in models.items()}
