"""The cache: what is read back is what was computed, a killed fill goes on, nothing foreign is accepted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import DRAFTER, Size, tiny_model
from repository import SUPPORT
from test_train import folder, options, weights  # noqa: F401  (a fixture)
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import Row, collate
from vllm_steer.training import batches, trainer
from vllm_steer.training.cache import StateCache
from vllm_steer.training.pair import trunk_fits

ROWS = [Row(tuple(range(1, n)), 2) for n in (7, 12, 4, 9, 5)]
WIDTHS = {"states": 6, "final": 2}


def read(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values that tell row, position and column apart, exact in bfloat16."""
    ids = batch["input_ids"][..., None].float()
    return {"states": ids + torch.arange(6) * 16, "final": -ids - torch.arange(2) * 16}


def make(directory: Path, rows: list[Row] = ROWS, **made_from: object) -> StateCache:
    return StateCache(directory, rows, WIDTHS, {"target": "x"} | made_from)


def test_rows_come_back_in_any_order_and_padded(tmp_path: Path) -> None:
    cache = make(tmp_path / "c")
    cache.fill(read, 2)
    batch = cache.batch([3, 0])
    plain = collate([ROWS[3], ROWS[0]])
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    mask = plain["attention_mask"].bool()
    for name, tensor in read(plain).items():
        assert torch.equal(batch[name][mask].float(), tensor[mask])
        assert not batch[name][~mask].any()


def test_a_killed_fill_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls = []

    def stopping(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(batch["input_ids"].shape[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(batch)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).fill(stopping, 2)
    with (tmp_path / "states.bin").open("ab") as file:  # a kill amid a write
        file.write(b"torn")
    cache = make(tmp_path)
    assert cache.done == 2
    cache.fill(lambda batch: calls.append("more") or read(batch), 2)
    assert calls.count("more") == 2 and make(tmp_path).done == 5
    whole = make(tmp_path / "whole")
    whole.fill(read, 5)
    every = range(len(ROWS))
    assert all(torch.equal(a, b) for a, b in zip(cache.batch(every).values(), whole.batch(every).values(), strict=True))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def swap(path: Path, cache: StateCache) -> StateCache:
    """Somebody writes the file anew under a run that has opened it."""
    path.write_bytes(bytes(path.stat().st_size))
    return cache


def rewrite(directory: Path, **changes: object) -> None:
    index = json.loads((directory / "cache.json").read_text())
    (directory / "cache.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: make(d, target="y"), "was made with target x, this run has y"),
        (lambda d: make(d, ROWS[1:]), "was made with rows_sha256"),
        (lambda d: ((d / "final.bin").write_bytes(b""), make(d)), "final.bin is shorter than"),
        (lambda d: ((d / "cache.json").write_text("{"), make(d)), "cache.json is damaged"),
        (lambda d: ((d / "cache.json").write_text("[1]"), make(d)), "cache.json is damaged"),
        (lambda d: (append(d / "states.bin"), make(d)), "states.bin is longer than"),
        (lambda d: (flip(d / "states.bin", -3), make(d)), "states.bin is damaged in row 4 of 5"),
        (lambda d: (flip(d / "final.bin", 0), make(d)), "final.bin is damaged in row 0 of 5"),
        (lambda d: (flip(d / "checksums.bin", 0), make(d)), "final.bin is damaged in row 0 of 5"),
        (lambda d: ((d / "checksums.bin").write_bytes(b""), make(d)), "checksums.bin is shorter than"),
        (lambda d: swap(d / "final.bin", make(d)).batch([2]), "final.bin is damaged in row 2 of 5"),
        (lambda d: (make(d), (d / "final.bin").write_bytes(b""))[0].batch([2]), "final.bin has become shorter"),
        (lambda d: (rewrite(d, rows=6), make(d)), "says 6 rows of 5"),
        (lambda d: (rewrite(d, rows=-1), make(d)), "cache.json is damaged"),
    ],
)
def test_another_or_a_damaged_cache_is_refused(tmp_path: Path, damage: object, complaint: str) -> None:
    make(tmp_path).fill(read, 2)
    with pytest.raises(SteeringError, match=complaint):
        damage(tmp_path)


FILL = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_cache import make, read
def slow(batch):
    time.sleep(0.3)
    print("read", flush=True)
    return read(batch)
cache = make(Path(sys.argv[1]))
cache.fill(slow, 1)
assert cache.done == 5 and len(cache.batch(range(5))) == 5
"""


def filling(directory: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", FILL, str(directory), str(SUPPORT), str(Path(__file__).parent)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_fills(tmp_path: Path) -> None:
    both = [filling(tmp_path / "c") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(said).count("read") == 5, "each row is computed once, whoever does it"
    whole = make(tmp_path / "whole")
    whole.fill(read, 5)
    for name in ("states.bin", "final.bin", "checksums.bin"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = filling(tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "read\n"
    process.kill()
    process.wait()
    cache = make(tmp_path)
    cache.fill(read, 2)
    assert cache.done == 5


def test_who_waited_for_another_cache_is_refused(tmp_path: Path) -> None:
    """Both began with an empty directory; the one that comes second must not go on with what the first one wrote."""
    second = make(tmp_path, target="y")
    make(tmp_path).fill(read, 2)
    with pytest.raises(SteeringError, match="was made with target x, this run has y"):
        second.fill(lambda _: pytest.fail("it was filled"), 2)


def test_other_rows_are_refused_without_waiting(tmp_path: Path) -> None:
    """While the first process still computes its first batch."""

    def first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with pytest.raises(SteeringError, match="was made with target x, this run has y"):
            make(tmp_path, target="y")
        return read(batch)

    make(tmp_path).fill(first, 5)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def full(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise OSError(28, "No space left on device")

    with pytest.raises(SteeringError, match="cannot be written .*No space left.*: make room, or give another --cache"):
        make(tmp_path).fill(full, 2)


def test_a_cache_from_before_checksums_still_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path).fill(read, 2)
    (tmp_path / "checksums.bin").unlink()
    assert make(tmp_path).done == 5 and "has no checksums yet" in caplog.text
    flip(tmp_path / "final.bin", 0)
    with pytest.raises(SteeringError, match="final.bin is damaged in row 0"):
        make(tmp_path)


@pytest.mark.parametrize(("family", "fits"), [("llama", True), ("gemma2", True), ("granite", False)])
def test_which_drafters_can_start_at_an_upper_layer(family: str, fits: bool) -> None:
    model = tiny_model(family, Size(DRAFTER.hidden, 3, DRAFTER.ffn))
    batch = collate([Row(tuple(range(1, 9)), 0), Row((3, 2, 1), 0)])
    assert trunk_fits(model, 2, batch) == fits
    assert len(model.get_decoder().layers) == 3


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_training_from_a_cache_is_training(folder: Path, tmp_path: Path, layers: tuple, monkeypatch) -> None:  # noqa: F811
    """Frozen drafter: with layer 0 unsteered its output is cached too, and the target never runs again."""
    run = dict(mode="steer", steered_layers=layers, steps=6)
    plain = trainer.train(options(folder, tmp_path / "plain", **run))
    cached = trainer.train(options(folder, tmp_path / "cached", **run, cache=str(tmp_path / "cache")))
    assert (tmp_path / "cache" / "trunk.bin").exists() == (layers == (1,))
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["rows"] == 24
    for name in ("overlap", "agreement"):  # bfloat16 states
        assert cached["trained"][name] == pytest.approx(plain["trained"][name], abs=0.02)
    assert plain["trained"]["overlap"] != plain["untrained"]["overlap"]
    monkeypatch.setattr(batches, "read_target", lambda *_: pytest.fail("the target ran again"))
    again = trainer.train(options(folder, tmp_path / "again", **run, cache=str(tmp_path / "cache")))
    assert again == cached


@pytest.mark.parametrize("mode", ["distill", "joint"])
def test_upper_layers_train_from_a_cache(folder: Path, tmp_path: Path, mode: str) -> None:  # noqa: F811
    """The layer above the cached trunk changes and nothing else does; the drafter is written whole."""
    run = dict(mode=mode, trained_layers=(1,), steered_layers=(1,), steps=6)
    plain = trainer.train(options(folder, tmp_path / "plain", **run))
    cached = trainer.train(options(folder, tmp_path / "cached", **run, cache=str(tmp_path / "cache")))
    assert (tmp_path / "cache" / "trunk.bin").exists()
    for name in ("overlap", "agreement"):  # bfloat16 states
        assert cached["trained"][name] == pytest.approx(plain["trained"][name], abs=0.02)
    before, after = weights(folder / "drafter"), weights(tmp_path / "cached")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".layers.1." in name for name in changed)


def test_a_drafter_that_writes_its_own_rows_is_not_cut(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    run = dict(mode="distill", trained_layers=(1,), on_policy=0.5, renew=1, save_every=1, steps=1)
    found = trainer.train(options(folder, tmp_path / "out", **run, cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache" / "trunk.bin").exists() and found["trained"]["positions"]
