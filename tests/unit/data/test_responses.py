"""`vllm-steer generate` on real engines: rows, seeds, interruption of every kind, provenance, Ray.

Engines run in processes of their own, because the environment that makes vLLM work here is read when it is imported;
one process serves many jobs (`Jobs`), as importing vLLM takes longer than they do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import ENV, runner_env
from repository import ROOT, SUPPORT
from transformers import AutoTokenizer

from vllm_steer.common import options
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.provenance import fingerprint
from vllm_steer.data import generate as responses
from vllm_steer.data.generate import GenerateConfig, generate, response_seed
from vllm_steer.data.prompts import read_prompts
from vllm_steer.data.response_file import ResponseFile, meta_path

PAIR = ROOT / "examples/tiny_pair"
ENDS = {0, 199, 260}  # the end of a text and two kinds of newline: with these, responses end in both ways
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.3,
    "max_num_seqs": 8,
    "block_size": 32,
    "max_num_batched_tokens": 200,  # prompts compete for them, and would be cut in chunks
}
SETTINGS = {"samples": 2, "max_tokens": 24, "seed": 3, "max_model_len": 200, "sampling": "neutral"}


class Jobs:
    """A process that runs `vllm-steer generate`, one command line after the other."""

    def __init__(self, log: Path, **env: str):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | ENV | runner_env("v1") | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}"} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "a"),
            text=True,
        )

    def start(self, **settings: Any) -> None:
        """Begin a run with these options."""
        self.process.stdin.write(json.dumps(words(**settings)) + "\n")
        self.process.stdin.flush()

    def wait(self) -> str:
        """What the run begun last came to: its summary line, or the error's text."""
        line = self.process.stdout.readline()
        assert line, f"the process died:\n{self.log.read_text()[-4000:]}"
        return json.loads(line)

    def run(self, **settings: Any) -> str:
        self.start(**settings)
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def main() -> None:
    """The process behind `Jobs`."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not reach the answers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        parser = argparse.ArgumentParser()
        responses.add_arguments(parser)
        try:
            config = options.from_arguments(GenerateConfig, parser.parse_args(json.loads(line)))
            answer = json.dumps(generate(config))
        except (SteeringError, KeyboardInterrupt) as error:
            answer = f"{type(error).__name__}: {error}"
        gc.collect()
        cleanup_dist_env_and_memory()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def words(**settings: Any) -> list[str]:
    """The command line of a run: SETTINGS and ENGINE, and what differs."""
    settings = SETTINGS | {"engine": ENGINE} | settings
    settings["engine"] = json.dumps(settings["engine"])
    return shlex.split(options.command("generate", settings))[2:]


def wait_until(what: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rows_of(path: Path) -> dict[tuple[str, int], dict]:
    """Rows by (id, sample); fails if one is there twice."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {(row["id"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: the tiny target with more ends of a sequence; prompts.jsonl: 24 usable lines and some bad ones."""
    path = tmp_path_factory.mktemp("generate")
    shutil.copytree(PAIR / "target", path / "model")
    settings = json.loads((path / "model/generation_config.json").read_text())
    settings["eos_token_id"] = sorted(ENDS)
    (path / "model/generation_config.json").write_text(json.dumps(settings))
    texts = [json.loads(line)["prompt"] for line in (PAIR / "heldout.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": text[:150], "category": "code", "id": f"p{i}"}) for i, text in enumerate(texts[:20])]
    chats = [[{"role": "user", "content": text[:40]}, {"role": "user", "content": text[60:99]}] for text in texts[:4]]
    lines += [json.dumps({"prompt": chat, "split": "test"}) for chat in chats]
    lines.insert(3, json.dumps({"prompt": "x = 1\n" * 200}))
    lines.insert(5, '{"prompt": ')
    (path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def jobs(folder: Path) -> Iterator[Jobs]:
    jobs = Jobs(folder / "log")
    yield jobs
    jobs.close()


@pytest.fixture(scope="module")
def whole(folder: Path, jobs: Jobs) -> Path:
    """The output of a run that nothing interrupts."""
    output = folder / "whole.jsonl"
    answer = jobs.run(**sources(folder), output=output)
    assert answer.startswith("{"), answer
    return output


def sources(folder: Path) -> dict[str, Path]:
    return {"model": folder / "model", "prompts": folder / "prompts.jsonl"}


def config_of(folder: Path, output: Path, **changes: Any) -> GenerateConfig:
    """What `Jobs.run` runs, as a GenerateConfig: for what ends before an engine starts."""
    values = {k: str(v) for k, v in sources(folder).items()} | SETTINGS | {"engine": json.dumps(ENGINE)}
    return GenerateConfig(output=str(output), **(values | changes))


def test_the_sidecar_has_no_secret(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    responses._begin(config_of(folder, output, engine=json.dumps(ENGINE | {"hf_token": "hf_SECRET"})), None)
    written = meta_path(output).read_text()
    assert '"hf_token": "***"' in written and "hf_SECRET" not in written


# --- what is written ------------------------------------------------------------------------------------------------


def test_rows_are_complete_and_the_boundary_is_exact(folder: Path, whole: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = rows_of(whole)
    texts = {}
    for number, line in enumerate((folder / "prompts.jsonl").read_text().splitlines(), start=1):
        if number not in (4, 6):
            raw = json.loads(line)
            text = raw["prompt"]
            if isinstance(text, list):  # the tiny template joins contents with newlines
                text = "".join(message["content"] + "\n" for message in text)
            texts[raw.get("id", f"line-{number}")] = text, raw.get("category")
    assert set(rows) == {(name, sample) for name in texts for sample in (0, 1)} and len(texts) == 24
    for (name, _), row in rows.items():
        text, category = texts[name]
        assert row["category"] == category and row["prompt_ids"] == tokenizer(text)["input_ids"]
        ids = row["response_ids"]
        assert not ENDS & set(ids[:-1])
        if row["finish"] == "stop":
            assert ids[-1] in ENDS
        else:
            assert row["finish"] == "length" and ids[-1] not in ENDS
            assert len(ids) == min(24, 200 - len(row["prompt_ids"]))
    assert {row["finish"] for row in rows.values()} == {"stop", "length"}
    different = sum(rows[name, 0]["response_ids"] != rows[name, 1]["response_ids"] for name in texts)
    assert different > 18, "samples of one prompt have seeds of their own"


def test_the_sidecar_tells_how(folder: Path, whole: Path) -> None:
    meta, rows = json.loads(meta_path(whole).read_text()), rows_of(whole)
    assert meta["complete"] and meta["rows"] == len(rows) == 48
    tokens = sum(len(row["response_ids"]) for row in rows.values())
    assert meta["response_tokens"] == tokens == meta["runs"][0]["response_tokens"]
    speed = meta["runs"][0]["tokens_per_second"]
    assert speed > 0 and abs(speed * meta["runs"][0]["seconds"] / tokens - 1) < 0.05
    assert meta["model"] == {"name": "model", "fingerprint": fingerprint(folder / "model")}
    assert meta["sampling"] == SETTINGS | {"temperature": 1.0} and meta["engine"] == ENGINE
    (reason,) = [meta["dropped"].pop(name) for name in list(meta["dropped"])]
    assert reason.endswith("tokens, allowed are 1 to 199")
    assert {"vllm-steer", "torch"} <= set(meta["runs"][0]["versions"])
    assert str(folder) not in meta_path(whole).read_text(), "no paths of this machine"
    again = shlex.split(meta["runs"][0]["command"])[2:]
    parser = argparse.ArgumentParser()
    responses.add_arguments(parser)
    found = options.from_arguments(GenerateConfig, parser.parse_args(again))
    same = dict(model="model", prompts="prompts.jsonl", output="whole.jsonl")
    assert found == dataclasses.replace(config_of(folder, whole), **same), "the command can be run again"


def test_greedy_is_what_the_model_says(folder: Path, jobs: Jobs) -> None:
    """Token for token what transformers generates from the same ids; --limit and --split choose the prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    chosen = {"samples": 1, "temperature": 0.0, "split": "test", "limit": 3}
    answer = jobs.run(**sources(folder), output=folder / "greedy.jsonl", **chosen)
    rows = rows_of(folder / "greedy.jsonl")
    assert [name for name, _ in sorted(rows)] == ["line-23", "line-24", "line-25"], answer
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for row in rows.values():
        ids = torch.tensor([row["prompt_ids"]])
        expected = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :].tolist()
        assert row["response_ids"] == expected


def test_another_seed_gives_other_responses(folder: Path, jobs: Jobs, whole: Path) -> None:
    jobs.run(**sources(folder), output=folder / "seed4.jsonl", seed=4, limit=8)
    rows, other = rows_of(whole), rows_of(folder / "seed4.jsonl")
    assert len(other) == 14 and sum(rows[key] == row for key, row in other.items()) < 4
    assert len({response_seed(s, p, n) for s in (0, 1) for p in ("a", "b") for n in (0, 1)}) == 8


# --- interruption ---------------------------------------------------------------------------------------------------


def test_interrupted_thrice_is_as_good_as_never(folder: Path, jobs: Jobs, whole: Path) -> None:
    """Ctrl-C, then kill -9, then a torn line: nothing lost, nothing repeated, the same responses."""
    output = folder / "parts.jsonl"
    given = sources(folder) | {"output": output}
    jobs.start(**given)
    wait_until(lambda: lines_of(output) >= 3)
    jobs.process.send_signal(signal.SIGINT)
    assert jobs.wait().startswith("KeyboardInterrupt")
    first = lines_of(output)
    assert "finished rows are in" in jobs.log.read_text() and "--resume" in jobs.log.read_text()
    assert not json.loads(meta_path(output).read_text())["complete"]

    other = Jobs(folder / "log2")
    other.start(**given, resume=True)
    wait_until(lambda: lines_of(output) >= first + 3)
    other.process.kill()
    other.process.wait()
    second = lines_of(output)
    assert 3 <= first < second < 48, "too fast to interrupt: ask for more tokens"

    kept = output.read_bytes()
    output.write_bytes(kept + b'{"id": "p1", "sample": 0, "categ')
    fewer = ENGINE | {"max_num_seqs": 5}  # memory settings may change
    meta = json.loads(jobs.run(**given, resume=True, engine=fewer))
    assert output.read_bytes().startswith(kept)
    assert rows_of(output) == rows_of(whole)
    assert (
        meta["complete"]
        and meta["rows"] == 48
        and [run.get("rows") for run in meta["runs"]]
        == [
            None,
            None,
            48 - second,
        ]
    )


def copy_of(whole: Path, folder: Path) -> Path:
    output = folder / "copy.jsonl"
    shutil.copy(whole, output)
    shutil.copy(meta_path(whole), meta_path(output))
    return output


def test_resuming_what_is_complete_starts_no_engine(folder: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(responses, "Engine", None)
    output = copy_of(whole, tmp_path)
    meta = generate(config_of(folder, output, resume=True))
    assert meta["complete"] and meta["rows"] == 48 and meta["runs"][-1]["rows"] == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 4}, "--seed is 4, and .* was begun with 3"),
        ({"samples": 3}, "--samples is 3"),
        ({"max_tokens": 9}, "--max-tokens is 9"),
        ({"temperature": 0.5}, "--temperature is 0.5, and .* was begun with 1.0"),
        ({"max_model_len": None}, "--max-model-len is None"),
        ({"split": "test"}, "--split is test, and .* was begun with None"),
        ({"engine": '{"dtype": "bfloat16"}'}, "--engine is {'dtype': 'bfloat16'}"),
        ({"chat_template_kwargs": '{"loud": 1}'}, r"--chat-template-kwargs is .'loud': 1., and .* was begun with None"),
        ({"model": str(PAIR / "drafter")}, r"--model \(fingerprint\) is"),
        ({"prompts": str(PAIR / "heldout.jsonl")}, r"--prompts \(SHA-256\) is"),
        ({"resume": False}, "copy.jsonl exists: give another --output, or --resume"),
    ],
)
def test_resuming_differently_is_refused(folder: Path, whole: Path, tmp_path: Path, changes, complaint) -> None:
    output = copy_of(whole, tmp_path)
    before = output.read_bytes(), meta_path(output).read_bytes()
    with pytest.raises(SteeringError, match=complaint):
        generate(config_of(folder, output, **({"resume": True} | changes)))
    assert before == (output.read_bytes(), meta_path(output).read_bytes())


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda output: meta_path(output).unlink(), "copy.meta.json is not readable"),
        (lambda output: meta_path(output).write_text("{}"), "copy.meta.json is not readable"),
        (lambda output: output.unlink(), "nothing to resume: start without --resume"),
        (lambda output: output.write_bytes(b'{"id": 1}\n' + output.read_bytes()), "line 1 is not a response row"),
    ],
)
def test_a_damaged_output_is_not_resumed(folder: Path, whole: Path, tmp_path: Path, damage, complaint) -> None:
    output = copy_of(whole, tmp_path)
    damage(output)
    with pytest.raises(SteeringError, match=complaint):
        generate(config_of(folder, output, resume=True))


# --- the output file ------------------------------------------------------------------------------------------------


def row(name: str, sample: int = 0, ids: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {"id": name, "sample": sample, "response_ids": list(ids)}


def test_a_row_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    with ResponseFile(tmp_path / "deep/out.jsonl", resume=False) as file:
        assert file.append(row("a")) and file.append(row("a", 1)) and not file.append(row("a"))
        assert file.done == {("a", 0), ("a", 1)} and file.tokens == 4
    with ResponseFile(tmp_path / "deep/out.jsonl", resume=True) as file:
        assert file.done == {("a", 0), ("a", 1)} and file.tokens == 4
        assert not file.append(row("a", 1)) and file.append(row("b"))
    assert len(rows_of(tmp_path / "deep/out.jsonl")) == 3


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ResponseFile(tmp_path / "out.jsonl", resume=False):
        meta_path(tmp_path / "out.jsonl").write_text("{}")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def in_another_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResponseFile(path, resume=False) as file:
        file.append(row("a"))
        code = f"from vllm_steer.data.response_file import ResponseFile; ResponseFile({str(path)!r}, resume=True)"
        assert "is being written by another process" in in_another_process(code).stderr
        file.append(row("b"))
    assert in_another_process(code).returncode == 0


def test_a_full_disk_is_told_and_costs_one_row(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    code = f"""
import resource
from vllm_steer.data.response_file import ResponseFile
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with ResponseFile({str(path)!r}, resume=False) as file:
    for i in range(100):
        file.append({{"id": str(i), "sample": 0, "response_ids": [1]}})
"""
    found = in_another_process(code)
    assert "SteeringError: cannot write" in found.stderr and "make room" in found.stderr
    assert path.stat().st_size == 1000
    with ResponseFile(path, resume=True) as file:
        assert 15 < len(file.done) < 30
        size = path.stat().st_size
        assert 900 < size < 1000 and path.read_bytes().endswith(b"}\n")
        file.append(row("after"))
    assert ("after", 0) in rows_of(path)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"limit": 0}, "--limit is 0, allowed is 1 or more"),
        ({"samples": 0}, "--samples is 0"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"workers": 2}, "several engines need --ray"),
        ({"max_model_len": 1}, "--max-model-len is 1, allowed is 2"),
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": 0.0}, "--samples is 2 and greedy responses are all the same"),
        ({"output": "out.json"}, "--output is out.json, allowed is a name that ends in .jsonl"),
        ({"engine": "dtype=float32"}, "--engine is not valid JSON"),
        ({"engine": "[1]"}, "--engine is .1., allowed is a JSON object"),
        ({"chat_template_kwargs": "no"}, "--chat-template-kwargs is not valid JSON"),
        ({"engine": '{"max_model_len": 5}'}, "--engine has 'max_model_len', which is not for it: use --max-model-len"),
        ({"split": "dev"}, "split is 'dev'"),
        ({"prompts": "./none.jsonl"}, "cannot read none.jsonl"),
        ({"prompts": "builtin:poems"}, "builtin:poems is not a built-in prompt set"),
        ({"model": "./no/such/model"}, "cannot load the tokenizer of ./no/such/model"),
    ],
)
def test_a_wrong_option_is_named(folder: Path, tmp_path: Path, changes: dict, complaint: str) -> None:
    with pytest.raises(SteeringError, match=complaint):
        generate(dataclasses.replace(config_of(folder, tmp_path / "out.jsonl"), **changes))
    assert not list(tmp_path.iterdir())


def test_chat_messages_need_a_template(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(SteeringError, match="has no chat template: give prompts of plain text"):
        generate(config_of(folder, tmp_path / "out.jsonl", model=str(tmp_path / "model")))


def test_what_vllm_refuses_is_told(folder: Path, jobs: Jobs, tmp_path: Path) -> None:
    answer = jobs.run(**sources(folder), output=tmp_path / "out.jsonl", engine={"dtype": "float33"})
    assert answer.startswith("SteeringError: vLLM does not start") and "float33" in answer
    assert not list(tmp_path.iterdir())


def test_prompts_that_no_one_can_answer(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A chat template that refuses every chat: each is dropped, told and nothing is written, nor an engine started."""
    shutil.copytree(folder / "model", tmp_path / "model")
    template = "{{ 'yes' if willing else raise_exception('I take no chats') }}"
    (tmp_path / "model/chat_template.jinja").write_text(template)
    config = config_of(folder, tmp_path / "out.jsonl", model=str(tmp_path / "model"), split="test")
    with pytest.raises(SteeringError, match="no prompt of .* could be answered: all were dropped, see above"):
        generate(config)
    dropped = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert len(dropped) == 4 and dropped[0].startswith("prompt line-23 dropped: the chat template refused")
    assert not list(tmp_path.glob("out*"))
    config = dataclasses.replace(config, chat_template_kwargs='{"willing": true}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = list(responses._requests(config, read_prompts(config.prompts, "test"), tokenizer, set(), {}))
    assert {tuple(request.prompt_ids) for request in asked} == {tuple(tokenizer("yes")["input_ids"])}


# --- the fingerprint ------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    target = fingerprint(PAIR / "target")
    assert len({target, *(fingerprint(PAIR / name) for name in ("drafter", "distilled", "steered"))}) == 4
    copy = tmp_path / "copy"
    shutil.copytree(PAIR / "target", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    assert fingerprint(copy) == target, "saved again by another version, elsewhere"
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert fingerprint(copy) != target
    (copy / "config.json").write_text(json.dumps(config))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(copy) != target
    (copy / "model.safetensors").unlink()
    with pytest.raises(SteeringError, match="has no weights"):
        fingerprint(copy)


def test_a_fingerprint_of_a_cached_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(PAIR / "drafter", repository / "snapshots/0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    assert fingerprint("someone/tiny") == fingerprint(PAIR / "drafter")
    with pytest.raises(SteeringError, match="someone/else: no such directory, and not a hub id that can be fetched"):
        fingerprint("someone/else")


def test_a_fingerprint_reads_the_files_an_index_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a-1", "a-2", "consolidated"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    index = {"weight_map": {"x": "a-2.safetensors", "y": "a-1.safetensors", "z": "a-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = fingerprint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"another copy")
    assert fingerprint(tmp_path) == before
    (tmp_path / "a-2.safetensors").write_bytes(b"a-3")
    assert fingerprint(tmp_path) != before


# --- Ray ------------------------------------------------------------------------------------------------------------


def busiest_actor(process: subprocess.Popen[str]) -> Any:
    """The process below a driver in which Ray runs an engine of ours, the one that has worked most."""
    import psutil

    below = psutil.Process(process.pid).children(recursive=True)
    actors = [child for child in below if child.cmdline() and child.cmdline()[0].startswith("ray::MapWorker")]
    return max(actors, key=lambda child: child.cpu_times().user)


@pytest.mark.slow
def test_a_killed_ray_actor_loses_and_repeats_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    output = tmp_path / "ray.jsonl"
    jobs = Jobs(folder / "log.ray", RAY_USAGE_STATS_ENABLED="0")
    slow = ENGINE | {"max_num_seqs": 1}  # leaves time for the murder
    jobs.start(**sources(folder), output=output, ray=True, workers=2, engine=slow)
    wait_until(lambda: lines_of(output) >= 1, 300)
    busiest_actor(jobs.process).kill()
    before = lines_of(output)
    meta = json.loads(jobs.wait())
    assert 1 <= before < 40, "the actor had nothing left to do"
    assert meta["complete"] and list(meta["dropped"]) == ["line-4"]
    assert rows_of(output) == rows_of(whole)

    given = sources(folder) | {"output": tmp_path / "none.jsonl", "ray": True}
    assert "99 workers need 99 CPUs and the Ray cluster has" in jobs.run(**given, workers=99)
    answer = jobs.run(**given, engine={"dtype": "float33"})
    assert answer.startswith("SteeringError: vLLM does not start"), "a sentence, not Ray's traceback"
    assert not list(tmp_path.glob("none*"))
    jobs.close()


if __name__ == "__main__":
    main()
