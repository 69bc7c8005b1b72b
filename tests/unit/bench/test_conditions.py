"""What a benchmark's numbers depend on: recorded, shown, compared on resume, and refused by push where it misleads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from engines import ENV, runner_env
from repository import ROOT
from samples import bench_of
from test_evaluate import ENGINE, METRICS, bench_config, heldout

from vllm_steer.bench import conditions, remote, report
from vllm_steer.bench import run as evaluate
from vllm_steer.bench.candidate import Contender
from vllm_steer.common.errors import SteeringError
from vllm_steer.data.prompts import Prompt
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.ops import hub
from vllm_steer.serving.kill_switch import KILL_SWITCH

PAIR = ROOT / "examples/tiny_pair"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if conditions._matters(name) or name == KILL_SWITCH:
            monkeypatch.delenv(name)


@pytest.fixture
def steered(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PAIR / "steered", tmp_path / "steered"))


def measured(contender: Contender, settings: dict[str, Any], prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """What a contender's process returns, without an engine."""
    answers = [{"id": p["id"], "category": p["category"], "blocks": "2 3", "stopped_on_draft": False} for p in prompts]
    clock = {"prefill_seconds": 1.0, "prefill_tokens": 1, "decode_seconds": 1.0, "decode_tokens": 5}
    run = {"clock": clock, "drafting_share": 0.5, "answers": [a | {"tokens_sha256": "x"} for a in answers]}
    environment = {
        "vllm": "0.32.0",
        "torch": metadata.version("torch"),
        "runner": "V1",
        "dtype": "float32",
        "eager": True,
    }
    environment |= {"cpu": conditions.cpu_name(), "cores": len(os.sched_getaffinity(0))}
    on = contender.steering is not None and settings["conditions"]["steering"] == "on"
    scale = settings["engine"].get("additional_config", {}).get("vllm_steer", {}).get("scale", 1.0)
    return {
        "environment": environment,
        "steered": on,
        "scale": float(scale) if on else None,
        "sampling": {},
        "peak_memory": [{"resident": 2**30}],
        "runs": [run | {"temperature": t} for t in settings["temperature"]],
    }


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> evaluate.BenchConfig:
    monkeypatch.setattr(evaluate, "measure_in_a_process", measured)
    drafters = (f"plain={PAIR / 'drafter'}", f"steered={PAIR / 'steered'}")
    return bench_config(tmp_path, drafters=drafters, engine='{"hf_token": "S3CRET"}')


def again(config: evaluate.BenchConfig, **changes: Any) -> dict[str, Any]:
    return evaluate.benchmark(dataclasses.replace(config, resume=True, **changes))


def test_what_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_MY_TOKEN": "S3CRET", "VLLM_LOGGING_LEVEL": "INFO", "OTHER": "x",
        "VLLM_CACHE_ROOT": "/x/y", "VLLM_API_KEY": "S3CRET", "VLLM_KV_CACHE_LAYOUT": "HND", "VLLM_EMPTY": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    found = conditions.conditions()
    wanted = {"VLLM_KV_CACHE_LAYOUT": "HND", "VLLM_MY_TOKEN": "***", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    assert found["environment"] == wanted and found["steering"] == "on"
    assert found["versions"]["vllm-steer"] and found["versions"]["torch"] and found["processors"]["cores"] > 0
    monkeypatch.setenv(KILL_SWITCH, "1")
    assert conditions.conditions()["steering"] == "off"
    monkeypatch.setenv(KILL_SWITCH, "maybe")
    with pytest.raises(SteeringError, match=f"{KILL_SWITCH} is 'maybe'"):
        conditions.conditions()


def test_a_forgotten_kill_switch(config: evaluate.BenchConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """It is warned of and shown; a resume without it is refused, and so is a card."""
    monkeypatch.setenv(KILL_SWITCH, "1")
    table = report.table(evaluate.benchmark(config))
    assert f"{KILL_SWITCH} is set: steered will be measured unsteered" in caplog.text
    assert "**Steering was switched off (STEER_DISABLE).**" in table and "| steered | 2.500" in table
    assert [line.split("|")[6].strip() for line in table.splitlines() if line.startswith("| steered |")] == ["off"] * 2
    monkeypatch.delenv(KILL_SWITCH)
    with pytest.raises(SteeringError, match=r"was measured with steering 'off', now it is 'on': unset STEER_DISABLE"):
        again(config)
    with pytest.raises(
        SteeringError, match=r"measured this checkpoint unsteered \(STEER_DISABLE was set\) .*'steered'"
    ):
        hub.card(PAIR / "steered", "me/x", (config.output,))


def test_another_scale(config: evaluate.BenchConfig, caplog: Any) -> None:
    off = dataclasses.replace(config, engine='{"additional_config": {"vllm_steer": {"scale": 0}}}')
    table = report.table(evaluate.benchmark(off))
    assert "scale is 0: steered will be measured with it" in caplog.text and "off (scale 0)" in table
    with pytest.raises(SteeringError, match="was measured with engine"):
        again(config)
    with pytest.raises(SteeringError, match="measured this checkpoint at scale 0 under the name 'steered'"):
        hub.card(PAIR / "steered", "me/x", (config.output,))


def test_an_honest_benchmark_is_resumed_and_claimed(config: evaluate.BenchConfig, capsys: Any, caplog: Any) -> None:
    evaluate.benchmark(config)
    for name in ("results.json", "table.md"):
        text = (Path(config.output) / name).read_text()
        assert (
            "S3CRET" not in text and str(PAIR) not in text and "Sampling: neutral." in text
        ) or name == "results.json"
    again(config)
    assert capsys.readouterr().out.count("measured already") == 2
    assert "### Measured in vLLM" in hub.card(PAIR / "steered", "me/x", (config.output,))
    assert "does not say" not in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [("VLLM_USE_V2_MODEL_RUNNER", "1"), ("VLLM_ATTENTION_BACKEND", "X"), ("OMP_NUM_THREADS", "7")],
)
def test_another_environment_is_refused(config: evaluate.BenchConfig, monkeypatch: Any, name: str, value: str) -> None:
    evaluate.benchmark(config)
    with monkeypatch.context() as patch:
        patch.setenv(name, value)
        with pytest.raises(
            SteeringError, match=f"was measured with {name} not set, now it is '{value}': make it as it"
        ):
            again(config)
        shutil.rmtree(config.output)
        assert f"Set: `{name}={value}`." in report.table(evaluate.benchmark(config))
    with pytest.raises(SteeringError, match=f"was measured with {name} '{value}', now it is not set"):
        again(config)


@pytest.mark.parametrize(
    ("part", "name"),
    [("versions", "torch"), ("versions", "vllm-steer"), ("processors", "cpu"), ("processors", "cores")],
)
def test_another_release_or_machine_is_refused(
    config: evaluate.BenchConfig, monkeypatch: Any, part: str, name: str
) -> None:
    evaluate.benchmark(config)
    now = conditions.conditions()
    monkeypatch.setattr(conditions, "conditions", lambda: now | {part: now[part] | {name: "other"}})
    with pytest.raises(SteeringError, match=f"was measured with {name} .*, now it is 'other'"):
        again(config)


def test_another_sampling_is_refused(config: evaluate.BenchConfig) -> None:
    evaluate.benchmark(config)
    with pytest.raises(SteeringError, match="was measured with sampling 'neutral', now it is 'served'"):
        again(config, sampling="served")
    with pytest.raises(SteeringError, match="--sampling is 'own', allowed are neutral, served"):
        dataclasses.replace(config, sampling="own")


def as_before(config: evaluate.BenchConfig, **changes: Any) -> None:
    """Make a result what 0.1.0 wrote."""
    path = Path(config.output) / "results.json"
    results = json.loads(path.read_text())
    for key in ("conditions", "sampling"):
        del results["settings"][key]
    results["settings"] |= {"target": config.target, "engine": config.engine_options}
    for contender in results["contenders"]:
        contender["environment"] |= changes
        contender["identity"]["drafter"] = dict(d.split("=") for d in config.drafters)[contender["name"]]
        del contender["scale"], contender["sampling"]
    path.write_text(json.dumps(results))


def old_with(text: str, environment: dict[str, Any]) -> str:
    """Such a result of another environment."""
    results = json.loads(text)
    results["settings"].pop("conditions", None)
    for contender in results["contenders"]:
        contender["environment"] |= environment
    return json.dumps(results)


def test_results_from_before(config: evaluate.BenchConfig, capsys: Any, caplog: Any, monkeypatch: Any) -> None:
    evaluate.benchmark(config)
    as_before(config)
    assert "Measured in vLLM" in hub.card(PAIR / "steered", "me/x", (config.output,))
    assert "does not say under which environment variables it was measured" in caplog.text
    again(config)
    assert capsys.readouterr().out.count("measured already") == 2
    good = (Path(config.output) / "results.json").read_text()
    for key, value in {"cpu": "another", "vllm": "0.31.0", "torch": "2.12.0", "gpus": ["H100"]}.items():
        (Path(config.output) / "results.json").write_text(old_with(good, {key: value}))
        with pytest.raises(SteeringError, match=f"was measured with {key} .*{value[0]}"):
            again(config)
    (Path(config.output) / "results.json").write_text(old_with(good, {}))
    with (
        monkeypatch.context() as patch,
        pytest.raises(SteeringError, match="measured with runner 'V1', now it is 'V2'"),
    ):
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        again(config)
    monkeypatch.setenv(KILL_SWITCH, "1")
    with pytest.raises(SteeringError, match="was measured with steering 'on', now it is 'off'"):
        again(config)


def test_an_old_result_at_scale_0_is_not_claimed(steered: Path, tmp_path: Path) -> None:
    path = bench_of(steered, tmp_path / "own") / "results.json"
    results = json.loads(path.read_text())
    results["settings"]["engine"] = {"additional_config": {"vllm_steer": {"scale": 0}}}
    path.write_text(json.dumps(results))
    with pytest.raises(SteeringError, match="at scale 0"):
        hub.card(steered, "me/x", (str(path.parent),))


@pytest.mark.parametrize("options", [None, "text", {"vllm_steer": None}, {"vllm_steer": {"scale": None}}])
def test_strange_results_end_in_a_sentence(steered: Path, tmp_path: Path, options: Any) -> None:
    path = bench_of(steered, tmp_path / "own") / "results.json"
    results = json.loads(path.read_text())
    results["settings"]["engine"] = {"additional_config": options}
    path.write_text(json.dumps(results))
    assert "Measured in vLLM" in hub.card(steered, "me/x", (str(path.parent),))
    del results["contenders"][0]["steered"]
    path.write_text(json.dumps(results))
    with pytest.raises(SteeringError, match="measured this checkpoint unsteered"):
        hub.card(steered, "me/x", (str(path.parent),))


def test_a_steering_measured_with_another_drafter(config: evaluate.BenchConfig) -> None:
    other = dataclasses.replace(config, drafters=(f"steered={PAIR / 'adapter'}+{PAIR / 'drafter'}",))
    evaluate.benchmark(other)
    path = Path(config.output) / "results.json"
    results = json.loads(path.read_text())
    mine = Contender("s", str(PAIR / "steered")).identity()["steering_weights"]
    results["contenders"][0]["identity"]["steering_weights"] = mine
    path.write_text(json.dumps(results))
    with pytest.raises(SteeringError, match="with another drafter than the one in .*steered: the weights"):
        hub.card(PAIR / "steered", "me/x", (config.output,))


def test_a_hub_id_has_the_identity_of_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(PAIR / "steered"))
    hub_id, directory = (Contender("s", name).identity() for name in ("me/steered", str(PAIR / "steered")))
    for key in ("drafter_weights", "steering_weights"):
        assert hub_id[key] == directory[key] is not None
    assert Contender("s", "me/steered").steering == PAIR / "steered" / checkpoint.FOLDER


# --- a running server -----------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, str]]]:
    """Answers every request, keeps its body, and asks for the key in `wanted`, if any."""
    asked: list[dict[str, Any]] = []
    wanted: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def refused(self) -> bool:
            given = self.headers["Authorization"]
            if "key" in wanted and given != f"Bearer {wanted['key']}":
                self.answer(401, '{"error": "Unauthorized"}')
                return True
            return False

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.answer(200, METRICS)
            elif not self.refused():
                self.answer(200, '{"object": "list", "data": [{"id": "m", "object": "model"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.refused():
                asked.append(body | {"path": self.path})
                self.answer(200, '{"id": "x", "choices": [], "usage": {"completion_tokens": 3}}')

        def log_message(self, *_: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", asked, wanted
    http.shutdown()
    http.server_close()


def ask(url: str, **changes: Any) -> None:
    prompts = [Prompt("a", "text"), Prompt("b", [{"role": "user", "content": "chat"}])]
    remote.measure(url, None, prompts, max_tokens=3, temperatures=(1.0,), batch=1, seed=0, **changes)


def test_a_server_is_asked_for_neutral_sampling(server: Any) -> None:
    url, asked, _ = server
    ask(url, template={"x": 1})
    neutral = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0}
    neutral |= {"frequency_penalty": 0, "temperature": 1, "chat_template_kwargs": {"x": 1}}
    assert len(asked) == 2 and all(neutral.items() <= body.items() for body in asked)
    asked.clear()
    ask(url, sampling="served")
    assert len(asked) == 2 and not any(neutral.keys() - {"temperature"} & body.keys() for body in asked)


def test_a_server_that_wants_a_key(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked, wanted = server
    wanted["key"] = "right"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SteeringError, match=r"asks for a key \(HTTP 401\), and none is set: set OPENAI_API_KEY"):
        ask(url)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(SteeringError, match="and the one in OPENAI_API_KEY is not accepted"):
        ask(url)
    with pytest.raises(SteeringError, match="and the one in OPENAI_API_KEY is not accepted"):
        remote.measure(url, "m", [Prompt("a", "x")], max_tokens=3, temperatures=(0.0,), batch=1, seed=0)
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    ask(url)
    assert len(asked) == 2


# --- real engines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny target with a generation_config whose top_p leaves one token."""
    path = Path(shutil.copytree(PAIR / "target", tmp_path_factory.mktemp("peaked") / "target"))
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": True, "top_p": 0.01}))
    return path


def vllm_steer(*words: str) -> None:
    env = os.environ | ENV | runner_env("v1")
    done = subprocess.run([sys.executable, "-m", "vllm_steer.cli", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_bench_samples_neutrally_or_as_served(peaked: Path, tmp_path: Path) -> None:
    """At T=1 the model's own top_p makes every answer the greedy one; neutral sampling does not."""
    heldout(tmp_path / "p.jsonl", 3)
    common = ["bench", "--target", str(peaked), "--none", "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "12"]
    common += ["--max-model-len", "256"]
    for sampling, same in (("neutral", False), ("served", True)):
        out = tmp_path / sampling
        vllm_steer(*common, "--output", str(out), "--engine", json.dumps(ENGINE), "--sampling", sampling)
        runs = json.loads((out / "results.json").read_text())["contenders"][0]["runs"]
        greedy, sampled = ([answer["tokens_sha256"] for answer in run["answers"]] for run in runs)
        assert (greedy == sampled) is same
        assert f"Sampling: {sampling}." in (out / "table.md").read_text()


def test_generate_samples_neutrally_or_as_served(peaked: Path, tmp_path: Path) -> None:
    heldout(tmp_path / "p.jsonl", 3)
    engine = json.dumps({"dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.3})
    common = ["generate", "--model", str(peaked), "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "12"]
    common += ["--engine", engine, "--limit", "3", "--max-model-len", "512"]
    found = {}
    for name, more in {
        "greedy": ("--temperature", "0"), "served": ("--sampling", "served"), "neutral": (),
    }.items():  # fmt: skip
        vllm_steer(*common, "--output", str(tmp_path / f"{name}.jsonl"), *more)
        rows = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        found[name] = {row["id"]: row["response_ids"] for row in rows}
    assert found["served"] == found["greedy"] != found["neutral"]
    assert json.loads((tmp_path / "served.meta.json").read_text())["sampling"]["sampling"] == "served"
