"""cli.py: what a person at the shell sees."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pairs import make_pair
from repository import ROOT

from vllm_steer import __version__, cli
from vllm_steer.drafters.steered import checkpoint

GOLDEN = ROOT / "tests/golden/tiny_qwen3"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "qwen2", rank=4)


def test_help_and_version_do_without_torch() -> None:
    for argument, shown in (
        ("--help", "vllm-steer check ./drafter-steered"),
        ("--version", f"vllm-steer {__version__}"),
    ):
        code = (
            "import sys\nfrom vllm_steer.cli import main\n"
            f"try:\n main(['{argument}'])\n"
            "except SystemExit as end:\n assert not end.code\n"
            "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        assert shown in out.stdout


VERBS = [*cli.OPTION_VERBS, "check", "merge", "import"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    shown = capsys.readouterr().out
    assert not end.value.code and f"example:\n  vllm-steer {verb} " in shown


@pytest.mark.parametrize("verb", cli.OPTION_VERBS)
def test_the_examples_are_understood(verb: str) -> None:
    argv = [verb, *shlex.split(cli.OPTION_VERBS[verb][2])]
    _, rest = cli._parser(argv).parse_known_args(argv)
    assert not rest or verb in cli.PASSES_ON


def test_usage_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["frobnicate"], ["check"], ["merge", "a"]):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 2 and "vllm-steer" in capsys.readouterr().err


def test_check_says_what_it_is(pair: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    target, _drafter, steered = pair
    assert cli.main(["check", str(steered), "--target", str(target)]) == 0
    shown = capsys.readouterr().out
    for words in ("steered checkpoint, format 1", "hidden size 128", "layers 2, 3, 4", "rank 4", f"fits {target}",
                  f"fits {steered}"):  # fmt: skip
        assert words in shown
    assert cli.main(["check", str(steered)]) == 0
    assert "not checked: give --target" in capsys.readouterr().out


def test_check_of_an_adapter(pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path, checkpoint.load(pair.steered))
    assert cli.main(["check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("adapter") and "not checked: give --drafter" in shown
    assert cli.main(["check", str(tmp_path), "--drafter", str(pair.drafter)]) == 0
    assert cli.main(["check", str(tmp_path), "--drafter", str(pair.target)]) == 1


def test_mistakes_are_one_sentence(
    pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, words in (
        (["check", str(tmp_path)], "has no steering/ folder"),
        (["check", str(pair.steered), "--target", str(pair.drafter)], "this target has hidden_size=64"),
        (["check", str(pair.steered), "--target", str(tmp_path)], "cannot read the model config"),
        (
            ["merge", str(pair.steered), "--drafter", str(pair.target), "--output", str(tmp_path / "x")],
            "it was trained with",
        ),
    ):
        assert cli.main(argv) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and words in shown.err
        assert shown.err.startswith("vllm-steer: error: ") and shown.err.count("\n") == 1


def test_mistakes_end_the_process_with_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vllm_steer.cli", "check", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (1, "")
    assert "no steering/ folder" in out.stderr and "Traceback" not in out.stderr


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_directory: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupt)
    assert cli.main(["check", str(GOLDEN)]) == 130
    assert capsys.readouterr().err == "vllm-steer: interrupted\n"


def test_merge(pair: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["merge", str(pair.steered), "--drafter", str(pair.drafter), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    checkpoint.load(tmp_path / "out")
    assert cli.main(argv) == 1
    assert "not an empty directory" in capsys.readouterr().err


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    argv = ["import", str(GOLDEN), "--drafter", str(GOLDEN / "base_drafter"), "--target", str(GOLDEN / "verifier")]
    assert cli.main([*argv, "--output", str(output)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert cli.main(["check", str(output), "--target", str(GOLDEN / "verifier")]) == 0
    assert json.loads((output / "steering/config.json").read_text())["draft_length"] == 4


def test_train_is_handed_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_steer.training import trainer

    seen = {}
    monkeypatch.setattr(trainer, "run", lambda args: seen.update(vars(args)))
    assert cli.main(["train", "--target", "T", "--drafter", "D", "--data", "x.jsonl", "--output", "out"]) == 0
    assert (seen["target"], seen["output"]) == ("T", "out")


def test_what_the_package_logs_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def check(args: object) -> None:
        logging.getLogger("vllm_steer.training.batches").info("only the target's states are cached")

    monkeypatch.setattr(cli, "_check", check)
    for _ in range(2):  # and once per line, however often the function is called
        assert cli.main(["check", "x"]) == 0
        assert capsys.readouterr().err == "INFO: only the target's states are cached\n"
    assert not logging.getLogger("vllm_steer").handlers


def test_nobody_reads_on() -> None:
    """`vllm-steer check X | head -1`: no traceback, and the status that the shell knows of such an end."""
    pair = ROOT / "examples/tiny_pair"
    for words in (["check", str(pair / "steered")], ["doctor", "--help"]):
        command = [sys.executable, "-m", "vllm_steer.cli", *words]
        env = os.environ | {"PYTHONUNBUFFERED": ""}  # as in a shell: what is printed is written at the end
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        process.stdout.close()
        assert "Traceback" not in (said := process.stderr.read()) and "BrokenPipe" not in said, said
        assert process.wait() == cli.BROKEN_PIPE
