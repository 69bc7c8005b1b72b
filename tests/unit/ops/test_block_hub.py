"""A block drafter by its hub id: what is fetched of it, and what is said when nothing can be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError
from repository import ROOT

from vllm_steer import cli
from vllm_steer.common.errors import SteeringError
from vllm_steer.ops import block, launch

PAIR = ROOT / "examples" / "tiny_pair"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A hub with owner/dflash, owner/plain and owner/empty; what was asked of it."""
    asked: list[Any] = []
    (tmp_path / "nothing").mkdir()

    def snapshot(source: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        asked.append((source, allow_patterns))
        return str(PAIR / "dflash" if allow_patterns != ["steering/*"] else tmp_path / "nothing")

    def one_file(source: str, name: str) -> str:
        asked.append((source, name))
        if source == "owner/lost":
            raise OSError("offline")
        if source == "owner/empty":
            raise RemoteEntryNotFoundError("no such file", response=SimpleNamespace(headers={}, request=None))
        return str(PAIR / source.partition("/")[2].replace("plain", "drafter") / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    return asked


def test_a_block_drafter_is_served_by_its_hub_id(hub: list[Any], capsys: pytest.CaptureFixture) -> None:
    words = launch.command("owner/dflash", [], str(PAIR / "target"))
    spec = json.loads(words[words.index("--speculative-config") + 1])
    assert (spec["model"], spec["method"]) == (str(PAIR / "dflash"), "dflash")
    assert hub == [("owner/dflash", ["steering/*"]), ("owner/dflash", "config.json"), ("owner/dflash", [*block.FILES])]
    assert cli.main(["check", "owner/dflash", "--target", str(PAIR / "target")]) == 0
    assert "dflash drafter" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["owner/plain", "owner/empty"])
def test_what_is_no_checkpoint_of_ours_is_not_fetched(name: str, hub: list[Any], tmp_path: Path) -> None:
    assert block.resolve(name) == tmp_path / "nothing"
    with pytest.raises(SteeringError, match="steering"):
        launch.command(name, [], str(PAIR / "target"))


def test_a_hub_that_does_not_answer(hub: list[Any]) -> None:
    with pytest.raises(SteeringError, match=r"owner/lost: its files could not be fetched .*offline.*check the name"):
        block.resolve("owner/lost")
