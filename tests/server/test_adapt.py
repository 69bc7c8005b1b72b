"""The loop from log to swap behind a real server (examples/adapt.py), on both runners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapt import NAME, Sizes, adapt
from engines import server_env
from test_serve import ENV

SMALL = {
    "v1": Sizes(logged=48, measured=8, tokens=32, steps=40),
    "v2": Sizes(logged=24, measured=4, tokens=24, steps=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_log_train_swap(runner: str, tmp_path: Path) -> None:
    env = ENV | server_env(runner, tmp_path)
    found = adapt(tmp_path, SMALL[runner], env, "--dtype", "float32", "--enforce-eager")
    assert found["same_text"]
    for traffic in ("C", "Python"):
        assert 1 < found[traffic]["initial"] < 6 and 1 < found[traffic][NAME] < 6
    assert found["C"]["initial"] != found["C"][NAME], "nothing was swapped"
    exchanges = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(exchanges) == SMALL[runner].logged and exchanges[0].keys() == {"request", "response"}
    log = (tmp_path / "server.log").read_text()
    assert f"the steering changes from initial to {NAME}" in log and f"from {NAME} to initial" in log
