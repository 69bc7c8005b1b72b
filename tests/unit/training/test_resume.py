"""`train --resume` goes on with what the run was started with, or names the option that differs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_train import folder, mixed_lengths, options  # noqa: F401  (a fixture)

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import only_writer
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.training import losses, record, trainer
from vllm_steer.training.config import TrainConfig

RUN = dict(steps=4, save_every=2, mode="steer")


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The output of a run that was stopped after its second step."""
    path = tmp_path_factory.mktemp("stopped") / "out"
    calls: list[int] = []
    jsd = losses.LOSSES["jsd"]

    def stopping(*logits: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:  # two of them were for the forecast
            raise KeyboardInterrupt
        return jsd(*logits)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(losses.LOSSES, "jsd", stopping)
        trainer.train(options(folder, path, **RUN))
    assert record.last_checkpoint(path) == path / "checkpoints/checkpoint-2"
    return path


def again(stopped: Path, folder: Path, tmp_path: Path, **changes: Any) -> TrainConfig:  # noqa: F811
    """The run to resume, in a directory of its own."""
    copy = tmp_path / "out"
    if not copy.exists():
        shutil.copytree(stopped, copy)
    return options(folder, copy, **(RUN | dict(resume=True) | changes))


CHANGES: list[tuple[dict[str, Any], str]] = [
    (dict(mode="joint"), r"--mode was steer when .*out was started, and is joint now: give the same to resume"),
    (dict(loss="tvd"), "--loss was jsd when .* and is tvd now"),
    (dict(offsets="block"), "--offsets was batch"),
    (dict(guide_dropout=0.1, mode="joint"), "--guide-dropout was 0.0"),
    (dict(log_model="served"), "--log-model was None"),
    (dict(positions=0.5), "--positions was 1.0"),
    (dict(renew=20), "--renew was 50"),
    (dict(batch_size=2), "--batch-size was 4"),
    (dict(accumulate=2), "--accumulate was 1"),
    (dict(lr=0.5), "--lr was 0.01"),
    (dict(drafter_lr=0.5), "--drafter-lr was 0.01"),
    (dict(k=2), "--k was 3"),
    (dict(rank=4), "--rank was None"),
    (dict(target_layers=(0, 1, 3)), "--target-layers was 0 1 2 .* and is 0 1 3 now"),
    (dict(steered_layers=(1,)), "--steered-layers was None"),
    (dict(max_length=12), "--max-length was 1024"),
    (dict(chat_template_kwargs='{"loud": true}'), "--chat-template-kwargs was {}"),
    (dict(precision="bfloat16"), "--precision was float32"),
    (dict(seed=3), "--seed was 0"),
]


@pytest.mark.parametrize(("changes", "sentence"), CHANGES, ids=[next(iter(changes)) for changes, _ in CHANGES])
def test_another_option_is_refused(stopped: Path, folder: Path, tmp_path: Path, changes: dict, sentence: str) -> None:  # noqa: F811
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    with pytest.raises(SteeringError, match=sentence):
        trainer.before_training(dataclasses.replace(again(stopped, folder, tmp_path, **changes), output=str(stopped)))
    assert before == {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}


def test_every_option_is_compared_or_free() -> None:
    compared = {next(iter(changes)) for changes, _ in CHANGES} | {"target", "drafter", "data"}
    compared |= {"on_policy"}  # test_on_policy.py
    compared |= {"trained_layers"}  # below: mode steer, which CHANGES resumes, does not have it
    compared |= {"kind", "layers", "anchors", "freeze_base"}  # test_block_training.py
    assert compared | record.FREE == {field.name for field in dataclasses.fields(TrainConfig)}
    assert not compared & record.FREE


def test_other_trained_layers_are_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = options(folder, tmp_path / "out", mode="joint", trained_layers=(1,))
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-1"
    record.store(config, checkpoint.parent)
    record.require_same(config, checkpoint)
    with pytest.raises(SteeringError, match="--trained-layers was 1 when .* and is 0 1 now"):
        record.require_same(dataclasses.replace(config, trained_layers=(0, 1)), checkpoint)


def test_another_model_or_file_is_refused_and_the_same_elsewhere_is_not(
    stopped: Path,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name in ("target", "drafter"):
        shutil.copytree(folder / name, tmp_path / "moved" / name)
    shutil.copy(folder / "data.jsonl", tmp_path / "moved/other.jsonl")
    moved: dict[str, Any] = {name: str(tmp_path / "moved" / name) for name in ("target", "drafter")}
    moved["data"] = (str(tmp_path / "moved/other.jsonl"),)
    trainer.before_training(again(stopped, folder, tmp_path, **moved))
    shutil.copy(folder / "target/model.safetensors", tmp_path / "moved/target/model.safetensors")
    config = json.loads((tmp_path / "moved/drafter/config.json").read_text())
    (tmp_path / "moved/drafter/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(SteeringError, match=r"--drafter was drafter when .* another of that name \(the config.json"):
        trainer.before_training(again(stopped, folder, tmp_path, **moved))
    (tmp_path / "moved/other.jsonl").write_text((folder / "data.jsonl").read_text() + "\n")
    with pytest.raises(SteeringError, match="--data was data.jsonl when .*, and is other.jsonl now"):
        trainer.before_training(again(stopped, folder, tmp_path, data=moved["data"]))
    two = (str(folder / "data.jsonl"), str(tmp_path / "moved/other.jsonl"))
    with pytest.raises(SteeringError, match="and is data.jsonl other.jsonl now"):
        trainer.before_training(again(stopped, folder, tmp_path, data=two))


def test_another_number_of_processes_is_refused(stopped: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SteeringError, match="the number of processes was 1 when .* and is 2 now"):
        trainer.before_training(again(stopped, folder, tmp_path))


def test_what_may_change_is_recorded(stopped: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    evaluated: list[int] = []
    plot = trainer.plot_training

    def plotting(path: Path, acceptance: Any, history: list[dict[str, Any]]) -> None:
        evaluated.extend(entry["step"] for entry in history if "eval_overlap" in entry)
        plot(path, acceptance, history)

    monkeypatch.setattr(trainer, "plot_training", plotting)
    trainer.train(again(stopped, folder, tmp_path, steps=6, save_every=1, keep="last", control=str(folder / "drafter")))
    provenance = checkpoint.load(tmp_path / "out").config.provenance
    (resumed,) = provenance["resumed"]
    assert (resumed["at_step"], resumed["steps"]) == (2, 6)
    assert evaluated == [2, 3, 4, 5, 6], "as often as --save-every says now"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["acceptance.json", "steering", "training.png"]


def test_a_run_from_before_the_record(stopped: Path, folder: Path, tmp_path: Path, caplog) -> None:  # noqa: F811
    """What its checkpoint itself tells is compared; the rest cannot be known, and that is said."""
    config = again(stopped, folder, tmp_path)
    (tmp_path / "out/checkpoints/run.json").unlink()
    trainer.before_training(config)
    assert "only --batch-size, --mode, --lr, --rank can be compared" in caplog.text
    for changes in (dict(mode="joint"), dict(batch_size=2), dict(lr=0.5), dict(rank=4)):
        with pytest.raises(SteeringError, match="give the same to resume"):
            trainer.before_training(again(stopped, folder, tmp_path, **changes))
    trainer.train(config)
    assert checkpoint.has_steering(tmp_path / "out")


def test_an_option_newer_than_the_run(stopped: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """It had its default then, whatever it is called."""
    config = again(stopped, folder, tmp_path)
    path = tmp_path / "out/checkpoints/run.json"
    found = json.loads(path.read_text())
    del found["settings"]["offsets"]
    path.write_text(json.dumps(found))
    trainer.before_training(config)
    with pytest.raises(SteeringError, match="--offsets was batch when .* and is block now"):
        trainer.before_training(again(stopped, folder, tmp_path, offsets="block"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "run.json is damaged"),
        ("[]", "run.json is damaged"),
        ('{"version": 1, "settings": [], "names": {}, "resumed": []}', "run.json is damaged"),
        ('{"version": 2, "settings": {}, "names": {}, "resumed": []}', "run.json is version 2, known is 1: upgrade"),
    ],
)
def test_a_damaged_record(stopped: Path, folder: Path, tmp_path: Path, content: str, sentence: str) -> None:  # noqa: F811
    config = again(stopped, folder, tmp_path)
    (tmp_path / "out/checkpoints/run.json").write_text(content)
    with pytest.raises(SteeringError, match=sentence):
        trainer.before_training(config)


def test_two_trainings_of_one_output(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with (
        only_writer(tmp_path / ".out.lock", "x"),
        pytest.raises(SteeringError, match="another process is writing .*out"),
    ):
        trainer.train(options(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_cache_inside_the_output_is_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    for inside in ("out", "out/cache", "out/../out/deep/er"):
        with pytest.raises(SteeringError, match="--cache .* lies in --output"):
            trainer.train(options(folder, tmp_path / "out", cache=str(tmp_path / inside)))
