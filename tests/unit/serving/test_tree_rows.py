"""Draft trees before an engine is built: the rows of a target pass, their noise, and what the front end refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from operators import Recorder
from pairs import change_config, make_pair
from samples import engine_config
from scipy.stats import chisquare, kstest
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving.kill_switch import KILL_SWITCH
from vllm_steer.serving.plan import Options, Plan, rejects_recursively, tree_of
from vllm_steer.serving.spec_decode import verify_v1
from vllm_steer.serving.telemetry.block_counter import Blocks
from vllm_steer.serving.tree_admission import say_so
from vllm_steer.serving.trees.drafting import Growth, greedy, growing
from vllm_steer.serving.trees.layout import Rows, flat
from vllm_steer.serving.trees.noise import gumbel
from vllm_steer.serving.trees.pages import Pages, pages_of
from vllm_steer.serving.trees.recursive import Recursive
from vllm_steer.serving.trees.requests import looks_back

SHAPE = TreeShape((2, 1))  # two rows of root and two drafts
BLOCK, LIMIT, CPU = 4, 64, torch.device("cpu")
TREE = {"vllm_steer": {"tree": [2, 1, 1]}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_pair(tmp_path_factory.mktemp("trees"), "llama")


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_shape_counts_what_vllm_is_told() -> None:
    shape = TreeShape((3, 2, 1))
    assert (shape.depth, shape.leaves, shape.drafts) == (3, 6, 6 * 4 - 1)
    assert [shape.below(depth) for depth in range(4)] == [6, 2, 1, 1]
    assert shape.pages(16) == 2 and TreeShape((1,) * 17).pages(16) == 3
    assert shape.lookahead(32) == 6 * 2 * 32
    assert TreeShape.parse("3,2,1") == shape


@pytest.mark.parametrize("text", ["", "a", "2,", "2;1", "0,1", "2,-1", "1.5"])
def test_texts_that_are_no_shape(text: str) -> None:
    with pytest.raises(SteeringError, match="allowed"):
        TreeShape.parse(text)


@pytest.mark.parametrize("widths", [[], [0], [1.5], [True], ["2"], 4, "4,1"])
def test_options_that_are_no_tree(widths: Any) -> None:
    with pytest.raises(SteeringError, match="allowed is a list of whole numbers from 1 up"):
        Options.read({"vllm_steer": {"tree": widths}})


# --- rows ------------------------------------------------------------------------------------------------------------


def rows_of(
    *requests: tuple[list[int], int, int], alone: tuple[bool, ...] | None = None
) -> tuple[Rows, Tensor, Tensor]:
    """Rows of requests (tokens, drafts at their end, position of the first), their ids and positions.

    Request i has the pages 100 i, 100 i + 1, ...
    """
    lengths = np.array([len(tokens) for tokens, _, _ in requests])
    drafts = np.array([n for _, n, _ in requests])
    ids = torch.tensor([token for tokens, _, _ in requests for token in tokens])
    positions = torch.cat([first + torch.arange(len(tokens)) for tokens, _, first in requests])
    rows = Rows(SHAPE, lengths, drafts, np.array(alone or [False] * len(requests)), CPU)
    rows.place(ids, positions, BLOCK, LIMIT)
    slots = torch.full((len(ids) + 2,), 7)
    table = 100 * torch.arange(len(requests))[:, None] + torch.arange(LIMIT // BLOCK)
    rows.find_pages(table, slots)
    assert slots[-2:].tolist() == [7, 7], "padding is vLLM's"
    return rows, positions, slots[:-2]


def drafted(newest: dict[str, int]) -> Blocks:
    """The counts of an engine that has drafted last after these positions."""
    blocks = Blocks(4, 2, CPU, rows=2)
    blocks.begin(list(newest), None, np.zeros((2, len(newest)), dtype=np.int64), True)
    blocks.newest[: len(newest)] = torch.tensor(list(newest.values()))
    return blocks


def chosen(rows: Rows, ids: list[int], says: dict[int, int]) -> tuple[list[int], list[int]]:
    """(winners, agreement) if the target says `says[token]` after a token; every token has logits here."""
    own = torch.tensor([says.get(token, 0) for token in ids])
    following = torch.tensor([*ids[1:], -1])
    agreed = rows.choose(own, following)
    assert rows.winner is not None
    return rows.winner.tolist(), agreed.tolist()


def test_rows_have_positions_and_pages_of_their_own() -> None:
    tree = ([5, 1, 2, 5, 3, 4], 5, 9)  # root 5 at position 9, in page 2; T = 2
    rows, positions, slots = rows_of(([8, 8, 8], 0, 0), tree)
    assert rows.length.tolist() == [3, 3, 3] and rows.request.tolist() == [0, 1, 1]
    assert positions.tolist() == [0, 1, 2, 9, 10, 11, 9, 10, 11]
    page = 100 * BLOCK
    first, second = page + 9, page + 4 * BLOCK + 1  # page 2 + T of request 1, at the same place in the page
    assert slots.tolist() == [0, 1, 2, first, first + 1, first + 2, second, second + 1, second + 2]
    assert rows.pages[2, :6].tolist() == [100, 101, 104, 105, 106, 107]  # type: ignore[index]
    assert rows.seq_lens.tolist() == [3, 12, 12]
    assert [pages.tolist() for pages in rows.forks()] == [[0, 102, 102], [0, 102, 104]]


def test_the_row_that_agrees_longest_wins_and_its_pages_are_kept() -> None:
    ids = [5, 1, 2, 5, 3, 4]
    rows, _, _ = rows_of((ids, 5, 9))
    assert chosen(rows, ids, {5: 3, 3: 4}) == ([1], [2])
    assert rows.kept().tolist() == rows.shown().tolist() == [3, 4, 5]
    assert [pages.tolist() for pages in rows.commits()] == [[4, 5], [2, 3]]
    assert rows.without_others(torch.tensor([3])).tolist() == [0]
    assert rows.said(torch.arange(6)).tolist() == [[3, 4, 5]]
    assert chosen(rows, ids, {5: 9}) == ([0], [0]), "the first of several"
    for names, newest, counted in ((["a"], 9, 1), (["a"], 8, 0), (["b"], 9, 0), (["_v2_mixed_warmup_0"], 9, 0)):
        blocks = drafted({"a": newest, "_v2_mixed_warmup_0": newest})
        rows.count_winners(blocks, names)
        assert blocks.rows.tolist() == [counted, 0], "counted, where this drafter made it in its last round"


def test_drafts_that_nobody_made_or_looked_at_follow_nothing() -> None:
    ids = [5, 1, 2, 5, 3, 4, 7, 1, 2]
    rows, _, _ = rows_of((ids[:6], 5, 9), (ids[6:], 2, 3))
    given, none = torch.tensor(ids), torch.tensor([False, False])
    assert rows.following(given, none, None).tolist() == [1, 2, 5, 3, 4, -1, 1, 2, -1]
    assert rows.following(given, torch.tensor([True, False]), None).tolist() == [-1] * 6 + [1, 2, -1]
    assert rows.following(given, torch.tensor([False, True]), None).tolist() == [1, 2, 5, 3, 4] + [-1] * 4
    unseen = torch.tensor([False] * 2 + [True] * 4 + [False] * 3)  # the grammar looked at the first draft only
    assert rows.following(given, none, unseen).tolist() == [1, -1, -1, -1, -1, -1, 1, 2, -1]


def test_noise_made_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [5, 1, 2, 5, 3, 4]
    rows, positions, _ = rows_of((ids, 5, 9))
    verifier = verify_v1.Verifier(CPU, sampled=True, filtered=False, recursive=None)
    verifier._seeds, verifier._batch = {"a": 3}, ["a"]
    sampling = SimpleNamespace(temperature=torch.tensor([0.8]))
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    whole = verifier._own(rows, logits, positions, sampling)
    monkeypatch.setattr(verify_v1, "NOISE_BYTES", 2 * 50 * verify_v1.NOISE_ITEM)
    assert torch.equal(verifier._own(rows, logits, positions, sampling), whole)
    assert not torch.equal(whole, logits.argmax(-1))


@pytest.mark.parametrize(
    ("why", "request_", "alone"),
    [
        ("another root", ([5, 1, 2, 6, 3, 4], 5, 9), False),
        ("logits that look back", ([5, 1, 2, 5, 3, 4], 5, 9), True),
        ("no room for its pages", ([5, 1, 2, 5, 3, 4], 5, LIMIT - 12), False),
        ("not whole", ([5, 1, 2, 5, 3], 4, 9), False),
    ],
)
def test_rows_that_may_not_win(why: str, request_: tuple[list[int], int, int], alone: bool) -> None:
    rows, _, slots = rows_of(request_, alone=(alone,))
    assert chosen(rows, request_[0], {5: 3, 6: 3, 3: 4})[0] == [0], why
    forks = rows.forks()
    assert torch.equal(*forks) and (slots[3:] == -1).all(), "nothing of theirs may be written"


def test_rows_that_may_win_up_to_the_end_of_the_context() -> None:
    ids = [5, 1, 2, 5, 3, 4]
    rows, _, _ = rows_of((ids, 5, LIMIT - 16))
    assert chosen(rows, ids, {5: 3, 3: 4}) == ([1], [2])


def test_chains_stay_as_they_are() -> None:
    """Requests with as many drafts as the tree is deep, or fewer, or none: beside a tree in one batch."""
    ids = [5, 1, 2, 5, 3, 4, 7, 1, 2, 8, 1, 9]
    rows, positions, _ = rows_of((ids[:6], 5, 9), (ids[6:9], 2, 3), (ids[9:11], 1, 4), (ids[11:], 0, 2))
    assert positions.tolist()[6:] == [3, 4, 5, 4, 5, 2]
    assert chosen(rows, ids, {5: 3, 3: 4, 7: 1})[0] == [1, 0, 0, 0]
    assert rows.shown().tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert rows.shown_drafts.tolist() == [2, 2, 1, 0] and rows.shown_begin.tolist() == [0, 3, 6, 8, 9]
    assert rows.without_others(torch.tensor([3, 2, 1, 0])).tolist() == [0, 2, 1, 0]


def test_growing_a_tree() -> None:
    """Children in order of rank, rows of one node alike until they part; each row writes to its own pages."""
    shape = TreeShape((2, 2))
    table = torch.arange(LIMIT // BLOCK)[None]
    growth = Growth(shape, table, torch.tensor([6]), BLOCK, LIMIT, greedy)
    growth.grow(torch.tensor([[0.0, 3, 2, 1]]))
    assert growth.tokens.tolist() == [1, 1, 2, 2] and growth.parting().tolist() == [0, 2]
    positions, slots, lengths = growth.step()
    assert positions.tolist() == [7] * 4 and lengths.tolist() == [8] * 4
    assert slots.tolist() == [7, 7 + 2 * BLOCK, 7 + 4 * BLOCK, 7 + 6 * BLOCK]
    hidden = torch.arange(4.0)[:, None]
    assert growth.nodes(hidden).flatten().tolist() == [0, 2]
    growth.grow(torch.tensor([[9.0, 0, 0, 8], [0, 0, 8, 9]]))
    assert growth.paths.tolist() == [[[1, 0], [1, 3], [2, 3], [2, 2]]]
    assert flat(torch.tensor([5]), growth.paths).tolist() == [[1, 0, 5, 1, 3, 5, 2, 3, 5, 2, 2]]


def test_growing_an_adaptive_tree() -> None:
    """Two rows stay together while the drafter is sure, and the third parts; at the end all are different."""
    shape, heat = TreeShape.of_rows(3, 2), torch.zeros(1)
    growth = growing(shape, torch.arange(LIMIT // BLOCK)[None], torch.tensor([6]), BLOCK, LIMIT, greedy, heat)
    growth.grow(torch.tensor([[0.0, 9, 8, 1]]))
    assert growth.tokens.tolist() == [1, 1, 2]
    hidden = torch.arange(3.0)[:, None]
    assert growth.nodes(hidden).flatten().tolist() == [0, 1, 2]
    growth.grow(torch.tensor([[9.0, 0, 0, 8], [9.0, 0, 0, 8], [0, 0, 7, 0]]))
    assert growth.paths.tolist() == [[[1, 0], [1, 3], [2, 2]]]


def test_nothing_waits_for_the_device() -> None:
    """No operator of a round reads a value back."""
    shape, ids = TreeShape((2, 1)), torch.tensor([5, 1, 2, 5, 3, 4])
    recursive, seeds, logits = Recursive(shape, 4, 9, CPU), torch.tensor([3]), torch.randn(6, 9)
    blocks = drafted({"a": 9})
    with Recorder() as recorder:
        growth = Growth(shape, torch.arange(16)[None], torch.tensor([9]), BLOCK, LIMIT, greedy)
        recursive.begin(["a"], torch.tensor([9]))
        for _ in range(2):
            recursive.note(logits[:1] if not growth._paths else logits[:2])
            growth.grow(logits[:1] if not growth._paths else growth.nodes(logits[:2]))
            growth.step()
        flat(torch.tensor([5]), growth.paths)
        adaptive = growing(
            TreeShape.of_rows(2, 2), torch.arange(16)[None], torch.tensor([9]), BLOCK, LIMIT, greedy, None
        )
        adaptive.grow(logits[:1])
        adaptive.grow(adaptive.nodes(logits[:2]))
        rows = Rows(shape, np.array([6]), np.array([5]), np.array([False]), CPU)
        rows.place(ids, torch.arange(9, 15), BLOCK, LIMIT)
        rows.find_pages(torch.arange(16)[None], torch.zeros(6, dtype=torch.int64))
        rows.forks()
        rows.choose(ids, ids)
        rows.let_win(recursive.walk(rows, ["a"], logits, ids, seeds)[0], torch.tensor([True]))
        rows.following(ids, torch.tensor([False]), torch.zeros(6, dtype=torch.bool))
        rows.count_winners(blocks, ["a"])
        for each in (rows.kept(), rows.shown(), rows.said(ids), rows.without_others(seeds), *rows.commits()):
            assert each is not None
    assert len(recorder.found) > 20 and not recorder.waits


# --- pages -----------------------------------------------------------------------------------------------------------


def test_pages_are_copied_in_every_layer() -> None:
    caches = [torch.arange(12.0).view(4, 3).clone(), torch.arange(24.0).view(4, 2, 3).clone()]
    want = [cache[[2, 1, 2, 1]].clone() for cache in caches]
    Pages(caches).copy(torch.tensor([2, 1, 1]), torch.tensor([0, 1, 3]))
    for cache, right in zip(caches, want, strict=True):
        torch.testing.assert_close(cache, right)


def test_caches_that_are_not_laid_out_page_by_page() -> None:
    with pytest.raises(SteeringError, match=r"shape \(2, 4, 3\).*--attention-backend"):
        Pages([torch.zeros(4, 2, 3).transpose(0, 1)])
    groups = SimpleNamespace(kv_cache_groups=[1, 2])
    with pytest.raises(SteeringError, match="in 2 KV cache groups"):
        pages_of({}, groups, lambda name: True)


def test_backends_whose_pages_are_not_vllms_blocks() -> None:
    def layer(backend: str, pages: int) -> SimpleNamespace:
        return SimpleNamespace(kv_cache=torch.zeros(pages, 3), attn_backend=SimpleNamespace(get_name=lambda: backend))

    config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["a", "b"])], num_blocks=4)
    everything = lambda name: True  # noqa: E731
    pages_of({"a": layer("FLASH_ATTN", 4), "b": layer("FLASH_ATTN", 4)}, config, everything)
    with pytest.raises(SteeringError, match="backend SPLITS makes 8 pages of 4 blocks.*smaller --block-size"):
        pages_of({"a": layer("FLASH_ATTN", 4), "b": layer("SPLITS", 8)}, config, everything)
    with pytest.raises(SteeringError, match="backend FLASHINFER takes no more rows than requests"):
        pages_of({"a": layer("FLASHINFER", 4), "b": layer("FLASHINFER", 4)}, config, everything)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_gumbel_and_depends_on_seed_position_and_token_alone() -> None:
    seeds, positions = torch.tensor([3, 3, 4, -5]), torch.tensor([10, 11, 10, 0])
    found = gumbel(seeds, positions, 20_000)
    for row in found:
        assert kstest(row.double().numpy(), lambda x: np.exp(-np.exp(-x))).pvalue > 1e-4
    for i in range(4):
        for j in range(i):
            assert abs(float(torch.corrcoef(found[[i, j]])[0, 1])) < 0.04, "streams that follow each other"
    again = gumbel(seeds[[2, 0]], positions[[2, 0]], 100)
    assert torch.equal(again, found[[2, 0], :100])


def test_noise_draws_from_the_distribution() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    for seeds, positions in ((torch.full((n,), 9), torch.arange(n)), (torch.arange(n), torch.full((n,), 9))):
        drawn = (p.log() + gumbel(seeds, positions, 4)).argmax(-1)
        assert chisquare(torch.bincount(drawn, minlength=4).numpy(), (n * p).numpy().astype(float)).pvalue > 1e-4
    pairs = (p.log() + gumbel(torch.full((n,), 1), torch.arange(n), 4)).argmax(-1).view(-1, 2)
    expected = (n // 2 * p[:, None] * p).flatten().double()
    found = torch.bincount(4 * pairs[:, 0] + pairs[:, 1], minlength=16)
    assert chisquare(found.numpy(), (expected * found.sum() / expected.sum()).numpy()).pvalue > 1e-4


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.1},
        {"bad_words": ["x"]},
        {"min_tokens": 3, "max_tokens": 9},
        {"logit_bias": {1: 1.0}},
        {"structured_outputs": "grammar"},
    ],
)
def test_requests_that_look_back_draft_chains(options: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if "structured_outputs" in options:
        options = {"structured_outputs": StructuredOutputsParams(regex="a+")}
    assert looks_back(SamplingParams(**options))
    assert not looks_back(SamplingParams(temperature=0.7, top_p=0.9, top_k=5, seed=1, logprobs=2, stop=["x"], n=2))


def test_a_block_size_that_vllm_chose_later_is_looked_at_again() -> None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=128), model_config=SimpleNamespace(max_model_len=768)
    )
    with pytest.raises(SteeringError, match="need 1024 slots.*block size of 128, the context is 768"):
        say_so(config, TreeShape((4, 1, 1, 1, 1)))
    config.cache_config.block_size = 32
    say_so(config, TreeShape((4, 1, 1, 1, 1)))


# --- the front end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["steered", "drafter"])
def test_an_admitted_tree_is_known_before_any_size_is_derived(pair: Any, drafter: str) -> None:
    config = engine_config(pair.target, getattr(pair, drafter), TREE, block_size=16)
    spec = config.speculative_config
    assert tree_of(config) == TreeShape((2, 1, 1)) and spec.num_speculative_tokens == 7
    assert config.num_lookahead_tokens == 2 * 2 * 16
    plan = Plan.of(config)
    assert (plan is None) == (drafter == "drafter") and (plan is None or plan.draft_length == 3)
    config.__post_init__()  # vLLM copies configurations
    assert spec.num_speculative_tokens == 7
    chains = engine_config(pair.target, getattr(pair, drafter), block_size=16)
    assert tree_of(chains) is None and chains.num_lookahead_tokens == 3
    of = lambda c: c.speculative_config.draft_model_config.compute_hash()  # noqa: E731
    assert of(config) != of(chains), "a compile cache would be shared"


def test_rows_of_an_adaptive_tree(pair: Any) -> None:
    sampled = {"draft_sample_method": "probabilistic"}
    assert rejects_recursively(engine_config(pair.target, pair.steered, TREE, block_size=16, spec=sampled))
    config = engine_config(pair.target, pair.steered, {"vllm_steer": {"tree_rows": 4}}, block_size=16, spec=sampled)
    assert tree_of(config) == TreeShape.of_rows(4, 3) and config.speculative_config.num_speculative_tokens == 15
    config.__post_init__()  # vLLM copies configurations
    assert tree_of(config) == TreeShape.of_rows(4, 3)
    assert not rejects_recursively(config), "which drafts are verified depends on them"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"additional": {"vllm_steer": {"tree": [2, 1]}}}, r"2 deep and num_speculative_tokens is 3: give both"),
    ({"additional": {"vllm_steer": {"tree": [17, 2, 1]}}}, "verifies 128 at most: give a smaller tree"),
    ({"block_size": 128}, "need 512 slots .* at a block size of 128, the context is 256: give --block-size 16 or 32"),
    ({"max_num_seqs": 64, "max_num_batched_tokens": 64}, "drafts 128 rows at a time, .* lower --max-num-seqs to 31"),
    (
        {"additional": {"vllm_steer": {"tree": [2, 1, 1], "tree_verification": "greedy"}}},
        "allowed are recursive and",
    ),
    (
        {"additional": {"vllm_steer": {"tree": [2, 1, 1], "tree_rows": 2}}},
        r"tree is \[2, 1, 1\] and tree_rows is 2: give",
    ),
    ({"additional": {"vllm_steer": {"tree_rows": 0}}}, "tree_rows is 0, allowed is a whole number from 1 up"),
    ({"additional": {"vllm_steer": {"tree_rows": 40}}}, "the tree of 40 rows has 40 rows of 4 tokens"),
    ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    ({"spec": {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.9, 0.5, 0.1]}}, "'synthetic'"),
    ({"additional": {"vllm_steer": {"tree": [2, 1, 1], "draft_graphs": True}}}, "draft_graphs"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED)
def test_trees_that_cannot_be_served(pair: Any, change: dict[str, Any], why: str) -> None:
    keys = {"additional": TREE, "block_size": 16} | change
    additional = keys.pop("additional")
    with pytest.raises(ValueError, match=why):
        engine_config(pair.target, pair.drafter, additional, **keys)


def test_a_sliding_window_is_refused(pair: Any, tmp_path: Path) -> None:
    import shutil

    windowed = tmp_path / "windowed"
    shutil.copytree(make_pair(tmp_path / "mistral", "mistral").target, windowed)
    change_config(windowed, sliding_window=64)
    with pytest.raises(ValueError, match="draft trees do not work with sliding windows"):
        engine_config(windowed, pair.drafter, TREE, block_size=16)


def test_a_tree_without_a_draft_model(pair: Any) -> None:
    with pytest.raises(ValueError, match="names the tree .* but no draft model is configured"):
        engine_config(pair.target, None, TREE)
    with pytest.raises(ValueError, match="names the tree of 4 rows, but no draft model is configured"):
        engine_config(pair.target, None, {"vllm_steer": {"tree_rows": 4}})


def test_the_kill_switch_drafts_chains(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KILL_SWITCH, "1")
    config = engine_config(pair.target, pair.steered, TREE, block_size=16)
    assert tree_of(config) is None and config.speculative_config.num_speculative_tokens == 3


def test_a_forged_tree(pair: Any) -> None:
    """What is in a model's config.json is not what `prepare` has written."""
    config = engine_config(pair.target, pair.drafter)
    config.speculative_config.draft_model_config.hf_config.vllm_steer_tree = {"widths": [2, 1, 1]}
    assert tree_of(config) is None
