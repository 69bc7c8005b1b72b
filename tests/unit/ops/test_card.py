"""Sharing: the card says what is on record and nothing else; the upload is huggingface_hub's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from repository import ROOT
from samples import bench_of

from vllm_steer import cli
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import fingerprint
from vllm_steer.ops import hub

PAIR = ROOT / "examples" / "tiny_pair"


@pytest.fixture
def steered(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PAIR / "steered", tmp_path / "steered"))


def test_a_card_says_what_is_on_record(steered: Path) -> None:
    text = hub.card(steered, "me/steered")
    config = json.loads((steered / "steering/config.json").read_text())
    spec = '{"model": "me/steered", "num_speculative_tokens": 5, "draft_sample_method": "probabilistic"}'
    assert f"vllm serve target --speculative-config '{spec}'" in text and "vllm-steer installed" in text
    assert str(config["acceptance"]["trained"]["block_efficiency"]["sampled"]) in text  # as 0.1.0 wrote it
    assert "Not measured in vLLM" in text and "not a measurement of serving" in text
    assert config["provenance"]["command"] in json.loads(text.split("```json\n")[1].split("```")[0])["command"]


@pytest.mark.parametrize("name", ["apache-2.0", "no", "other: see LICENSE", "[x"])
def test_an_adapter_names_its_drafter(name: str) -> None:
    text = hub.card(PAIR / "adapter", "me/adapter", license_name=name)
    assert '"model": "drafter"' in text and '{"vllm_steer": {"adapter": "me/adapter"}}' in text
    metadata = huggingface_hub.ModelCard(text).data
    assert metadata.license == name and metadata.library_name == "vllm" and "vllm-steer" in metadata.tags


def test_only_what_was_measured_of_this_checkpoint_is_claimed(steered: Path, tmp_path: Path) -> None:
    text = hub.card(steered, "me/steered", (str(bench_of(steered, tmp_path / "own")),))
    assert "2.500 [2.250, 2.750]" in text and "Not measured in vLLM" not in text
    other = bench_of(PAIR / "adapter", tmp_path / "other")
    with pytest.raises(SteeringError, match="measured other steering weights"):
        hub.card(steered, "me/steered", (str(other),))
    with pytest.raises(SteeringError, match="is not a benchmark's result"):
        hub.card(steered, "me/steered", (str(tmp_path / "nothing"),))


@pytest.mark.parametrize("name", ["dflash", "treeflash"])
def test_only_what_was_measured_of_this_block_drafter_is_claimed(name: str, tmp_path: Path) -> None:
    where = PAIR / name
    bigram = fingerprint(where / "ngram") if name == "dflash" else None
    own = {"drafter_weights": fingerprint(where), "ngram_weights": bigram, "blind": False}
    assert "Not measured in vLLM" in hub.card(where, "me/it")
    text = hub.card(where, "me/it", (str(bench_of(where, tmp_path / "own", **own)),))
    assert "2.500 [2.250, 2.750]" in text and "Not measured in vLLM" not in text
    for changed, complaint in (
        ({"blind": True}, "without its approximator or bigram only"),
        ({"drafter_weights": fingerprint(PAIR / "drafter")}, "measured other weights"),
        ({"ngram_weights": "another"}, "measured other weights"),
    ):
        other = bench_of(where, tmp_path / complaint.replace(" ", "") / next(iter(changed)), **own | changed)
        with pytest.raises(SteeringError, match=complaint):
            hub.card(where, "me/it", (str(other),))
    with pytest.raises(SteeringError, match="is not a benchmark's result"):
        hub.card(where, "me/it", (str(tmp_path / "nothing"),))


def test_a_checkpoint_without_figures_claims_none(steered: Path) -> None:
    path = steered / "steering/config.json"
    config = json.loads(path.read_text()) | {"acceptance": {}, "provenance": {}}
    path.write_text(json.dumps(config))
    text = hub.card(steered, "me/steered")
    assert "Predicted" not in text and "Not measured" in text and "Not on record." in text


def test_push_uploads_the_directory_with_its_card(steered: Path, monkeypatch: Any, capsys: Any) -> None:
    """The hub's own client, with its two calls caught: no network here."""
    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *a, **k: calls.append((a, k)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **k: calls.append(k) or "the commit")
    assert cli.main(["push", "--directory", str(steered), "--repo", "me/steered", "--private"]) == 0
    assert calls[0] == (("me/steered",), {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == steered and hub.OURS in (steered / "README.md").read_text()
    assert "the commit" in capsys.readouterr().out


def test_a_dry_run_only_writes_the_card_and_an_authors_own_card_stays(steered: Path, capsys: Any) -> None:
    command = ["push", "--directory", str(steered), "--repo", "me/steered", "--dry-run"]
    assert cli.main(command) == 0 and "nothing was uploaded" in capsys.readouterr().out
    (steered / "README.md").write_text("mine")
    assert cli.main(command) == 0 and (steered / "README.md").read_text() == "mine"


def test_a_hub_that_cannot_be_reached(steered: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("no way")))
    assert cli.main(["push", "--directory", str(steered), "--repo", "me/steered"]) == 1
    assert "me/steered was not uploaded (OSError: no way)" in capsys.readouterr().err


def test_push_wants_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["push", "--directory", str(tmp_path), "--repo", "me/x", "--dry-run"]) == 1
    assert "has no steering/ folder" in capsys.readouterr().err and not (tmp_path / "README.md").exists()


def test_push_does_not_publish_what_a_link_leads_to(steered: Path, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[Any] = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda self, *a, **k: calls.append(k))
    copy = shutil.copytree(steered, tmp_path / "copy")
    (tmp_path / "key").write_text("secret")
    (copy / "notes").symlink_to(tmp_path / "key")
    with pytest.raises(SteeringError, match="notes is a link out of"):
        hub.push(hub.PushConfig(str(copy), "me/steered"))
    assert not calls


def test_a_card_has_no_secrets_and_no_paths_of_a_machine(steered: Path, tmp_path: Path) -> None:
    """Whatever a checkpoint or a benchmark of before recorded."""
    path = steered / "steering/config.json"
    config = json.loads(path.read_text())
    config["provenance"] |= {"command": "vllm-steer train --hf-token hf_SECRET --data /home/me/private/rows.jsonl"}
    path.write_text(json.dumps(config))
    results = bench_of(steered, tmp_path / "bench") / "results.json"
    found = json.loads(results.read_text())
    found["command"] = 'vllm-steer bench --engine \'{"hf_token": "hf_SECRET"}\' --prompts /home/me/private/p.jsonl'
    found["settings"]["prompts"] = "/home/me/private/p.jsonl"
    results.write_text(json.dumps(found))
    text = hub.card(steered, "me/steered", (str(results.parent),))
    assert "rows.jsonl" in text and "p.jsonl" in text and "***" in text
    assert "hf_SECRET" not in text and "/home/me" not in text
