"""The run-time switch: which rounds it reaches, that it is off unless asked for, that output never depends on it."""

from __future__ import annotations

import json
import types
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Runner, assert_steered
from pairs import make_pair, random_prompt
from test_serve import ENV, OPTIONS, PAIR, serve

from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.serving.scale import Switch

RUNNERS = pytest.mark.parametrize("runner", ["v1", "v2"])
K, NEW, AFTER = 4, 24, 6
PROMPTS = [random_prompt(n, seed=n) for n in (5, 12, 9)]
EXTENSION = "vllm_steer.serving.scale.Switch"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("switch"), "llama")


def run(runner: Runner, target: Path, drafter: Path, *scales: float, **keys: Any) -> list[dict[str, Any]]:
    """One engine; PROMPTS once for every scale, which is set after AFTER steps of it."""
    calls = [{"prompts": PROMPTS, "sampling": {"max_tokens": NEW}} for _ in range(max(1, len(scales)))]
    for call, scale in zip(calls, scales, strict=False):
        call["steer"] = {"after": AFTER, "scale": scale}
    spec = {"model": str(drafter), "num_speculative_tokens": K}
    out = runner.run(target, spec, calls, **keys)
    assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
    return out["calls"]


@RUNNERS
def test_off_and_on_again_in_the_middle_of_requests(pair: Any, runner: str, runners: Any) -> None:
    target, plain, steered = pair
    off, on = run(runners(runner), target, steered, 0, 1, worker_extension_cls=EXTENSION)
    (stock,), (always,) = run(runners(runner), target, plain), run(runners(runner), target, steered)
    assert off["switched"] == [{"rank": 0, "scale": 0.0, "adapter": "initial"}] and on["switched"] == [
        {"rank": 0, "scale": 1.0, "adapter": "initial"}
    ]
    assert off["tokens"] == on["tokens"] == stock["tokens"]
    assert_steered(off | {"rounds": off["rounds"][:AFTER]}, {K})
    assert len(off["rounds"]) > AFTER and not any(sum(r["rows"]) for r in off["rounds"][AFTER:])
    assert not any(sum(r["rows"]) for r in on["rounds"][:AFTER])
    assert_steered(on | {"rounds": on["rounds"][AFTER:]}, {K})
    # Up to the switch every block is the one of an engine that never switched: always steered, never steered.
    for switched, kept in ((off, always), (on, stock)):
        same = [one[: AFTER - 1] == other[: AFTER - 1] for one, other in
                zip(switched["blocks"], kept["blocks"], strict=True)]  # fmt: skip
        assert all(same)
        assert switched["blocks"] != kept["blocks"]
    assert stock["blocks"] != always["blocks"]


def another(pair: Any, root: Path) -> Path:
    """An adapter for the pair with other weights, as root/mine, and a damaged copy of it, root/bad."""
    steering = Steering(checkpoint.load(pair.steered).config)
    torch.manual_seed(11)
    torch.nn.init.normal_(steering.output.weight, std=0.05)
    for name in ("mine", "bad"):
        checkpoint.save(root / name, steering)
    weights = root / "bad/steering/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return root / "mine"


@RUNNERS
def test_another_adapter_in_the_middle_of_requests(pair: Any, runner: str, runners: Any, tmp_path: Path) -> None:
    target, plain, steered = pair
    checkpoint.merge_adapter(another(pair, tmp_path), plain, tmp_path / "whole")
    spec = {"model": str(steered), "num_speculative_tokens": K}
    switches = [{"adapter": "bad"}, {"adapter": "mine"}, {}, {"adapter": "initial", "scale": 0.5}, {"scale": 1}]
    calls = [
        {"prompts": PROMPTS, "sampling": {"max_tokens": NEW}, "steer": {"after": AFTER} | switch} for switch in switches
    ]
    keys = {"worker_extension_cls": EXTENSION, "additional_config": {"vllm_steer": {"adapters": str(tmp_path)}}}
    out = runners(runner).run(target, spec, calls, **keys)
    assert out["error"] is None, f"{out['error']}\n{out['log'][-4000:]}"
    bad, mine, then, initial, last = out["calls"]
    (stock,), (always,), (new,) = (run(runners(runner), target, each) for each in (plain, steered, tmp_path / "whole"))
    assert {json.dumps(call["tokens"]) for call in (stock, always, new, *out["calls"])} == {json.dumps(stock["tokens"])}
    assert "model.safetensors" in bad["switched"][0]["error"] and bad["blocks"] == always["blocks"]
    assert mine["switched"] == [{"rank": 0, "scale": 1.0, "adapter": "mine"}]
    assert then["blocks"] == new["blocks"] != always["blocks"] != mine["blocks"]
    for one, other in ((mine, always), (initial, new)):
        assert all(a[: AFTER - 1] == b[: AFTER - 1] for a, b in zip(one["blocks"], other["blocks"], strict=True))
    assert initial["switched"] == [{"rank": 0, "scale": 0.5, "adapter": "initial"}]
    assert last["switched"] == [{"rank": 0, "scale": 1.0, "adapter": "initial"}]


def test_what_it_answers() -> None:
    worker = Switch()
    worker.rank, worker.model_runner = 1, types.SimpleNamespace(drafter=types.SimpleNamespace(injection=None))
    assert worker.steer(1) == {"rank": 1, "error": "this engine is not steered"}
    worker.model_runner.drafter.injection = types.SimpleNamespace(scale=0.5, adapter="initial")
    assert worker.steer() == worker.steer(0.5) == {"rank": 1, "scale": 0.5, "adapter": "initial"}
    assert worker.steer(scale=-2) == {"rank": 1, "scale": -2.0, "adapter": "initial"}
    for bad in ("off", True, float("nan"), 101):
        assert "allowed is a number from -100 to 100" in worker.steer(bad)["error"], bad
    assert worker.steer() == {"rank": 1, "scale": -2.0, "adapter": "initial"}


@pytest.mark.slow
@pytest.mark.parametrize("development", [True, False])
def test_over_http(development: bool, tmp_path: Path) -> None:
    spec = {"model": str(PAIR / "steered"), "num_speculative_tokens": K}
    env = ENV | ({"VLLM_SERVER_DEV_MODE": "1"} if development else {})
    options = (*OPTIONS, "--enforce-eager", "--worker-extension-cls", EXTENSION)
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, env=env, timeout=240) as server:
        if development:
            assert server.steer(0) == [{"rank": 0, "scale": 0.0, "adapter": "initial"}]
            assert server.steer() == [{"rank": 0, "scale": 0.0, "adapter": "initial"}]
            assert "allowed is a number" in server.steer("off")[0]["error"]
        else:
            with pytest.raises(urllib.error.HTTPError, match="404"):
                server.steer(0)
