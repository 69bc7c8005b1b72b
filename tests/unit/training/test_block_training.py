"""`train --kind`, `ngram`, and the verbs around block drafters, on a target of random weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import DFLASH, TARGET, TREEFLASH, make_block
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_steer import cli
from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import Row, collate
from vllm_steer.decoding.block import Refinement, generate
from vllm_steer.drafters.block import checkpoint, ngram
from vllm_steer.training import record, trainer
from vllm_steer.training.block_pair import BlockPair
from vllm_steer.training.config import TrainConfig
from vllm_steer.training.losses import forward_kl
from vllm_steer.training.pair import read_target

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows that repeat what little they say, so that training shows at once."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt_ids": [i % 40 + 1, 5, 6], "response_ids": [7, 8, 9, 10, 11, 12] * 4} for i in range(48)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(data: Path, output: Path, **changes: Any) -> TrainConfig:
    given: dict[str, Any] = dict(
        target=str(TARGET), data=(str(data),), output=str(output), kind="dflash", steps=6, batch_size=4, save_every=3,
        anchors=4, target_layers=LAYERS, lr=1e-3, loss="kl",
    )  # fmt: skip
    return TrainConfig(**given | changes)


@pytest.mark.parametrize("kind", ["dflash", "treeflash", "medusa"])
def test_each_kind_trains_and_loads(kind: str, data: Path, tmp_path: Path) -> None:
    own = {} if kind == "medusa" else {"cache": str(tmp_path / "cache")}
    found = trainer.train(options(data, tmp_path / "out", kind=kind, steps=12, **own))
    assert found is not None
    before, after = (found[name]["acceptance_length"]["sampled"] for name in ("untrained", "trained"))
    assert after > before
    drafter = checkpoint.load_for(tmp_path / "out", TARGET)
    assert drafter.config.kind == kind and drafter.config.draft_length == 5
    made = checkpoint.read_record(tmp_path / "out")
    assert made is not None and f"--kind {kind}" in made.provenance["command"]
    assert made.acceptance == json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert (tmp_path / "out" / "training.png").is_file()


def test_a_resumed_run_is_the_whole_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = options(data, tmp_path / "whole", kind="treeflash", keep="last", drafter=str(DFLASH))
    trainer.train(whole)
    stopped = options(data, tmp_path / "stopped", kind="treeflash", keep="last", drafter=str(DFLASH))
    calls = []
    honest = BlockPair.draw

    def stopping(self: BlockPair, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:  # two of them were for the forecast
            raise KeyboardInterrupt
        return honest(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPair, "draw", stopping)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(stopped)
    trainer.train(options(data, tmp_path / "stopped", kind="treeflash", keep="last", drafter=str(DFLASH), resume=True))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(kind="treeflash"), "--kind was dflash"),
        (dict(layers=2), "--layers was 1"),
        (dict(anchors=5), "--anchors was 4"),
        (dict(kind="treeflash", freeze_base=True, drafter=str(DFLASH)), "--drafter was None"),
    ],
)
def test_a_run_is_resumed_with_the_same_options_only(
    changes: dict[str, Any], words: str, data: Path, tmp_path: Path
) -> None:
    record.store(options(data, tmp_path / "out"), tmp_path / "checkpoints")
    record.require_same(options(data, tmp_path / "out"), tmp_path / "checkpoints" / "checkpoint-3")
    with pytest.raises(SteeringError) as error:
        record.require_same(options(data, tmp_path / "out", **changes), tmp_path / "checkpoints" / "checkpoint-3")
    assert words in str(error.value)


def test_a_frozen_base_stays(data: Path, tmp_path: Path) -> None:
    trainer.train(options(data, tmp_path / "out", kind="treeflash", drafter=str(DFLASH), freeze_base=True))
    base, found = load_file(DFLASH / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(found[f"model.{name}"], tensor), name
    assert found["ar_approximation.d.weight"].any()


def test_prediction_is_the_exact_walk(tmp_path: Path) -> None:
    """On the target's own greedy text, predicted greedy acceptance is the reference loop's, block for block."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    prompt = list(range(30, 70))
    apart = checkpoint.load(make_block(tmp_path / "medusa", TARGET, "medusa", original_lm_head=False))
    for step, head in enumerate(apart.lm_heads):
        head.weight.copy_(target.get_output_embeddings().weight.detach().roll(step, 0))  # a read-out per head
    for drafter, refinement in (
        (checkpoint.load(TREEFLASH), None), (checkpoint.load(DFLASH), ngram.load(DFLASH)), (apart, ngram.load(DFLASH))
    ):  # fmt: skip
        own = None if refinement is None else Refinement(refinement, 0.4)
        found = generate(target, drafter, prompt, refinement=own, max_new_tokens=61)
        pair = BlockPair(drafter, target, forward_kl, 5, 1)
        if refinement is not None:
            pair.refine(refinement, 0.4)
        batch = collate([Row((*prompt, *found.tokens), len(prompt))])
        predicted = pair.measure([batch | read_target(target, batch, drafter.config.states)], 5)
        whole = [block for block in found.blocks if block.position + 5 <= len(prompt) + len(found.tokens)]
        assert predicted["acceptance_length"]["greedy"] == pytest.approx(
            sum(block.accepted + 1 for block in whole) / len(whole), abs=6e-4
        )


def test_the_loss_weighs_every_block_once(data: Path) -> None:
    """A row of a batch counts as much as it does alone, whatever padding the others bring."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    pair = BlockPair(checkpoint.load(TREEFLASH), target, forward_kl, 5, 2)
    rows = [Row(tuple(range(10, 40)), 10), Row(tuple(range(50, 70)), 4), Row((1, 2, 3), 1)]
    anchors = torch.tensor([[12, 20], [4, 9], [-1, -1]])
    complete = lambda batch: batch | read_target(target, batch, pair.drafter.config.states)  # noqa: E731
    together = pair(anchors, **complete(collate(rows)))
    alone = sum(pair(anchors[i : i + 1], **complete(collate([rows[i]]))) for i in range(2))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert pair.positions(collate(rows)) == 2 * 2 * 5  # the third row has no room for a block


@pytest.mark.parametrize("row", [Row((1, 2, 3), 1), Row((1, 2, 3, 4, 5, 6, 7, 8), 6)])
def test_a_step_of_rows_without_room_changes_nothing(row: Row) -> None:
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    pair = BlockPair(checkpoint.load(DFLASH).requires_grad_(True), target, forward_kl, 5, 2)
    batch = collate([row])
    batch |= read_target(target, batch, pair.drafter.config.states)
    loss = pair(pair.draw(options(Path("x"), Path("x")), batch, random.Random(0)), **batch)
    loss.backward()
    assert pair.positions(batch) == loss.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in pair.drafter.parameters())


def test_training_goes_on_where_a_batch_has_short_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt_ids": [i + 1, 5, 6], "response_ids": [7, 8, 9, 10] * (8 if i % 4 == 0 else 1)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = trainer.train(options(path, tmp_path / "out", batch_size=1, steps=8))
    assert found is not None and found["trained"]["positions"] > 0


def test_a_control_reads_its_own_layers(data: Path, tmp_path: Path) -> None:
    """The same numbers beside a drafter that reads no layer, other layers from a cache, and the same ones."""
    found = []
    for i, own in enumerate([dict(kind="medusa"), dict(target_layers=(1, 2)), dict(target_layers=LAYERS)]):
        own["cache"] = str(tmp_path / f"cache{i}")
        made = trainer.train(options(data, tmp_path / f"out{i}", steps=1, control=str(DFLASH), **own))
        assert made is not None
        found.append(made["control"])
    for other in found[1:]:
        assert other["acceptance_length"] == pytest.approx(found[0]["acceptance_length"], abs=0.01)
    assert found[0]["acceptance_length"]["sampled"] > 1.05


def test_a_control_of_another_split_is_named(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer.train(options(data, tmp_path / "out", steps=1, control=str(TREEFLASH)))
    assert "its training may have seen rows that both are measured on" in caplog.text


def test_shorter_blocks_are_written_as_they_were_trained(data: Path, tmp_path: Path) -> None:
    for kind in ("dflash", "treeflash"):
        config = options(data, tmp_path / kind, kind=kind, drafter=str(DFLASH), k=3, steps=1)
        trainer.train(config)
        assert checkpoint.load(tmp_path / kind).config.draft_length == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(kind="other"), "--kind is 'other'"),
        (dict(mode="steer"), "--mode is steer, which --kind dflash does not have"),
        (dict(rank=4), "--rank is 4"),
        (dict(freeze_base=True), "--freeze-base is for --kind treeflash"),
        (dict(kind="steered"), "--drafter is missing"),
        (dict(kind="steered", drafter="x", anchors=3, target_layers=None), "--anchors is 3, which --kind steered"),
        (dict(layers=0), "--layers is 0"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], words: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SteeringError) as error:
        options(data, tmp_path / "out", **{"anchors": 24} | changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(target_layers=(0, 1)), "allowed for DFlash are inputs 1 to 3"),
        (dict(target_layers=(1, 4)), "allowed for DFlash are inputs 1 to 3"),
        (dict(drafter=str(TREEFLASH)), "is a treeflash drafter, --kind is dflash"),
        (dict(drafter=str(DFLASH), k=6), "--k is 6, --drafter"),
        (dict(drafter=str(DFLASH), layers=2), "--layers is 2, --drafter"),
        (dict(drafter=str(DFLASH), target_layers=(1, 2)), "give --target-layers 1 2 3"),
        (dict(drafter=str(TARGET)), "allowed for a block drafter is one of"),
    ],
)
def test_models_that_do_not_go_together(changes: dict[str, Any], words: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SteeringError) as error:
        trainer.train(options(data, tmp_path / "out", **changes))
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


# --- the verbs --------------------------------------------------------------------------------------------------------


def test_ngram_counts_tunes_and_writes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    drafter = Path(shutil.copytree(DFLASH, tmp_path / "d"))
    shutil.rmtree(drafter / "ngram")
    words = ["ngram", "--target", str(TARGET), "--drafter", str(drafter), "--data", str(data), "--successors", "4"]
    assert cli.main([*words, "--dspark", str(tmp_path / "dspark")]) == 0
    found = ngram.load(drafter)
    tuned = found.config.provenance["tuned"]
    assert found.config.alpha == max(tuned, key=lambda row: row["greedy"])["alpha"] > 0  # the text repeats itself
    assert found.dense()[7].argmax() == 8
    assert "chosen:" in capsys.readouterr().out
    assert json.loads((tmp_path / "dspark" / "config.json").read_text())["architectures"] == ["Qwen3DSparkModel"]
    assert cli.main(words) == 1 and "is there already" in capsys.readouterr().err
    assert (
        cli.main([*words[:3], "--drafter", str(TREEFLASH), "--data", str(data), "--output", str(tmp_path / "x")]) == 1
    )
    assert "knows the token before" in capsys.readouterr().err


def test_ngram_reads_its_data_as_training_did(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = tmp_path / "log.jsonl"
    answer = {"model": "served", "choices": [{"index": 0, "text": "def f():\n    return 1\n" * 3}]}
    asked = [{"model": "served", "prompt": f"import a{i}\n"} for i in range(24)]
    log.write_text("".join(json.dumps({"request": each, "response": answer}) + "\n" for each in asked))
    words = ["ngram", "--target", str(TARGET), "--drafter", str(DFLASH), "--data", str(log), "--output", str(tmp_path)]
    assert cli.main(words) == 1 and "answers of other models" in capsys.readouterr().err
    assert cli.main([*words, "--chat-template-kwargs", "{"]) == 1
    assert "--chat-template-kwargs is not valid JSON" in capsys.readouterr().err
    assert cli.main([*words, "--log-model", "served"]) == 0
    assert "--log-model served" in ngram.load(tmp_path).config.provenance["command"]


def test_check_serve_and_push(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", str(DFLASH), "--target", str(TARGET)]) == 0
    said = capsys.readouterr().out
    assert "984,192 parameters" in said and "bigram     alpha 0.4" in said and "fits" in said
    assert cli.main(["serve", str(DFLASH), "--target", str(TARGET), "--spec-tokens", "3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert '"method": "dflash"' in said and '"num_speculative_tokens": 3' in said
    assert cli.main(["serve", str(DFLASH), "--target", str(TARGET), "--tree", "2,1", "--dry-run"]) == 1
    assert "--tree is 2,1" in capsys.readouterr().err
    where = Path(shutil.copytree(TREEFLASH, tmp_path / "t"))
    assert cli.main(["push", "--directory", str(where), "--repo", "me/it", "--dry-run"]) == 0
    card = (where / "README.md").read_text()
    assert "# A treeflash drafter for the target target" in card and "1.817" in card


def test_check_refuses_damage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    where = Path(shutil.copytree(TREEFLASH, tmp_path / "t"))
    data = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(data[:-4])
    assert cli.main(["check", str(where)]) == 1
    assert "is damaged" in capsys.readouterr().err
