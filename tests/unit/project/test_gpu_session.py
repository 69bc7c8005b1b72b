"""The scripts for a lent GPU: what can be tried of them without one."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from engines import ENV
from repository import ROOT
from test_docs import refused

GPU = ROOT / "benchmarks" / "gpu"
TINY = ROOT / "examples" / "tiny_pair"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_pieces_make_the_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry = script("carry", monkeypatch)
    whole = tmp_path / "a.whl"
    whole.write_bytes(bytes(range(256)) * 10)
    carry.cut([whole], tmp_path / "pieces", size=1000)
    assert len(list((tmp_path / "pieces").glob("a.whl.*"))) == 3
    carry.join(tmp_path / "pieces", tmp_path / "there")
    assert (tmp_path / "there" / "a.whl").read_bytes() == whole.read_bytes()
    last = tmp_path / "pieces" / "a.whl.002"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match="a.whl is not what was cut .* carry its pieces again"):
        carry.join(tmp_path / "pieces", tmp_path / "there")
    assert not (tmp_path / "there" / "a.whl").exists()
    last.unlink()
    with pytest.raises(ValueError, match="a.whl.002 did not arrive"):
        carry.join(tmp_path / "pieces", tmp_path / "there")


def test_steps_that_cannot_run_are_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    session = script("session", monkeypatch)
    monkeypatch.setattr(session.importlib.metadata, "version", lambda name: "0.25.1")
    monkeypatch.setattr(sys, "argv", ["session.py", "--list", "--out", str(tmp_path)])
    assert session.main() == 0
    said = capsys.readouterr().out
    assert "[parity] skipped: vLLM 0.25.1 is here, 0.32 and 0.33 is needed" in said
    assert "[train] skipped: no --pair" in said and "[kernels] skipped" not in said
    monkeypatch.setattr(sys, "argv", ["session.py", "cots", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        session.main()
    assert "unknown step cots; allowed are kernels, parity, trees, cost, train" in capsys.readouterr().err


def test_a_step_is_written_down_and_stops_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = script("session", monkeypatch)
    made = {"kernels": session.Step(("true", "false", "true"))}
    monkeypatch.setattr(session, "steps", lambda pair, out: made)
    monkeypatch.setattr(sys, "argv", ["session.py", "--out", str(tmp_path)])
    assert session.main() == 1
    found = json.loads((tmp_path / "session.json").read_text())["steps"]["kernels"]
    assert found["exit_codes"] == [0, 1]


def test_every_command_of_the_session_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts exist, tests are collected, and the verbs accept their options."""
    session = script("session", monkeypatch)
    for step in session.steps(TINY, tmp_path).values():
        for command in map(shlex.split, step.commands):
            if command[1].endswith(".py"):
                assert Path(command[1]).is_file()
            elif command[2] == "pytest":
                done = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout[-2000:]
            else:
                assert command[2] == "vllm_steer.cli" and not refused(command[3:])


@pytest.mark.slow
def test_the_cost_script_runs(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    command = [
        sys.executable,
        str(GPU / "cost.py"),
        str(TINY / "target"),
        str(TINY / "drafter"),
        "--dry-run",
        "--out",
        out,
    ]
    env = os.environ | ENV | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["form"] for row in rows} == {"unsteered", "scale 0", "steered"} and len(rows) == 8
    assert all(row["same_answers"] and row["tokens_per_s"] > 0 for row in rows)
