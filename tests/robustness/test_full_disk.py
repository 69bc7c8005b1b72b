"""A full disk: it is said, and nothing that loads is left half-made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from damage import GOLDEN

from vllm_steer.drafters.steered import checkpoint

CHILD = """
import contextlib, io, json, os, resource, shutil, sys
from pathlib import Path
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.cli import main
jobs, limits, adapter = json.load(sys.stdin)
steering = checkpoint.load(adapter)
answers = []
for limit in limits:
    for verb, *args, output in jobs:
        said, code = io.StringIO(), None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            with contextlib.redirect_stderr(said):
                if verb == "save":
                    code = checkpoint.save(output, steering) and 0
                else:
                    code = main([verb, *args, "--output", output])
        except Exception as error:
            said.write(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        left = sorted(str(p) for p in Path(output).rglob("*")) if os.path.exists(output) else None
        if code == 0 and limit != -1:
            shutil.rmtree(output)
        answers.append([verb, limit, output, code, said.getvalue(), left])
json.dump(answers, open(sys.argv[1], "w"))
"""


def test_a_full_disk_is_told_and_leaves_nothing_that_loads(pair, adapter: Path, tmp_path: Path) -> None:
    """No file may grow beyond a limit, for limits that stop at each file in turn: a write fails like on a full disk."""
    published = [str(GOLDEN), "--drafter", str(GOLDEN / "base_drafter"), "--target", str(GOLDEN / "verifier")]
    jobs = [
        ["merge", str(adapter), "--drafter", str(pair.drafter), str(tmp_path / "merged")],
        ["import", *published, str(tmp_path / "imported")],
        ["save", str(tmp_path / "saved")],
    ]
    written = [*pair.steered.rglob("*"), *GOLDEN.glob("*/*.*"), *adapter.rglob("*")]
    sizes = sorted({path.stat().st_size for path in written if path.is_file()})
    limits = [0, *(size - 1 for size in sizes), -1]  # -1: none
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "answers.json")],
        input=json.dumps([jobs, limits, str(adapter)]),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert child.returncode == 0, child.stderr
    failed: Counter[str] = Counter()
    for verb, limit, output, code, said, left in json.loads((tmp_path / "answers.json").read_text()):
        if code == 0:
            assert f"{output}/steering/config.json" in left
            continue
        failed[verb] += 1
        assert limit != -1 and output in said and "File too large" in said, said
        assert not left, f"{verb} under {limit} left {left}"
        assert code == 1 or (verb == "save" and said.startswith("OSError: cannot write"))
    assert all(failed[verb] >= 3 for verb, *_ in jobs), failed
    for name in ("merged", "imported", "saved"):
        checkpoint.load(tmp_path / name)
