"""The features of a request, all in one batch of one steered engine, and prefix caching and aborts on the same engine.

Each must come out as from the target alone: an engine without speculation, asked the same. Steering is proven on at
every proposal, row by row (`assert_steered`), under the guide of the request itself (`assert_own_guides`). One steered
engine and one plain engine per runner serve this file; features of a whole engine are in test_features_engines.py,
those of a server in test_features_serve.py.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
from engines import assert_own_guides, assert_steered
from repository import ROOT
from transformers import AutoTokenizer
from vllm.config import VllmConfig

TRAINED = ROOT / "examples" / "tiny_pair"
K = 4
BLOCK = 32  # tokens in a block of the KV cache
RUNNERS = pytest.mark.parametrize("runner", ["v1", "v2"])

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
REGEX = "[a-f]{3}-[0-9]{2,6}(,[0-9]{2}){0,3}"
GRAMMAR = 'root ::= "sum(" number next next? next? ")"\nnext ::= ", " number\nnumber ::= [1-9] [0-9]?\n'
STOP_TOKENS = list(range(65, 190))  # a quarter of the vocabulary; V2 takes 128 at most
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4}

# Name: (length of the prompt, sampling options). The batch is longer than max_num_batched_tokens=64 and max_num_seqs=8.
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (20, {}),
    "chunked": (100, {}),
    "logprobs": (12, {"logprobs": 3, "prompt_logprobs": 2}),
    "stop string": (14, {"stop": ["ue in"], "max_tokens": 36}),
    "penalties": (9, PENALTIES),
    "no penalties": (9, {}),
    "min_tokens": (11, {"stop_token_ids": STOP_TOKENS, "min_tokens": 9}),
    "no min_tokens": (11, {"stop_token_ids": STOP_TOKENS}),
    "json": (8, {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False, "max_tokens": 32}),
    "regex": (7, {"structured_outputs": {"regex": REGEX}, "ignore_eos": False, "max_tokens": 32}),
    "grammar": (6, {"structured_outputs": {"grammar": GRAMMAR}, "ignore_eos": False, "max_tokens": 32}),
}
NAMES = list(REQUESTS)
SAMPLED = {"temperature": 1.0, "max_tokens": 12}
ABORTED = [1, 2]  # of four
# Calls of the shared engines, in this order: prefix calls must find what they left behind.
CALLS = ("features", "seeds", "seeds again", "cold", "warm", "continued", "aborted", "after", "biased")


@functools.cache
def heldout() -> list[list[int]]:
    """Token ids of the held-out texts that have at least 100."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED / "target")
    lines = (TRAINED / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [ids for line in lines if len(ids := tokenizer.encode(json.loads(line)["prompt"])) >= 100]


def calls() -> list[dict[str, Any]]:
    """The calls named in CALLS. "no X" has the prompt of "X"."""
    rows = heldout()
    prompts = [rows[NAMES.index(name.removeprefix("no "))][: REQUESTS[name][0]] for name in NAMES]
    features = [{"max_tokens": 12} | REQUESTS[name][1] for name in NAMES]
    prefix = [rows[20][: 2 * BLOCK + 1], rows[21][: 2 * BLOCK], rows[22][: 3 * BLOCK - 6]]
    seeds = [SAMPLED | {"seed": 1}, SAMPLED | {"seed": 1}, SAMPLED | {"seed": 2}, SAMPLED | {"seed": 3, "n": 3}]
    made = {
        "features": {"prompts": prompts, "sampling": features},
        "seeds": {"prompts": [rows[30][:8]] * 4, "sampling": seeds},
        "seeds again": {"prompts": [rows[30][:8]] * 2, "sampling": [SAMPLED | {"seed": 2}, SAMPLED | {"seed": 1}]},
        "cold": {"prompts": prefix, "sampling": {"max_tokens": 12}},
        "warm": {"prompts": prefix, "sampling": {"max_tokens": 12}},
        "continued": {"prompts": [rows[23][:5]], "continues": CALLS.index("cold"), "sampling": {"max_tokens": 8}},
        "aborted": {
            "prompts": [rows[i][: 6 + i] for i in range(4)],
            "sampling": {"max_tokens": 16},
            "abort": {"after": 5, "prompts": ABORTED},
        },
        "after": {"prompts": [rows[i][: 6 + i] for i in ABORTED], "sampling": {"max_tokens": 16}},
        "biased": {"prompts": prompts[:1], "sampling": {"logit_bias": {"69": 4.0}}, "refused": True},
    }
    return [made[name] for name in CALLS]


def both(runners: Any, runner: str, call: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(steered engine's, plain engine's) result of one call; the engines run once. `whole` is the engine's answer."""
    found = []
    for spec in ({"model": str(TRAINED / "steered"), "num_speculative_tokens": K}, None):
        out = runners(runner).run(
            TRAINED / "target",
            spec,
            calls(),
            enable_prefix_caching=True,
            block_size=BLOCK,
            async_scheduling=True,
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        )
        assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
        found.append(out["calls"][CALLS.index(call)] | {"whole": out})
    return found[0], found[1]


def feature(runners: Any, runner: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(steered, alone) for one request of the mixed batch, after the checks that every feature has in common."""
    on, alone = both(runners, runner, "features")
    assert_steered(on, {K})
    i = NAMES.index(name)
    keys = ("tokens", "texts", "ends", "logprobs", "prompt_logprobs", "blocks")
    on, alone = ({key: call[key][i] for key in keys} for call in (on, alone))
    assert [on[key] for key in keys[:3]] == [alone[key] for key in keys[:3]]
    assert on["blocks"], "nothing was drafted for this request"
    return on, alone


@RUNNERS
def test_a_batch_of_all_features_accepts_drafts(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "plain")
    assert len(on["blocks"]) < len(on["tokens"]) - 1, "no draft was accepted: the rest would prove little"
    call = both(runners, runner, "features")[0]
    assert "steering is on" in call["whole"]["log"]
    assert_own_guides(call, TRAINED / "target", TRAINED / "steered", calls()[0]["prompts"])


def test_the_proof_of_steering_can_fail(runners: Any) -> None:
    prompts = [heldout()[i][:10] for i in (0, 1)]
    call, models = {"prompts": prompts, "sampling": {"max_tokens": 12}}, (TRAINED / "target", TRAINED / "steered")
    spec = {"model": str(TRAINED / "steered"), "num_speculative_tokens": K}
    on = runners("v1").run(TRAINED / "target", spec, [call])["calls"][0]
    assert_own_guides(on, *models, prompts)
    mine, others = on["deltas"]
    swapped = [[*mine[:1], [mine[1][0], others[1][1]], *mine[2:]], others]
    with pytest.raises(AssertionError):
        assert_own_guides(on | {"deltas": swapped}, *models, prompts)
    off = {"vllm_steer": {"scale": 0}}
    out = runners("v1").run(TRAINED / "target", spec, [call], additional_config=off)
    assert out["calls"][0]["blocks"][0]
    with pytest.raises(AssertionError):
        assert_steered(out["calls"][0], {K})


@RUNNERS
def test_chunked_prefill(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "chunked")
    length = REQUESTS["chunked"][0]
    assert min(position for position, _ in on["blocks"]) < length, "the prompt was not read in parts"
    assert len([n for n, _ in on["blocks"] if n >= length]) < len(on["tokens"]) - 1, "no draft was accepted"


@RUNNERS
def test_async_scheduling(runner: str, runners: Any) -> None:
    on, _ = both(runners, runner, "features")
    feature(runners, runner, "plain")
    if not on["whole"]["async_scheduling"]:  # the engine was asked for it
        pytest.skip("not testable here: vLLM turns async scheduling off on a CPU")


@RUNNERS
def test_logprobs_and_prompt_logprobs(runner: str, runners: Any) -> None:
    on, alone = feature(runners, runner, "logprobs")
    for key, rows in (("logprobs", 12), ("prompt_logprobs", REQUESTS["logprobs"][0])):
        assert len(on[key]) == rows
        for mine, theirs in zip(on[key], alone[key], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    assert on["prompt_logprobs"][0] is None and all(len(row) >= 3 for row in on["logprobs"])


@RUNNERS
def test_stop_strings(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "stop string")
    assert on["ends"] == ["stop", "ue in"] and len(on["tokens"]) > K


@RUNNERS
def test_penalties(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "penalties")
    assert on["tokens"] != feature(runners, runner, "no penalties")[0]["tokens"]


@RUNNERS
def test_min_tokens(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "min_tokens")
    assert len(feature(runners, runner, "no min_tokens")[0]["tokens"]) < 9 <= len(on["tokens"])


@RUNNERS
def test_logit_bias_is_refused_by_vllm(runner: str, runners: Any) -> None:
    on, alone = both(runners, runner, "biased")
    assert "min_p and logit_bias sampling parameters are not yet supported with speculative" in on["refused"]
    assert alone["tokens"], "without speculation vLLM takes it"


@RUNNERS
def test_structured_json(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "json")
    found = json.loads(on["texts"])
    assert set(found) == {"name", "size"} and len(found["name"]) <= 6 and 0 <= found["size"] <= 99


@RUNNERS
def test_structured_regex(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "regex")
    assert re.fullmatch(REGEX, on["texts"]) and on["ends"][0] == "stop"


@RUNNERS
def test_structured_grammar(runner: str, runners: Any) -> None:
    on, _ = feature(runners, runner, "grammar")
    assert re.fullmatch(r"sum\([1-9]\d?(, [1-9]\d?){1,3}\)", on["texts"]) and on["ends"][0] == "stop"


@RUNNERS
def test_seeds_and_n(runner: str, runners: Any) -> None:
    """That they leave the distribution alone is tested in test_features_engines.py."""
    on, _ = both(runners, runner, "seeds")
    again, _ = both(runners, runner, "seeds again")
    assert_steered(on, {K})
    first, same, other, three = on["all"]
    assert first == same != other
    assert again["all"] == [other, first], "a seed's answer must not depend on the batch it is in"
    assert [len(tokens) for tokens in three] == [12] * 3 and len({tuple(tokens) for tokens in three}) == 3


@RUNNERS
def test_prefix_caching(runner: str, runners: Any) -> None:
    """Prompts of two blocks and one token (a full hit), two blocks, and nearly three; cold, then warm."""
    cold, alone = both(runners, runner, "cold")
    warm, _ = both(runners, runner, "warm")
    assert_steered(cold, {K})
    assert_steered(warm, {K})
    assert cold["tokens"] == warm["tokens"] == alone["tokens"]
    assert cold["cached"] == [0, 0, 0] and warm["cached"] == [2 * BLOCK, BLOCK, 2 * BLOCK]  # one token is always read
    for call in (cold, warm):
        assert_own_guides(call, TRAINED / "target", TRAINED / "steered", calls()[CALLS.index("cold")]["prompts"])
    for i, prompt in enumerate(calls()[CALLS.index("cold")]["prompts"]):
        first, second = ([b for b in call["blocks"][i] if b[0] >= len(prompt)] for call in (cold, warm))
        assert first == second, f"prompt of {len(prompt)} tokens: a hit in the prompt changed its drafts"
    assert len(first) < 11, "no draft was accepted"


@RUNNERS
def test_prefix_caching_of_answers(runner: str, runners: Any) -> None:
    """The next turn of a conversation finds the answer's own KV cache, drafted under older guides: same output."""
    on, alone = both(runners, runner, "continued")
    cold, more = (calls()[CALLS.index(name)]["prompts"] for name in ("cold", "continued"))
    answers = both(runners, runner, "cold")[0]["tokens"]
    assert_steered(on, {K})
    assert on["cached"][2] == 3 * BLOCK > len(cold[2]), "the third answer's own tokens were not found"
    assert on["tokens"] == alone["tokens"]
    turns = [prompt + answer + more[0] for prompt, answer in zip(cold, answers, strict=True)]
    assert_own_guides(on, TRAINED / "target", TRAINED / "steered", turns)


@RUNNERS
def test_abort_mid_block(runner: str, runners: Any) -> None:
    """Aborted with drafts pending: the others, and those that take the freed places, answer like the target alone."""
    on, alone = both(runners, runner, "aborted")
    assert_steered(on, {K})
    for i, (mine, theirs) in enumerate(zip(on["tokens"], alone["tokens"], strict=True)):
        if i in ABORTED:
            assert 0 < len(mine) < 16, "it was not cut in the middle"
        else:
            assert mine == theirs
    after, expected = both(runners, runner, "after")
    assert_steered(after, {K})
    for name, call in (("aborted", on), ("after", after)):
        assert_own_guides(call, TRAINED / "target", TRAINED / "steered", calls()[CALLS.index(name)]["prompts"])
    assert after["tokens"] == expected["tokens"]
    for i, prompt in zip(ABORTED, after["tokens"], strict=True):
        assert on["tokens"][i] == prompt[: len(on["tokens"][i])]


@pytest.mark.parametrize(
    ("runner", "change", "message"),
    [
        ("v1", {"rejection_sample_method": "block"}, "'block', which vLLM's V1 runner ignores"),
        ("v2", {"max_model_len": 64}, "has a context of 64 tokens, the server one of 512.* give --max-model-len 64 or"),
    ],
    ids=["v1-block_verification", "v2-short_drafter"],
)
def test_refused_at_start_up(runner: str, change: dict[str, Any], message: str, runners: Any) -> None:
    spec = {"model": str(TRAINED / "steered"), "num_speculative_tokens": K} | change
    out = runners(runner).run(TRAINED / "target", spec, [])
    if hasattr(VllmConfig, "_limit_max_model_len_to_draft") and "max_model_len" in change:  # vLLM 0.33
        assert out["error"] is None and "reducing max_model_len to 64" in out["log"]
        return
    assert re.search(message, out["error"] or "no error"), out["error"]
