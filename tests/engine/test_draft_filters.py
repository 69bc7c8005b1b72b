"""Sampled drafts follow the request's top-k and top-p, and the output keeps the target's distribution."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import assert_steered
from pairs import make_pair, random_prompt
from scipy.stats import chisquare
from test_lossless import NEW, P_VALUE, VOCAB, kept, p_value, uniforms

from vllm_steer.serving.sampling.draft_filters import Filters, cut

FILTERS: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.8}, {}, {"top_k": 9, "top_p": 0.7}]
COPIES = {"v1": 24, "v2": 6}  # of every setting in one batch; Triton's interpreter is slow
OFF = {"vllm_steer": {"filter_drafts": False}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("filtered"), "llama", vocab_size=VOCAB, distance=0.2)


def spec(model: Path) -> dict[str, Any]:
    return {"model": str(model), "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_output_is_the_targets(pair: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    """Requests with each filter, without any and greedy ones, in one batch."""
    sampling = [{"temperature": 1.2} | s for s in FILTERS] + [{"temperature": 0.0}]
    prompts = [random_prompt(6, seed=i, vocab_size=VOCAB) for i in range(COPIES[runner] * len(sampling))]
    each = [sampling[i % len(sampling)] | {"max_tokens": NEW} for i in range(len(prompts))]
    calls = [{"prompts": prompts, "sampling": each}]
    out = runners(runner).run(pair.target, spec(pair.steered), calls, max_num_seqs=32, max_num_batched_tokens=256)
    assert out["error"] is None, out["log"][-4000:]
    assert "sampled drafts follow each request's top-k and top-p" in out["log"]
    call = out["calls"][0]
    assert_steered(call, {3})
    for i, filters in enumerate(FILTERS):
        mine = slice(i, None, len(sampling))
        p = p_value(uniforms(pair.target, prompts[mine], call["tokens"][mine], 1.2, **filters))
        assert p > P_VALUE, f"{filters}: p={p:.2g}"
    greedy = runners(runner).generate(pair.target, None, prompts[len(sampling) - 1 :: len(sampling)], max_tokens=NEW)
    assert call["tokens"][len(sampling) - 1 :: len(sampling)] == greedy["tokens"]


@pytest.mark.parametrize(
    ("runner", "drafter"),
    [("v1", 1), ("v1", 2), pytest.param("v2", 1, marks=pytest.mark.slow), ("v2", 2)],
    ids=["v1-plain", "v1-steered", "v2-plain", "v2-steered"],
)
def test_top_k_1_drafts_greedily(pair: tuple[Path, Path, Path], drafter: int, runner: str, runners: Any) -> None:
    """Drafts come from within the filter: with one token left they are those of a greedy request; unfiltered not."""
    prompts = [random_prompt(6 + i, seed=i, vocab_size=VOCAB) for i in range(4)]
    calls = [
        {"prompts": prompts, "sampling": {"temperature": t, "max_tokens": NEW, "top_k": k}} for t, k in ((0, 0), (1, 1))
    ]
    run = lambda **keys: runners(runner).run(pair.target, spec(pair[drafter]), calls, **keys)  # noqa: E731
    on, off = run(), run(additional_config=OFF)
    for out in (on, off):
        assert out["error"] is None, out["log"][-4000:]
        assert out["calls"][0]["tokens"] == out["calls"][1]["tokens"]
    greedy, one = on["calls"]
    assert one["blocks"] == greedy["blocks"] == off["calls"][0]["blocks"]
    assert off["calls"][1]["blocks"] != greedy["blocks"]
    assert sum(map(len, one["blocks"])) < sum(map(len, off["calls"][1]["blocks"])), "rejected less, so fewer blocks"


@pytest.mark.parametrize("filters", FILTERS)
def test_a_cut_distribution_is_the_filtered_one(filters: dict[str, Any]) -> None:
    logits, temperature = torch.randn(6, 50), torch.tensor([0.5, 1.0, 1.7, 1.0, 0.3, 1.0])
    tensors = {name: torch.full((6,), value) for name, value in filters.items()}
    found = cut(logits, temperature, tensors.get("top_k"), tensors.get("top_p"))
    right = kept(torch.softmax(logits.double() / temperature[:, None], -1), **filters)
    torch.testing.assert_close(torch.softmax(found.double() / temperature[:, None], -1), right, atol=1e-6, rtol=1e-5)
    assert (found == logits).any() and (filters == {} or found.isinf().any())


def test_a_greedy_row_keeps_its_first_token() -> None:
    logits = torch.randn(2, 50)
    found = cut(logits, torch.tensor([0.0, 1.0]), torch.tensor([50, 2]), None)
    assert found[0].argmax() == logits[0].argmax() and found[1].isfinite().sum() == 2


def verified(filters: dict[str, Any], against: str) -> float:
    """Chi-square p-value that rejection sampling (Leviathan et al., arXiv 2211.17192) gives the target's filtered
    distribution: drafts are drawn from the drafter's, cut, and verified against that ("cut") or the "whole" one."""
    rows, generator = 20_000, torch.Generator().manual_seed(1)
    draw = lambda p: torch.multinomial(p, 1, generator=generator)  # noqa: E731
    logits = 1.5 * torch.randn(2, VOCAB, generator=generator)
    tensors = {name: torch.full((2,), value) for name, value in filters.items()}
    p, drawn = torch.softmax(cut(logits, torch.ones(2), tensors.get("top_k"), tensors.get("top_p")), -1)
    q = drawn if against == "cut" else torch.softmax(logits[1], -1)
    drafts = draw(drawn.expand(rows, -1))
    accepted = torch.rand(rows, 1, generator=generator) < (p / q)[drafts]
    said = torch.where(accepted, drafts, draw((p - q).clamp(min=0).expand(rows, -1)))
    found = torch.bincount(said[:, 0], minlength=VOCAB)[p > 0].double()
    assert found.sum() == rows, "a token that the target's filters exclude"
    want = p[p > 0].double()
    return float(chisquare(found.tolist(), (rows * want / want.sum()).tolist()).pvalue)


@pytest.mark.parametrize("filters", [f for f in FILTERS if f])
def test_drafts_must_be_verified_against_what_they_were_drawn_from(filters: dict[str, Any]) -> None:
    assert verified(filters, against="cut") > P_VALUE
    assert verified(filters, against="whole") < P_VALUE, "the comparison would not notice"


def test_v2_takes_the_filters_of_each_round_into_the_same_memory() -> None:
    """Requests come and go: rows follow the batch's order, and a round without filters leaves logits as they are."""
    value = lambda *numbers, **keys: SimpleNamespace(gpu=(t := torch.tensor(numbers, **keys)), np=t.numpy())  # noqa: E731
    states = SimpleNamespace(max_num_reqs=4, vocab_size=50, temperature=value(1.0, 0.5, 0.0, 2.0))
    states.top_k, states.top_p = value(50, 3, 50, 1, dtype=torch.int32), value(1.0, 1.0, 1.0, 1.0)
    filters, logits = Filters(states, torch.device("cpu")), torch.randn(3, 50)
    places = [t.data_ptr() for t in vars(filters).values() if isinstance(t, torch.Tensor)]

    def finite(*requests: int) -> list[int]:
        where = torch.tensor(requests, dtype=torch.int32)
        filters.begin(where, where.numpy())
        return filters(logits[: len(requests)]).isfinite().sum(-1).tolist()

    assert finite(3, 0, 1) == [1, 50, 3] and filters.active
    assert finite(1, 3) == [3, 1]
    assert finite(0, 2) == [50, 50] and not filters.active and filters(logits) is logits
    assert finite() == [] and not filters.active
    states.top_p.gpu[0] = 1e-6
    assert finite(2, 0) == [50, 1]
    assert places == [t.data_ptr() for t in vars(filters).values() if isinstance(t, torch.Tensor)] and len(places) == 3


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_min_p_is_refused_by_vllm(pair: tuple[Path, Path, Path], runner: str, runners: Any) -> None:
    """When this fails, vLLM accepts min-p under speculation, and drafts should follow it too."""
    calls = [{"prompts": [[1, 2, 3]], "sampling": {"temperature": 1.0, "min_p": 0.1}, "refused": True}]
    out = runners(runner).run(pair.target, spec(pair.steered), calls)
    assert (
        "min_p and logit_bias sampling parameters are not yet supported with speculative" in out["calls"][0]["refused"]
    )
