"""The identity of a model: every change of a weight or tokenizer file is seen, no other; old records still compare."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_steer.bench import run
from vllm_steer.bench.conditions import conditions
from vllm_steer.common import tensor_hashes
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.identity import Identity, difference, fingerprint, sampled_fingerprint
from vllm_steer.data import generate
from vllm_steer.data.dataset import Row
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.ops import hub
from vllm_steer.training import record, trainer
from vllm_steer.training.batches import read_data
from vllm_steer.training.cache import StateCache

PAIR = ROOT / "examples/tiny_pair"
TENSORS = sorted(load_file(PAIR / "target/model.safetensors"))


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_STEER_CACHE", str(tmp_path / "memory"))
    return tmp_path / "memory/tensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PAIR / "target", tmp_path / "model"))


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Small files are remembered too, at once; the list has every file that is read."""
    monkeypatch.setattr(tensor_hashes, "REMEMBER_FROM", 0)
    monkeypatch.setattr(tensor_hashes, "SETTLED_NS", 0)
    seen, read = [], tensor_hashes._read
    monkeypatch.setattr(tensor_hashes, "_read", lambda path, advance: seen.append(path) or read(path, advance))
    return seen


def flip(path: Path, name: str) -> None:
    """Change one bit of the byte in the middle of a tensor, in place."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    first, last = json.loads(raw[8:start])[name]["data_offsets"]
    raw[start + (first + last) // 2] ^= 1
    path.write_bytes(raw)


def change_weights(model: Path) -> None:
    flip(model / "model.safetensors", TENSORS[len(TENSORS) // 2])


def change_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text() + "!")


# --- what is seen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSORS)
def test_one_bit_of_any_tensor_is_seen(model: Path, name: str) -> None:
    before = fingerprint(model)
    flip(model / "model.safetensors", name)
    assert difference(before, fingerprint(model)) == "the weights differ"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"extra": torch.zeros(1)},
        lambda t: {name: tensor for name, tensor in t.items() if name != TENSORS[3]},
        lambda t: t | {TENSORS[3]: t[TENSORS[4]], TENSORS[4]: t[TENSORS[3]]},
        lambda t: t | {TENSORS[0]: t[TENSORS[0]].reshape(-1)},
        lambda t: t | {TENSORS[0]: t[TENSORS[0]].view(torch.int16)},
    ],
    ids=["added", "removed", "exchanged", "shape", "dtype"],
)
def test_names_shapes_and_dtypes_are_seen(model: Path, change: Callable) -> None:
    before, path = fingerprint(model), model / "model.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()}, path)
    assert difference(before, fingerprint(model)) == "the weights differ"


TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "qwen.tiktoken", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
    *("generation_config.json", "tokenization_own.py"),
)


@pytest.mark.parametrize("name", TOKENIZER)
def test_every_tokenizer_file_is_seen(model: Path, name: str) -> None:
    path = model / name
    path.parent.mkdir(exist_ok=True)
    seen = [fingerprint(model)]
    for text in ('{"a": 1}', '{"a": 2}'):  # added or replaced, then changed
        path.write_text(text)
        seen.append(fingerprint(model))
    path.unlink()
    seen.append(fingerprint(model))
    expected = "the tokenizer, chat template or generation_config.json differ"
    existed = (PAIR / "target" / name).exists()
    assert difference(seen[0], seen[1]) == difference(seen[1], seen[2]) == difference(seen[2], seen[3]) == expected
    assert difference(seen[0], seen[3]) == (expected if existed else None)
    assert fingerprint(model, tokenizer=False) == seen[0].rpartition(":")[0]


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json", "hf_quant_config.json"])
def test_the_configuration_is_seen(model: Path, name: str) -> None:
    before, path = fingerprint(model), model / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert difference(before, fingerprint(model)) == "the config.json differ"


def test_all_that_differs_is_named(model: Path) -> None:
    before = fingerprint(model)
    change_weights(model)
    change_template(model)
    now = fingerprint(model)
    assert difference(before, now) == ("the weights and the tokenizer, chat template or generation_config.json differ")


# --- what is not a difference ---------------------------------------------------------------------------------------


def test_shards_and_pickles_of_the_same_weights_are_the_same_model(model: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    found = [fingerprint(model)]
    for name, size in (("two", "4MB"), ("many", "500KB")):
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        loaded.save_pretrained(tmp_path / name, max_shard_size=size)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        found.append(fingerprint(tmp_path / name))
    (tmp_path / "two/model.safetensors.index.json").unlink()
    first, *_ = sorted((tmp_path / "two").glob("*.safetensors"))
    first.rename(first.with_name("z.safetensors"))  # the shards in another order
    found.append(fingerprint(tmp_path / "two"))
    state, pickled = load_file(model / "model.safetensors"), Path(shutil.copytree(model, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    half = len(state) // 2
    for number, names in enumerate((TENSORS[:half], TENSORS[half:]), 1):
        torch.save({name: state[name] for name in names}, pickled / f"pytorch_model-{number}-of-2.bin")
    torch.save({"lr": 1}, pickled / "training_args.bin")
    found.append(fingerprint(pickled))
    assert len(set(found)) == 1
    state[TENSORS[1]].view(-1)[5] += 1
    torch.save({name: state[name] for name in TENSORS[:half]}, pickled / "pytorch_model-1-of-2.bin")
    assert difference(found[0], fingerprint(pickled)) == "the weights differ"


def test_saving_again_elsewhere_changes_nothing(model: Path) -> None:
    before = fingerprint(model)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | {"transformers_version": "0", "_name_or_path": "x"}, indent=7))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors", metadata={"by": "somebody"})
    (model / "README.md").write_text("a card")
    assert fingerprint(model) == before


def test_a_hub_id_is_the_directory_of_its_revision(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--someone--tiny"
    for commit, ref in (("0123abcd", "main"), ("4567abcd", "tuned")):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        shutil.copytree(model, repository / "snapshots" / commit)
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] ^= 1  # seen by both versions
    (repository / "snapshots/4567abcd/model.safetensors").write_bytes(raw)
    assert fingerprint("someone/tiny") == fingerprint(model)
    tuned = fingerprint("someone/tiny", "tuned")
    assert tuned == fingerprint(repository / "snapshots/4567abcd") != fingerprint(model)
    old = sampled_fingerprint(repository / "snapshots/4567abcd")
    assert difference(old, tuned) is None, "an old record is compared at the same revision"


# --- directories of other kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "is a LoRA adapter without its base model: merge it"),
        (("config.json", "model.gguf"), "has its weights as GGUF alone"),
        (("steering/config.json",), "is a steering adapter without a drafter"),
        (("config.json",), "has no weights"),
        (("config.json", "training_args.bin/"), "has no weights"),
        (("model.safetensors",), "cannot read the config.json of"),
    ],
)
def test_what_is_no_model_is_refused_by_name(tmp_path: Path, files: tuple[str, ...], complaint: str) -> None:
    for name in files:
        path = tmp_path / "it" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text("{}")
    with pytest.raises(SteeringError, match=complaint):
        fingerprint(tmp_path / "it")


def test_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(SteeringError, match="model.gguf is a file, GGUF for one: give the model's directory"):
        fingerprint(tmp_path / "model.gguf")


def test_a_lora_beside_an_indexed_model_is_seen(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="4MB")
    (model / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, model / "adapter_model.safetensors")
    before, old = fingerprint(model), sampled_fingerprint(model)
    save_file({"a": torch.ones(2)}, model / "adapter_model.safetensors")
    assert difference(before, fingerprint(model)) == "the weights differ"
    assert sampled_fingerprint(model) == old, "version 1 read what the index names"


# --- records of version 1 -------------------------------------------------------------------------------------------


def test_old_records_are_compared_by_the_old_digest(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = sampled_fingerprint(model)
    assert len(record) == 64 and ":" not in record
    assert difference(record, fingerprint(model)) is None
    assert "older version, which covers samples of the weights and no tokenizer" in caplog.text
    change_template(model)
    assert difference(record, fingerprint(model)) is None, "not covered then"
    flip(model / "model.safetensors", TENSORS[0])
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] ^= 1  # in a sample, whatever the size
    (model / "model.safetensors").write_bytes(raw)
    assert difference(record, fingerprint(model)) == "the weights or config.json differ"


def test_a_record_of_a_later_version_is_refused_by_name(model: Path) -> None:
    assert "recorded in version v3, known are 1 and v2" in (difference("v3:" + "0" * 64, fingerprint(model)) or "")


def test_other_values_are_compared_as_they_read_in_json(model: Path) -> None:
    now = fingerprint(model)
    assert difference({"target": str(now), "layers": [1, 2]}, {"target": now, "layers": (1, 2)}) is None
    assert difference({"target": str(now), "layers": [1, 3]}, {"target": now, "layers": (1, 2)}) == "the values differ"
    assert difference([0.0, 1], (0, 1.0)) is None
    for recorded, value in ((None, now), (str(now), None), ({"a": None}, {}), ({}, {"a": None}), (None, {"a": now})):
        assert difference(recorded, value) is not None


def test_an_identity_is_plain_text_in_json_and_copies(model: Path) -> None:
    now = fingerprint(model)
    assert isinstance(now, Identity) and json.loads(json.dumps({"a": now})) == {"a": str(now)}
    assert copy.deepcopy(now) == now and copy.deepcopy(now).model == str(model)


# --- the memory -----------------------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_again_when_it_changed(model: Path, own_memory: Path, remembering: list) -> None:
    before = fingerprint(model)
    assert fingerprint(model) == before and len(remembering) == 1
    (entry,) = own_memory.glob("*.json")
    path = model / "model.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path, TENSORS[7])  # same name, size and inode
    os.utime(path, ns=times)  # and mtime
    assert path.stat().st_mtime_ns == times[1]
    changed = fingerprint(model)
    assert changed != before and len(remembering) == 2
    other = shutil.copy2(PAIR / "target/model.safetensors", model / "new")
    os.utime(other, ns=times)
    os.replace(other, path)  # another inode
    assert fingerprint(model) == before and len(remembering) == 3
    entry.unlink()
    assert fingerprint(model) == before and len(remembering) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"checksum": "0", "entry": {}}'])
def test_a_damaged_memory_costs_time_only(model: Path, own_memory: Path, remembering: list, text: str) -> None:
    before = fingerprint(model)
    (entry,) = own_memory.glob("*.json")
    entry.write_text(text)
    assert fingerprint(model) == before and len(remembering) == 2
    assert fingerprint(model) == before and len(remembering) == 2, "and is mended"


def test_a_memory_that_was_edited_is_not_believed(model: Path, own_memory: Path, remembering: list) -> None:
    before = fingerprint(model)
    (entry,) = own_memory.glob("*.json")
    raw = json.loads(entry.read_text())
    raw["entry"]["tensors"][0][3] = "0" * 64
    entry.write_text(json.dumps(raw))
    assert fingerprint(model) == before


def test_no_place_to_remember_costs_time_only(
    model: Path, tmp_path: Path, remembering: list, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_STEER_CACHE", str(tmp_path / "file"))
    assert fingerprint(model) == fingerprint(model) and len(remembering) == 2
    assert "are not remembered" in caplog.text and "VLLM_STEER_CACHE" in caplog.text


def test_a_file_changed_just_now_is_not_remembered(
    model: Path, own_memory: Path, remembering: list, monkeypatch
) -> None:
    """It could change again within one tick of the file system's clock, and look the same."""
    monkeypatch.setattr(tensor_hashes, "SETTLED_NS", 10**12)
    assert fingerprint(model) == fingerprint(model) and len(remembering) == 2
    assert not list(own_memory.glob("*.json"))


def test_small_files_are_read_each_time(model: Path, own_memory: Path) -> None:
    fingerprint(model)
    assert not own_memory.exists()


def test_a_file_that_changes_while_it_is_read_is_refused(model: Path, monkeypatch) -> None:
    read = tensor_hashes._read

    def slow(path: Path, advance: Callable) -> list:
        found = read(path, advance)
        flip(path, TENSORS[0])
        return found

    monkeypatch.setattr(tensor_hashes, "_read", slow)
    with pytest.raises(SteeringError, match="model.safetensors changed while it was read: let its writer finish"):
        fingerprint(model)


CHILD = """
import sys, time
from pathlib import Path
from vllm_steer.common import tensor_hashes as tensors
tensors.REMEMBER_FROM = tensors.SETTLED_NS = 0
read = tensors._read
def slow(path, advance):
    print("read", flush=True)
    time.sleep(2)
    return read(path, advance)
tensors._read = slow
print("ready", flush=True)
sys.stdin.readline()
from vllm_steer.common.identity import fingerprint
print(fingerprint(sys.argv[1]), flush=True)
"""


def test_of_two_processes_one_reads(model: Path, own_memory: Path) -> None:
    start = lambda: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", CHILD, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    both = [start(), start()]
    assert all(child.stdout.readline() == "ready\n" for child in both)
    for child in both:
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate(timeout=120)[0].split() for child in both]
    assert sorted(words.count("read") for words in said) == [0, 1]
    assert {words[-1] for words in said} == {str(fingerprint(model))}
    assert not list(own_memory.glob("*.new"))


def test_the_memory_lies_where_the_environment_says(tmp_path: Path, monkeypatch) -> None:
    assert tensor_hashes.memory() == tmp_path / "memory/tensors"
    monkeypatch.delenv("VLLM_STEER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tensor_hashes.memory() == tmp_path / "xdg/vllm-steer/tensors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tensor_hashes.memory() == tmp_path / ".cache/vllm-steer/tensors"


def test_progress_is_shown_when_reading_takes_long(model: Path, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    code = "import sys; from vllm_steer.common import identity, tensor_hashes as tensors\n"
    code += "fingerprint = identity.fingerprint\n"
    for least, shown in ((0, True), (60, False)):
        more = f"tensors.SHOW_AFTER = {least}; fingerprint(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", code + more, str(model)], capture_output=True, text=True, check=True
        )
        assert (f"hashing {model}: 100%" in done.stderr) == shown


# --- where it is compared -------------------------------------------------------------------------------------------

ROWS = [Row((1, 2, 3), 1)]


def cache(directory: Path, model: Path, recorded: str | None = None) -> StateCache:
    made_from = {"target": recorded or fingerprint(model, tokenizer=False), "layers": (1, 2, 3)}
    found = StateCache(directory, ROWS, {"final": 2}, made_from)
    found.fill(lambda batch: {"final": torch.zeros(1, 3, 2)}, 1)
    return found


@pytest.mark.parametrize("old", [False, True])
def test_a_cache_of_other_weights_is_refused(model: Path, tmp_path: Path, old: bool) -> None:
    cache(tmp_path / "cache", model, sampled_fingerprint(model) if old else None)
    change_template(model)
    assert cache(tmp_path / "cache", model).done == 1, "its rows are compared by their ids"
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(
        SteeringError, match="was made with target .*the weights (or config.json )?differ; give another"
    ):
        cache(tmp_path / "cache", model)


def test_training_refuses_the_cache_of_another_target(model: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt_ids": [5, 6 + i], "response_ids": [7, 8, 9, 10, 11, 12, 13]}) for i in range(30)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    settings = {"target": str(model), "drafter": str(PAIR / "drafter"), "data": (str(tmp_path / "data.jsonl"),)}
    settings |= {"cache": str(tmp_path / "cache"), "steps": 0}
    trainer.train(trainer.TrainConfig(**settings, output=str(tmp_path / "first")))
    trainer.train(trainer.TrainConfig(**settings, output=str(tmp_path / "second")))
    change_weights(model)
    with pytest.raises(SteeringError, match="cache was made with target .*: the weights differ; give another --cache"):
        trainer.train(trainer.TrainConfig(**settings, output=str(tmp_path / "third")))


@pytest.mark.parametrize(
    ("change", "what"), [(change_weights, "the weights differ"), (change_template, "the tokenizer, chat template")]
)
def test_responses_of_another_model_or_template(model: Path, tmp_path: Path, change: Callable, what: str) -> None:
    """A resume and a training refuse them; unchanged, or by an old record, both go on."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "x"}) + "\n")
    config = generate.GenerateConfig(model=str(model), prompts=str(prompts), output=str(output))
    meta = generate._begin(config, None)
    assert meta["model"]["fingerprint"] == fingerprint(model)
    again = generate.GenerateConfig(model=str(model), prompts=str(prompts), output=str(output), resume=True)
    generate._begin(again, None)
    rows = [json.dumps({"prompt_ids": [5, 6 + i], "response_ids": [7, 8, 9]}) for i in range(30)]
    output.write_text("\n".join(rows) + "\n")
    training = trainer.TrainConfig(
        target=str(model), drafter=str(PAIR / "drafter"), data=(str(output),), output=str(tmp_path / "trained")
    )
    tokenizer = load_tokenizer(str(model), str(PAIR / "drafter"))
    read_data(training, tokenizer)
    recorded = output.with_suffix(".meta.json").read_text()
    old = json.loads(recorded)
    old["model"]["fingerprint"] = sampled_fingerprint(model)
    change(model)
    with pytest.raises(SteeringError, match=rf"--model \(fingerprint\) is v2:.*{what}.*; give the same, or another"):
        generate._begin(again, None)
    assert output.with_suffix(".meta.json").read_text() == recorded
    with pytest.raises(SteeringError, match=f"was written by another model .model.*{what}.* from the target's"):
        read_data(training, tokenizer)
    shutil.rmtree(model)
    shutil.copytree(PAIR / "target", model)
    output.with_suffix(".meta.json").write_text(json.dumps(old))
    read_data(training, tokenizer)
    generate._begin(again, None)
    old["model"]["fingerprint"] = "0" * 64
    output.with_suffix(".meta.json").write_text(json.dumps(old))
    for refuse in (lambda: read_data(training, tokenizer), lambda: generate._begin(again, None)):
        with pytest.raises(SteeringError, match="the weights or config.json differ"):
            refuse()


@pytest.mark.parametrize("old", [False, True])
def test_a_benchmark_of_other_weights_is_refused(model: Path, tmp_path: Path, old: bool) -> None:
    recorded = {"target_weights": sampled_fingerprint(model) if old else str(fingerprint(model)), "k": 5}
    results = {"settings": recorded, "contenders": [{"name": "plain"}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    measured = lambda: run._measured(  # noqa: E731
        tmp_path, {"target_weights": fingerprint(model), "k": 5, "conditions": conditions()}
    )
    assert measured() == [{"name": "plain"}]
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(SteeringError, match="measured with target_weights .*the weights (or config.json )?differ"):
        measured()


@pytest.mark.parametrize("identify", [fingerprint, sampled_fingerprint], ids=["now", "old"])
def test_a_resumed_benchmark_keeps_what_it_measured_of_these_weights(tmp_path: Path, monkeypatch, identify) -> None:
    steered = Path(shutil.copytree(PAIR / "steered", tmp_path / "steered"))
    recorded = {"drafter": str(steered), "adapter": None, "drafter_weights": identify(steered)}
    kept = {"name": "s", "identity": recorded | {"steering_weights": identify(steered / "steering")}, "measured": 1}
    monkeypatch.setattr(run, "_encode", lambda *_: ([], [], 0))
    monkeypatch.setattr(run, "_measured", lambda *_: [json.loads(json.dumps(kept))])
    monkeypatch.setattr(run.summary, "summarise", lambda *_: [])
    monkeypatch.setattr(run, "_write", lambda *_: None)
    monkeypatch.setattr(run, "measure_in_a_process", lambda *_: {"measured": 2})
    config = run.BenchConfig(
        prompts="builtin", output=str(tmp_path), target=str(PAIR / "target"), drafters=(f"s={steered}",), resume=True
    )
    assert run.benchmark(config)["contenders"] == [kept]
    raw = bytearray((steered / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (steered / "model.safetensors").write_bytes(raw)
    assert run.benchmark(config)["contenders"][0]["measured"] == 2


@pytest.mark.parametrize("identify", [fingerprint, sampled_fingerprint], ids=["now", "old"])
def test_a_card_takes_a_table_of_these_steering_weights_only(tmp_path: Path, monkeypatch, identify) -> None:
    steered = Path(shutil.copytree(PAIR / "steered", tmp_path / "steered"))
    found = {"plain": None, "steered": identify(steered / "steering")}
    recorded = [{"name": n, "steered": bool(w), "identity": {"steering_weights": w}} for n, w in found.items()]
    (tmp_path / "results.json").write_text(json.dumps({"settings": {}, "contenders": recorded, "summary": []}))
    monkeypatch.setattr(hub.report, "table", lambda _: "the table")
    assert hub._measured(tmp_path, steered) == "the table"
    weights = steered / "steering/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(SteeringError, match="measured other steering weights"):
        hub._measured(tmp_path, steered)


def test_a_training_records_whose_weights_it_saw(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n")
    config = trainer.TrainConfig(
        target=str(model), drafter=str(PAIR / "drafter"), data=(str(tmp_path / "data.jsonl"),), output="out"
    )
    found = record.provenance(config)["identity"]
    assert found == {"target": fingerprint(model), "drafter": fingerprint(PAIR / "drafter")}
