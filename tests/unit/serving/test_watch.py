"""The watchdog's rule, and the way of a worker's counts to /metrics."""

from __future__ import annotations

import abc
import json
import logging
import os
import re
import resource
import runpy
import shutil
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from samples import round_of

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.serving.telemetry import reporter, watchdog
from vllm_steer.serving.telemetry.block_counter import Blocks, Counts

PAIR = ROOT / "examples" / "tiny_pair"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "vllm-steer.json"
K = 4


# --- the watchdog's rule --------------------------------------------------------------------------------------------


def counts_of(*blocks: tuple[int, int, int]) -> Counts:
    """(drafts, accepted, how many) of steered blocks."""
    table = torch.zeros(K + 1, K + 1, dtype=torch.float64)
    for drafts, accepted, n in blocks:
        table[drafts, accepted] += n
    return Counts(table, torch.zeros_like(table), 0, 0, 0)


EXPECTED = [[0.0, 0.6, 1.0, 1.2, 1.3], [0.0, 0.7, 1.2, 1.5, 1.6]]


def test_recorded_acceptance_of_the_tiny_pair() -> None:
    acceptance = checkpoint.load(PAIR / "steered").config.acceptance
    lengths = acceptance["trained"]["acceptance_length"]
    found = watchdog.recorded(acceptance, 5)
    assert {name: 1 + values[5] for name, values in found.items()} == pytest.approx(lengths, abs=1e-3)
    assert found["greedy"][:3] == pytest.approx([0, 0.5625, 0.5625 + 0.5625 * 0.5612])
    longer = watchdog.recorded(acceptance, 6)
    assert longer["greedy"][:6] == found["greedy"] and len(longer["greedy"]) == 7


@pytest.mark.parametrize(
    "acceptance",
    [{}, {"trained": None}, {"trained": {"greedy": "0.5"}}, {"trained": {"greedy": []}}, {"trained": {"greedy": [7]}}],
)
def test_nothing_recorded(acceptance: dict[str, Any]) -> None:
    assert watchdog.recorded(acceptance, K) == {}
    dog = watchdog.Watchdog([])
    assert dog.judge(counts_of((K, 1, 20), (K, 0, 800))) is None, "nothing to compare with"
    assert "no draft was accepted" in dog.judge(counts_of((K, 1, 20), (K, 0, 1000)))


def test_zero_acceptance_warns_once_per_episode() -> None:
    dog = watchdog.Watchdog(EXPECTED)
    assert dog.judge(counts_of((K, 0, watchdog.ENOUGH - 1))) is None, "a handful proves nothing"
    warning = dog.judge(counts_of((K, 0, watchdog.ENOUGH)))
    assert "no draft was accepted in the last 200 steered blocks, 1.30 recorded" in warning
    assert "STEER_DISABLE=1" in warning and "doctor" in warning and "dtype" in warning
    assert dog.judge(counts_of((K, 0, 5000))) is None, "the same episode"
    assert dog.judge(counts_of((K, 0, 5000), (K, 2, 300))) is None, "recovered"
    assert "no draft" in dog.judge(counts_of((K, 0, 5300), (K, 2, 300))), "a new episode"


def test_half_of_the_recorded_acceptance() -> None:
    """1.30 is the smaller of the two recorded values, so 0.65 is the limit; a mean of 1,000 blocks strays by 0.015."""
    for accepted, low in ((650, False), (600, False), (580, True)):
        warning = watchdog.Watchdog(EXPECTED).judge(counts_of((K, 1, accepted), (K, 0, 1000 - accepted)))
        assert (warning is not None) == low
    assert "0.58 draft tokens per block were accepted in the last 1000 steered blocks, 1.30 recorded" in warning


def test_what_is_uncertain_waits_for_more_blocks() -> None:
    """0.56 of the blocks accept one draft, 0.65 is the limit: at 200 blocks that could be chance, at 800 no more."""
    dog, warned = watchdog.Watchdog(EXPECTED), []
    for n in (200, 400, 800, 1600):
        accepting = n * 56 // 100
        warned.append(dog.judge(counts_of((K, 1, accepting), (K, 0, n - accepting))) is not None)
    assert warned == [False, False, True, False]


def test_chance_does_not_bark() -> None:
    """Acceptance at seven tenths of the recorded, for 2 million blocks, looked at 200 and more at a time."""
    generator, table = torch.Generator().manual_seed(0), torch.zeros(K + 1, K + 1, dtype=torch.float64)
    dog = watchdog.Watchdog(EXPECTED)
    rates = torch.tensor([0.5, 0.22, 0.15, 0.09, 0.04])  # 0.95 accepted
    for n in torch.randint(40, 400, (9000,), generator=generator).tolist():
        drawn = torch.multinomial(rates, n, replacement=True, generator=generator)
        table = table.clone()
        table[K] += torch.bincount(drawn, minlength=K + 1)
        assert dog.judge(Counts(table, torch.zeros_like(table), 0, 0, 0)) is None
    assert table.sum() > 1_900_000


def test_short_blocks_are_compared_with_short_blocks() -> None:
    """Drafting one token at a time accepts less: 0.5 per block is good then, and bad for four."""
    assert watchdog.Watchdog(EXPECTED).judge(counts_of((1, 1, 1000), (1, 0, 1000))) is None
    assert watchdog.Watchdog(EXPECTED).judge(counts_of((K, 1, 1000), (K, 0, 1000))) is not None


def test_unsteered_blocks_are_not_judged() -> None:
    counts = counts_of((K, 0, 1000))
    assert watchdog.Watchdog(EXPECTED).judge(Counts(counts.unsteered, counts.steered, 0, 0, 0)) is None


# --- from the worker to /metrics ------------------------------------------------------------------------------------


@pytest.fixture()
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a worker watches, in a place of its own for temporary files."""
    monkeypatch.setattr(reporter.tempfile, "gettempdir", lambda: str(tmp_path))
    return Engine(blocks=Blocks(8, K, torch.device("cpu")), scale=1.0)


class Engine(types.SimpleNamespace):
    """A part of model.Injection."""


ACCEPTANCE = {"trained": {"agreement": [0.5] * K, "overlap": [0.25] * K}}


def gauges(
    name: str,
    engine_index: int = 0,
    steered: bool = True,
    additional_config: Any = None,
    tree: bool = False,
    **parallel: Any,
) -> Any:
    """The stat logger of a server whose model is called `name`."""
    from vllm_steer.serving.plan import PLAN, TREE, Written
    from vllm_steer.serving.telemetry.metrics import Gauges

    plan = Written(source="x", revision=None, scale=1.0, steered_layers=(0,), projection_size=1, max_num_seqs=8,
                   max_rows=64, draft_length=K)  # fmt: skip
    written = {PLAN: plan if steered else Written(), TREE: Written(widths=[2, 1]) if tree else Written()}
    draft = types.SimpleNamespace(hf_config=types.SimpleNamespace(**written), model="x")
    config = types.SimpleNamespace(
        speculative_config=types.SimpleNamespace(draft_model_config=draft, method="draft_model")
        if steered or tree
        else None,
        model_config=types.SimpleNamespace(served_model_name=name),
        parallel_config=types.SimpleNamespace(**parallel),
        additional_config=additional_config,
    )
    return Gauges(config, engine_index)


def reports(engine: Any, acceptance: dict[str, Any] | None = None, index: int = 0) -> reporter.Reporter:
    """The worker's side, of a steering for which this acceptance was recorded."""
    engine.config, engine.adapter = types.SimpleNamespace(acceptance=acceptance or {}), "initial"
    return reporter.Reporter(engine, index)


def exposed(name: str, engine_index: int = 0) -> dict[str, float]:
    """Our metrics of one engine, without prefix, and with the position or the sampling after the name."""
    from prometheus_client import REGISTRY

    mine = {"model_name": name, "engine": str(engine_index)}
    found = {}
    for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
        if sample.name.startswith("vllm_steer:") and mine.items() <= sample.labels.items():
            more = [value for key, value in sample.labels.items() if key not in mine]
            found["_".join([sample.name.removeprefix("vllm_steer:"), *more])] = sample.value
    return {key: value for key, value in found.items() if "_created" not in key}


def test_guides_that_are_not_finite_are_warned_of_once(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker = reports(engine, ACCEPTANCE, 0)
    for _ in range(2):
        engine.blocks.guides += torch.tensor([0, 0, 3])
        worker.look()
    assert [r.message for r in caplog.records if "not finite in 3 guides" in r.message] != []
    assert sum("not finite" in record.message for record in caplog.records) == 1


def test_the_requests_vllm_warms_its_kernels_with_are_not_counted(engine: Any) -> None:
    """Hundreds of them, with drafts nobody accepts, looked like an acceptance that has collapsed."""
    for id in ("_warmup_0_", "_v2_mixed_warmup_decode_", "a"):
        for drafts, start, accepted in ((None, 0, 4), ([K], 5, 0)):
            round_of(engine.blocks, [id], drafts, [start], [accepted])
    counts = engine.blocks.read()
    assert counts.steered.sum() == 1 and counts.unsteered.sum() == 0


def test_what_a_worker_counts_is_at_metrics(engine: Any) -> None:
    worker = reports(engine, ACCEPTANCE, 0)
    server = gauges("counted")
    server.log_engine_initialized()
    assert exposed("counted")["blocks_total"] == 0 == exposed("counted")["guide_norm"]
    blocks = engine.blocks
    round_of(blocks, "a", None, [0], [4])
    round_of(blocks, "a", [K], [5], [3], on=False)
    round_of(blocks, "a", [K], [9], [1], on=False)
    blocks.guides += torch.tensor([2, 12, 0])
    worker.look()
    server.record(None, None, mm_cache_stats=None, engine_idx=0)
    first = exposed("counted")
    assert first == {
        "steering_on": 1, "guide_norm": 6, "adapter_initial": 1,
        "blocks_total": 2, "steered_blocks_total": 1, "accepted_tokens_total": 4,
        "accepted_tokens_per_pos_total_0": 2, "accepted_tokens_per_pos_total_1": 1,
        "accepted_tokens_per_pos_total_2": 1, "accepted_tokens_per_pos_total_3": 0,
        "recorded_accepted_tokens_greedy": 0.9375,
        "recorded_accepted_tokens_sampled": pytest.approx(0.25 + 0.25**2 + 0.25**3 + 0.25**4),
    }  # fmt: skip
    blocks.guides += torch.tensor([1, 1, 0])
    engine.scale = 0
    worker.look()
    server.record(None, None)
    assert exposed("counted") == first, "the file is read once a second"
    server.log()
    assert exposed("counted") == first | {"steering_on": 0, "guide_norm": 1}, "counters stay, the norm is of late"


def test_a_worker_that_starts_again_counts_on(engine: Any) -> None:
    server = gauges("again")
    for round in (1, 2):
        worker = reports(engine)
        round_of(engine.blocks, "a", None, [0], [4])
        round_of(engine.blocks, "a", [K], [5], [3])
        worker.look()
        server.log()
        assert exposed("again")["blocks_total"] == round
        reporter.remove(worker._file)
        engine.blocks = Blocks(8, K, torch.device("cpu"))
    assert not [name for name in exposed("again") if "recorded" in name]


def test_another_adapter_is_named_and_judged_afresh(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker, server = reports(engine, ACCEPTANCE), gauges("swapped")
    engine.blocks.read = lambda: counts_of((K, 0, watchdog.ENOUGH - 1))
    worker.look()
    server.log()
    assert exposed("swapped")["recorded_accepted_tokens_greedy"] == 0.9375
    engine.config, engine.adapter = types.SimpleNamespace(acceptance={"trained": {"agreement": [1.0] * K}}), "mine"
    worker.look()
    server._file, server._next = worker._file, 0
    server.log()
    found = exposed("swapped")
    assert (found["adapter_initial"], found["adapter_mine"], found["recorded_accepted_tokens_greedy"]) == (0, 1, K)
    engine.blocks.read = lambda: counts_of((K, 0, 2 * watchdog.ENOUGH - 2))
    worker.look()
    assert "collapsed" not in caplog.text, "what the old steering drafted is not held against the new one"
    engine.blocks.read = lambda: counts_of((K, 0, 2 * watchdog.ENOUGH))
    worker.look()
    assert "collapsed" in caplog.text and "4.00 recorded" in caplog.text


def test_lenience_is_a_gauge() -> None:
    asked = {"vllm_steer": {"lenience": {"epsilon": 0.5, "form": "square"}}}
    server = gauges("lenient", steered=False, additional_config=asked)
    assert exposed("lenient") == {"lenience_epsilon_square": 0.5}
    assert not server._on


def test_engines_of_one_server_are_told_apart(engine: Any) -> None:
    other = Engine(blocks=Blocks(8, K, torch.device("cpu")), scale=0)
    workers = reports(engine), reports(other, {}, 1)
    for i in (0, 1):
        gauges("several", i).log()
    assert [exposed("several", i)["steering_on"] for i in (0, 1)] == [1, 0]
    del workers


def test_a_cleaned_folder_is_made_again(engine: Any) -> None:
    worker = reports(engine)
    shutil.rmtree(reporter.directory())
    worker.look()
    assert reporter.find(os.getpid(), 0) == worker._file


def test_a_later_vllm_may_ask_more_of_a_stat_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.metrics import loggers

    from vllm_steer.serving.telemetry import metrics as module

    class Later(loggers.StatLoggerBase):
        @abc.abstractmethod
        def new(self) -> None: ...

    monkeypatch.setattr(loggers, "StatLoggerBase", Later)
    found = runpy.run_path(module.__file__)["Gauges"]
    assert issubclass(found, Later) and found(None) is not None


def test_a_steered_drafter_that_nobody_looked_at_ends_the_server() -> None:
    """This vLLM calls none of our seams, or the plugin could not start: without this it would be served unsteered."""
    from vllm_steer.serving.telemetry.metrics import Gauges

    config = types.SimpleNamespace(
        speculative_config=types.SimpleNamespace(
            draft_model_config=types.SimpleNamespace(
                hf_config=types.SimpleNamespace(), model=str(PAIR / "steered"), revision=None
            ),
            method="draft_model",
        ),
        parallel_config=types.SimpleNamespace(),
        additional_config={},
    )
    with pytest.raises(SteeringError, match="is a steered drafter, and vllm-steer was not called to check it"):
        Gauges(config)
    config.speculative_config.draft_model_config.model = str(PAIR / "drafter")
    assert not Gauges(config)._on


def test_of_several_api_servers_the_first_reports(engine: Any) -> None:
    """They are siblings of the engine: what they share is their parent."""
    worker = reports(engine)
    gauges("second", _api_process_count=2, _api_process_rank=1).log()
    gauges("first", _api_process_count=2, _api_process_rank=0).log()
    assert not exposed("second") and exposed("first")["steering_on"] == 1
    del worker


def test_somebody_elses_worker_is_not_ours(engine: Any) -> None:
    worker = reports(engine)
    report = json.loads(worker._file.read_text())
    assert report["ancestors"][0] == os.getpid() and os.getppid() in report["ancestors"]
    worker._file.write_text(json.dumps(report | {"ancestors": report["ancestors"][1:]}))
    assert reporter.find(os.getpid(), 0) is None and reporter.find(os.getppid(), 0) == worker._file
    far = report | {"pid": 2**22 + 1, "namespace": "pid:[1]"}
    worker._file.write_text(json.dumps(far))
    assert reporter.find(os.getpid(), 0) is None and worker._file.exists(), "another container's, alive or not"
    worker._file.write_text(json.dumps(report | {"pid": 2**22 + 1}))  # past Linux's largest
    assert reporter.find(os.getpid(), 0) is None and not worker._file.exists(), "the dead are cleared away"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "\x00\xff", None])
def test_a_bad_file_never_raises(text: str | None, engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker, server = reports(engine), gauges("bad")
    server.log()
    before = exposed("bad")
    worker._file.unlink() if text is None else worker._file.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        for _ in range(3):
            server.log()
    unknown = {"steering_on": float("nan"), "guide_norm": float("nan")}
    assert exposed("bad") == pytest.approx(before | unknown, nan_ok=True)
    assert [r.getMessage() for r in caplog.records] == [
        "the worker of engine 0 reports no counts any more: vllm_steer metrics stop"
    ]
    engine.scale = 0
    worker.look()
    server.log()
    assert exposed("bad") == before | {"steering_on": 0}, "it goes on when the file is whole again"


def test_metrics_come_back_after_a_full_disk(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker, server = reports(engine), gauges("full")
    server.log()
    before, limits = exposed("full"), resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may grow: a write fails like on a full disk
        try:
            worker.look()
            worker.look()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ["no vllm_steer metrics at /metrics for the time being" in r.getMessage() for r in caplog.records] == [True]
    assert not list(reporter.directory().iterdir()), "old counts were left"
    server.log()
    assert exposed("full") != before
    worker.look()
    server.log()
    assert exposed("full") == before


def test_a_report_without_its_numbers_never_raises(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker, server = reports(engine), gauges("odd")
    report = json.loads(worker._file.read_text())
    worker._file.write_text(json.dumps(report | {"accepted_at": 5}))
    with caplog.at_level(logging.ERROR, "vllm.steer"):
        for _ in range(3):
            server.log()
    assert [r.getMessage() for r in caplog.records] == ["the vllm_steer metrics at /metrics have stopped"]


def test_no_worker_on_this_machine_is_said_once(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = gauges("remote")
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        for _ in range(3):
            server.log()
    assert ["leaves no counts on this machine" in r.getMessage() for r in caplog.records] == [True]
    assert not exposed("remote")


def test_a_directory_of_others_is_not_used(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"vllm-steer-{os.getuid()}"
    path.mkdir()
    path.chmod(0o755)
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        reports(engine).look()
    assert "is not a private directory" in caplog.text and not list(path.iterdir())
    gauges("others").log()
    path.rmdir()
    reports(engine)
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_lost_directory_ends_the_file_and_not_the_watch(
    engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = reports(engine)
    shutil.rmtree(tmp_path / f"vllm-steer-{os.getuid()}")
    (tmp_path / f"vllm-steer-{os.getuid()}").touch()  # nor can it be made again
    round_of(engine.blocks, "abcdefgh", None, [0] * 8, [0] * 8)
    for step in range(25):
        round_of(engine.blocks, "abcdefgh", [K] * 8, [1 + step] * 8, [0] * 8)
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        worker.look()
        worker.look()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "no draft was accepted" in said[0] and "is not a private directory" in said[1]


def test_an_unsteered_tree_is_counted_and_not_judged(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Counters alone: nothing says that it steers, or does not."""
    engine.blocks, engine.adapter, engine.scale = Blocks(8, K, torch.device("cpu"), 2), None, 0.0
    engine.config = types.SimpleNamespace(acceptance={})
    worker, server = reporter.Reporter(engine, 0), gauges("rows", steered=False, tree=True)
    round_of(engine.blocks, "a", None, [0], [4], on=False)
    for start in range(5, 505):  # more than the watchdog wants
        round_of(engine.blocks, "a", [K], [start], [0], on=False)
    engine.blocks.rows += torch.tensor([3.0, 1.0])
    worker.look()
    server.log()
    assert exposed("rows") == {
        "blocks_total": 500, "accepted_tokens_total": 0, "blocks_per_row_total_0": 3, "blocks_per_row_total_1": 1,
        **{f"accepted_tokens_per_pos_total_{i}": 0 for i in range(K)},
    }  # fmt: skip
    assert not caplog.records


def test_an_unsteered_engine_has_nothing(engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = gauges("plain", steered=False)
    server.log_engine_initialized()
    server.record(None, None)
    server.log()
    assert not exposed("plain") and not caplog.records and not list(tmp_path.iterdir())


def test_the_watch_ends_with_its_engine(
    engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reporter, "INTERVAL", 0.02)
    holder = [Engine(blocks=engine.blocks, scale=1.0)]
    worker = reports(holder[0], ACCEPTANCE)
    file = worker._file
    worker.start()
    round_of(engine.blocks, "abcdefgh", None, [0] * 8, [0] * 8)
    for step in range(25):
        round_of(engine.blocks, "abcdefgh", [K] * 8, [1 + step] * 8, [0] * 8)
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "no draft was accepted in the last 200 steered blocks" in caplog.text and file.exists()
    holder.clear()
    worker.join(10)
    assert not worker.is_alive() and not file.exists()


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    from vllm_steer.serving.telemetry.metrics import epsilon, metrics

    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    exprs = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for expr in exprs for name in re.findall(r"vllm_steer:\w+", expr)}
    exposed = {
        metric._name + ("_total" if metric._type == "counter" else "") for metric in [*metrics().values(), epsilon()]
    }
    assert asked == exposed, "and every metric has its place"
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels lie over each other"
