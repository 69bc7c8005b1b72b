"""common/files.py: one process writes at a time, and a lock ends with its process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer, refuse_used, write_json
from vllm_steer.drafters.steered.checkpoint import filling

HOLD = """
import sys, time
from pathlib import Path
from vllm_steer.common.files import only_writer
with only_writer(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holding(lock: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    lock = tmp_path / "new/lock"
    process = holding(lock, 60)
    with pytest.raises(SteeringError, match="another process is writing the thing: let it finish"):
        with only_writer(lock, "the thing"):
            pass
    process.kill()
    process.wait()
    with only_writer(lock, "the thing"):
        pass
    assert not lock.exists()


def test_who_waits_gets_it_and_no_two_have_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    lock = tmp_path / "lock"
    process = holding(lock, 1)
    began = time.monotonic()
    with only_writer(lock, "the thing", wait=True):
        assert time.monotonic() - began > 0.5 and "waiting for another process that is writing the thing" in caplog.text
        assert lock.exists(), "its holder removed the file that we waited for: ours is another one"
        with pytest.raises(SteeringError), only_writer(lock, "the thing"):
            pass
    process.wait()


def test_a_second_merge_into_one_directory_leaves_the_first_alone(tmp_path: Path) -> None:
    with filling(tmp_path / "out"):
        (tmp_path / "out/weights").write_text("half of them")
        with pytest.raises(SteeringError, match="another process is writing"), filling(tmp_path / "out"):
            pass
        assert (tmp_path / "out/weights").exists()
    with pytest.raises(SteeringError, match="is not an empty directory"), filling(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SteeringError, match="the thing cannot be written"), only_writer(tmp_path / "lock", "the thing"):
        pass


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SteeringError, match="the thing cannot be written"):
        with only_writer(tmp_path / "file/lock", "the thing"):
            pass


def test_json_is_replaced_and_a_used_output_is_refused(tmp_path: Path) -> None:
    refuse_used(tmp_path / "absent")
    refuse_used(tmp_path)
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    for used in (tmp_path, tmp_path / "x.json"):
        with pytest.raises(SteeringError, match="exists and is not an empty directory: give a new one"):
            refuse_used(used)
