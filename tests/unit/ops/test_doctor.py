"""`vllm-steer doctor`: every check fires on what it is for, and is silent on a good pair."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs import Size, change_config, save_tokenizer, tiny_model
from repository import ROOT

from vllm_steer import cli
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.ops.doctor import checks
from vllm_steer.ops.doctor import run as doctor
from vllm_steer.ops.doctor.checks import added_bytes
from vllm_steer.ops.doctor.findings import FAIL, OK, SKIPPED, WARNING, Case, Finding
from vllm_steer.ops.doctor.server import recorded_acceptance
from vllm_steer.serving import introspection, patches, patching
from vllm_steer.serving.injection import Injection
from vllm_steer.serving.kill_switch import KILL_SWITCH
from vllm_steer.serving.plan import Plan

PAIR = ROOT / "examples" / "tiny_pair"
TARGET, STEERED, ADAPTER, DRAFTER = (str(PAIR / name) for name in ("target", "steered", "adapter", "drafter"))
CONFIG = SteeringConfig.read(PAIR / "steered" / "steering" / "config.json")
RECORDED = 1.207  # accepted tokens per block of the steered tiny pair, greedy: acceptance length - 1


def examined(**given: Any) -> dict[str, Finding]:
    """Every finding by name."""
    return {f.name: f for f in doctor.examine(Case(**given))}


def one(check: Callable[[Case], Any], case: Case | None = None) -> Finding:
    """The only finding of one check."""
    (found,) = check(case or Case())
    return found


def pair_case(target: Path | str = TARGET, drafter: Path | str = STEERED, **keys: Any) -> Case:
    """A case after the checks that read checkpoint, drafter and target."""
    configs = {"target_config": read_model_config(target), "drafter_config": read_model_config(drafter)}
    return Case(target=str(target), drafter=str(drafter), config=CONFIG, vllm="0.32.0", **configs, **keys)


def changed(source: str, to: Path, **keys: Any) -> Path:
    """A copy of a model with other keys in its config.json."""
    return change_config(Path(shutil.copytree(source, to)), **keys)


# --- a good pair -----------------------------------------------------------------------------------------------------


def test_silent_on_a_good_pair(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv(KILL_SWITCH, raising=False)
    with server(metrics(steering=True)) as url:
        argv = ["doctor", STEERED, "--target", TARGET, "--url", url, "--max-num-seqs", "16"]
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out.splitlines()
        assert cli.main([*argv, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {f["status"] for f in told["findings"]} == {OK}
    assert shown[-1] == f"all is well: {len(told['findings'])} ok"
    for line, finding in zip(shown, told["findings"], strict=False):
        assert line.split(None, 1)[0] == finding["status"] and finding["name"] in line and finding["seen"] in line
    names = [f["name"] for f in told["findings"]]
    assert {"front end", "memory", "hidden states", "acceptance", "vocabulary"} <= set(names)
    assert len(names) == len(set(names)) and sum(name.startswith("seam ") for name in names) == len(patches.SEAMS)


def test_silent_on_a_good_adapter() -> None:
    found = examined(checkpoint=ADAPTER, drafter=DRAFTER, target=TARGET)
    assert {f.status for f in found.values()} == {OK, SKIPPED}
    assert [name for name, f in found.items() if f.status == SKIPPED] == ["server", "steering", "acceptance"]


def test_nothing_given_looks_at_the_environment_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "skipped  checkpoint" in shown and "no CHECKPOINT was given" in shown and "(and so: target" in shown


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--help"])
    assert not end.value.code and "example:\n  vllm-steer doctor ./drafter-steered" in capsys.readouterr().out
    for name in ("--max-num-seqs", "--tensor-parallel-size", "--max-model-len"):
        assert cli.main(["doctor", name, "0"]) == 1
        assert f"{name} is 0, allowed is 1 or more" in capsys.readouterr().err


# --- this environment ------------------------------------------------------------------------------------------------


def test_a_broken_torch_is_a_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    argv = [sys.executable, "-m", "vllm_steer.cli", "doctor", STEERED]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "FAIL     torch" in done.stdout and "operator torchvision::nms does not exist" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("something is wrong: ")


@pytest.mark.parametrize(("v2", "device", "said"), [(True, "cuda", 1), (False, "cuda", 0), (True, "cpu", 0)])
def test_v2_drafts_without_graphs_on_a_gpu(v2: bool, device: str, said: int) -> None:
    engine = SimpleNamespace(use_v2_model_runner=v2, device_config=SimpleNamespace(device_type=device))
    found = list(checks.draft_launches(Case(engine=engine)))
    assert [f.status for f in found] == [WARNING] * said
    assert all("VLLM_USE_V2_MODEL_RUNNER=0" in f.remedy for f in found)


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    found = examined(checkpoint=STEERED, target=TARGET)
    assert found["vllm"].status == FAIL and "pip install 'vllm-steer[gpu]'" in found["vllm"].remedy
    assert found["seams"] == Finding("seams", SKIPPED, "vLLM is not there")
    assert found["checkpoint"].status == found["tokenizer"].status == OK


def test_an_unknown_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "RELEASES", ("0.3",))  # of which 0.32 is no release
    assert one(checks.vllm_version).status == FAIL


def test_plugin_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    found = list(checks.plugin(Case()))
    assert [f.status for f in found] == [FAIL, WARNING] and found[0].remedy == "add vllm_steer to it, or unset it"
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,vllm_steer")
    assert [f.status for f in checks.plugin(Case())] == [OK, OK]
    monkeypatch.setattr(checks, "entry_points", lambda group: [])
    found = list(checks.plugin(Case()))
    assert [f.status for f in found] == [FAIL, WARNING]
    assert "not registered in the group vllm.general_plugins" in found[0].seen


def test_kill_switch_warns_and_the_pair_is_still_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KILL_SWITCH, "1")
    assert cli.main(["doctor", STEERED, "--target", TARGET]) == 0
    shown = capsys.readouterr().out
    assert "warning  kill switch" in shown and f"unset {KILL_SWITCH}" in shown
    assert "it will work, with warnings: " in shown and f"unsteered: {KILL_SWITCH}" in shown


@pytest.mark.parametrize(
    ("value", "status", "seen"), [("off", OK, "'off': off"), ("On", WARNING, "'On'"), ("of", FAIL, "'of', allowed are")]
)
def test_every_spelling_of_the_kill_switch(
    value: str, status: str, seen: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KILL_SWITCH, value)
    assert cli.main(["doctor", STEERED, "--target", TARGET]) == (status == FAIL)
    shown = [line for line in capsys.readouterr().out.splitlines() if " kill switch " in line]
    assert len(shown) == 1 and shown[0].startswith(status) and f"{KILL_SWITCH} is {seen}" in shown[0]


def test_missing_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(place: int) -> patching.Seam:
        return dataclasses.replace(patches.SEAMS[place], module=f"vllm.no_such_module_{place}")

    by_runner = {"V1 proposer": gone(1), "V2 speculator": gone(2), "a repair": gone(4)}
    assert [s.runner for s in by_runner.values()] == ["v1", "v2", "v1"] and not by_runner["a repair"].required
    moved = dataclasses.replace(patches.SEAMS[0], name="VllmConfig.no_such_method")
    monkeypatch.setattr(patches, "SEAMS", (*by_runner.values(), moved))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert [f.status for f in checks.seam_places(Case())] == [FAIL, SKIPPED, WARNING, FAIL]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    found = list(checks.seam_places(Case()))
    assert [f.status for f in found] == [SKIPPED, FAIL, SKIPPED, FAIL]
    assert "no_such_module_2 cannot be imported" in found[1].seen and "install vLLM 0.32" in found[1].remedy
    assert "VllmConfig.no_such_method is not as expected" in found[3].seen


def test_a_check_that_breaks_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> Any:
        raise ZeroDivisionError("by three")

    monkeypatch.setattr(checks, "kill_switch", broken)
    found = examined()
    assert found["kill switch"].status == FAIL and "ZeroDivisionError: by three" in found["kill switch"].seen
    assert list(found)[-1] == "acceptance"


# --- the checkpoint --------------------------------------------------------------------------------------------------


def test_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = Path(shutil.copytree(STEERED, tmp_path / "damaged"))
    golden = damaged / "steering" / "golden.safetensors"
    golden.write_bytes(golden.read_bytes()[:-4] + b"\0\0\0\x40")  # the last delta is 2.0
    assert cli.main(["doctor", str(damaged), "--target", TARGET]) == 1
    shown = capsys.readouterr().out
    assert "FAIL     checkpoint" in shown and "deltas that differ from the recorded ones" in shown
    assert "no checkpoint was read (and so: target, tokenizer" in shown
    assert "something is wrong: " in shown
    assert "no such directory" in examined(checkpoint="./nowhere")["checkpoint"].seen


def test_adapter_without_its_drafter_or_with_another() -> None:
    found = one(checks.drafter, Case(checkpoint=ADAPTER, config=CONFIG))
    assert found.status == SKIPPED and "give --drafter" in found.seen
    found = examined(checkpoint=ADAPTER, drafter=TARGET)["drafter"]
    assert found.status == FAIL and "this drafter has hidden_size=256" in found.seen


# --- checkpoint and target -------------------------------------------------------------------------------------------


def test_another_target(tmp_path: Path) -> None:
    assert one(checks.target, Case(config=CONFIG)).status == SKIPPED  # recorded as "target", which is nowhere here
    deep = changed(TARGET, tmp_path / "deep", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    found = examined(checkpoint=STEERED, target=str(deep))
    assert (
        found["target"].status == FAIL and "num_hidden_layers=5, the steering was trained for" in found["target"].seen
    )
    assert found["tokenizer"].status == SKIPPED
    assert "cannot read the model config" in examined(checkpoint=STEERED, target=str(tmp_path))["target"].seen


def test_tokenizer_and_tables(tmp_path: Path) -> None:
    other = changed(TARGET, tmp_path / "other")
    save_tokenizer(other, 512)
    found = examined(checkpoint=STEERED, target=str(other))["tokenizer"]
    assert found.status == FAIL and "differ: token '" in found.seen
    wide = [changed(model, tmp_path / f"wide{i}", vocab_size=640) for i, model in enumerate((TARGET, STEERED))]
    tokenizer, table = checks.vocabulary(pair_case(*wide))
    assert (tokenizer.status, table.status) == (OK, OK) and "640 rows in both, 128 of them padding" in table.seen
    tokenizer, table = checks.vocabulary(pair_case(wide[0], STEERED))
    assert (tokenizer.status, table.status) == (OK, FAIL) and "tables of 640 (target) and 512 (drafter)" in table.seen


def test_tokenizers_that_differ_in_what_they_do(tmp_path: Path) -> None:
    """Another encoding fails with the vocabulary the same; another template is a warning, by name."""
    drafter = changed(STEERED, tmp_path / "drafter")
    (drafter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = next(iter(checks.vocabulary(pair_case(drafter=drafter))))
    assert found.status == WARNING and "512 tokens, the same in both; the chat templates differ" in found.seen
    path = drafter / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"]["merges"].pop()
    path.write_text(json.dumps(raw), encoding="utf-8")
    found = examined(checkpoint=str(drafter), target=TARGET)["tokenizer"]
    assert found.status == FAIL and "speculation needs one tokenizer" in found.seen


def test_shorter_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = changed(STEERED, tmp_path / "short", max_position_embeddings=256)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    found = one(checks.context_length, pair_case(drafter=short))
    assert found.status == WARNING and found.remedy == "give --max-model-len 256 or less"
    assert one(checks.context_length, pair_case(drafter=short, max_model_len=256)).status == OK
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert one(checks.context_length, pair_case(drafter=short)).status == FAIL


def test_dtypes_and_quantization(tmp_path: Path) -> None:
    half = changed(STEERED, tmp_path / "half", dtype="float16")
    found = one(checks.dtypes, pair_case(drafter=half))
    assert found.status == WARNING and found.seen.startswith("target bfloat16, drafter float16")
    vague = pair_case()
    vague.drafter_config.dtype = None
    assert one(checks.dtypes, vague).status == OK
    for i, (method, status) in enumerate((("compressed-tensors", OK), ("awq", WARNING))):
        quantized = changed(STEERED, tmp_path / f"q{i}", quantization_config={"quant_method": method})
        found = one(checks.quantization, pair_case(drafter=quantized))
        assert (found.status, found.seen) == (status, f"target none, drafter {method}")
        found = one(checks.quantization, pair_case(target=changed(TARGET, tmp_path / f"t{i}",
                    quantization_config={"quant_method": method})))  # fmt: skip
        assert (found.status, found.seen) == (OK, f"target {method}, drafter none")


def test_sliding_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """V1 serves such drafters without any option."""
    keys = {"layer_types": ["sliding_attention"], "sliding_window": 64, "use_sliding_window": True}
    case = pair_case(drafter=changed(STEERED, tmp_path / "sliding", **keys))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    case.checkpoint = case.drafter
    assert one(checks.front_end, case).status == OK
    assert not case.engine.scheduler_config.disable_hybrid_kv_cache_manager


def test_tensor_parallel_shares() -> None:
    assert one(checks.tensor_parallel, Case(config=CONFIG, tensor_parallel_size=3)).status == OK
    found = one(checks.tensor_parallel, Case(config=CONFIG, tensor_parallel_size=5))
    assert found.status == FAIL and found.remedy == "2, 3, 4, 6, 8, 12, 16 would"


def test_a_target_that_hides_its_states(tmp_path: Path) -> None:
    tiny_model("gemma", Size(128, 3, 192, 2)).save_pretrained(tmp_path / "gemma")
    case = Case(target=str(tmp_path / "gemma"))
    with pytest.raises(ValueError, match="cannot emit hidden states of its layers"):
        one(checks.hidden_states, case)


def test_front_end_speaks_with_vllms_words() -> None:
    found = examined(checkpoint=STEERED, target=TARGET, max_model_len=99999)
    assert found["front end"].status == FAIL and "max_model_len (99999)" in found["front end"].seen
    assert found["memory"] == Finding("memory", SKIPPED, "vLLM did not accept the pair")


def test_a_tree_is_rehearsed_too() -> None:
    found = examined(checkpoint=STEERED, target=TARGET, tree="4,1,1,1,1")["draft tree"]
    assert found.status == OK and "4 rows of 6 tokens" in found.seen and "256 slots" in found.seen
    assert examined(checkpoint=STEERED, target=TARGET, tree="8,1,1,1,1")["draft tree"].status == WARNING
    rows = examined(checkpoint=STEERED, target=TARGET, tree_rows=4)["draft tree"]
    assert rows.status == OK and "4 rows of 6 tokens" in rows.seen
    refused = examined(checkpoint=STEERED, target=TARGET, tree="64,1,1,1,1")
    assert refused["front end"].status == FAIL and "give a smaller tree" in refused["front end"].seen
    assert "draft tree" not in examined(checkpoint=STEERED, target=TARGET)


def test_memory_is_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, width = CONFIG.steered_layers, CONFIG.projection_size
    plan = Plan(STEERED, None, 1.0, layers, width, max_num_seqs=16, max_rows=2064, draft_length=CONFIG.draft_length)
    for ranks in (1, 2):
        injection = Injection(plan, torch.device("cpu"), torch.bfloat16, 0, ranks)
        buffers = (injection.deltas, injection.entry, injection._states, injection._guides, injection._normed)
        found = added_bytes(CONFIG, 16, 2064, 2, ranks)
        assert found["buffers"] == sum(b.nbytes for b in buffers)
        steering = checkpoint.load(STEERED)
        whole, shared = (sum(p.numel() for p in m.parameters()) for m in (steering, steering.output))
        assert found["weights"] == 2 * (whole - shared + shared // ranks)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=16),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
    )
    case = Case(config=CONFIG, engine=engine, max_num_seqs=16)
    assert one(checks.memory, case).status == OK
    for total, status in ((2**30, OK), (2**20, WARNING)):
        monkeypatch.setattr(introspection, "device_memory", lambda n=total: n)
        found = one(checks.memory, case)
        assert found.status == status and "of the device" in found.seen


# --- a running server ------------------------------------------------------------------------------------------------


def metrics(
    blocks: int = 100, accepted: float = 115, steering: bool | None = None, steered: int = 99, **more: float
) -> str:
    """The samples of /metrics that matter, in vLLM's form: `steering` None leaves the plugin's out."""
    label = 'engine="0",model_name="target"'
    lines = []
    for name, value in (("drafts", blocks), ("draft_tokens", 5 * blocks), ("accepted_tokens", accepted)):
        full = f"vllm:spec_decode_num_{name}"
        lines += [f"# HELP {full}_total Number of.", f"# TYPE {full}_total counter", f"{full}_total{{{label}}} {value}"]
    at = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines.append(f"# TYPE {at} counter")
    lines += [f'{at}{{{label},position="{i}"}} {accepted // 5}' for i in range(5)]
    if steering is not None:
        ours = {"steering_on": float(steering), "guide_norm": 12.5, "steered_blocks_total": steered}
        ours |= {"blocks_total": blocks, "accepted_tokens_total": accepted} | more
        for name, value in ours.items():
            lines += [f"# TYPE vllm_steer:{name} gauge", f"vllm_steer:{name}{{{label}}} {value}"]
    return "\n".join(lines) + "\n"


@contextmanager
def server(text: str, root: str = "/models/target", key: str = "") -> Iterator[str]:
    """Answer /metrics and /v1/models as a vLLM server would; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models" and key and self.headers.get("Authorization") != f"Bearer {key}":
                self.send_error(401)
                return
            models = {"object": "list", "data": [{"id": "served-name", "object": "model", "root": root}]}
            body = {"/metrics": text, "/v1/models": json.dumps(models)}[self.path].encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def live(text: str, config: SteeringConfig | None = CONFIG, **keys: Any) -> dict[str, Finding]:
    """What the three checks of a server say, by name."""
    with server(text, **keys) as url:
        case = Case(url=url, config=config)
        names = ("server", "steering", "acceptance")
        return {f.name: f for name, check, _ in doctor.all_checks() if name in names for f in check(case)}


def test_no_server_and_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(url="http://127.0.0.1:9")
    assert found["server"].status == FAIL and "give the address of a running vLLM server" in found["server"].remedy
    assert found["acceptance"] == Finding("acceptance", SKIPPED, "the server does not answer")
    found = live(metrics(), root="/models/other")["server"]
    assert found.status == WARNING and "serves served-name, /models/other, the target is target" in found.seen
    assert live(metrics(), root="/models/other", config=None)["server"].status == OK
    with server(metrics(), key="secret") as url:
        assert examined(url=url)["server"].status == FAIL
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert examined(url=f"{url}/v1/")["server"].status == OK


def test_is_it_steering() -> None:
    found = live(metrics(steering=True))["steering"]
    assert (found.status, found.seen) == (OK, "on: guide norm 12.5, 99.0% of 100 blocks steered")
    found = live(metrics(steering=False))["steering"]
    assert found.status == FAIL and KILL_SWITCH in found.remedy
    assert "on, but 0.0% of 100 blocks" in live(metrics(steering=True, steered=0))["steering"].seen
    assert (
        live(metrics(blocks=0, accepted=0, steering=True, steered=0))["steering"].seen
        == "on: guide norm 12.5, no block yet"
    )
    found = live(metrics())["steering"]
    assert found.status == FAIL and "the plugin is not loaded or switched off" in found.seen
    assert live(metrics(), config=None)["steering"].status == SKIPPED
    two = metrics(steering=True) + 'vllm_steer:steering_on{engine="1",model_name="target"} 0\n'
    assert live(two)["steering"].seen == "off in 1 of 2 engines"


def test_acceptance_against_the_record() -> None:
    for accepted, status in ((115, OK), (61, OK), (60, WARNING), (1, WARNING), (0, FAIL)):
        found = live(metrics(accepted=accepted))["acceptance"]
        assert found.status == status and f"acceptance length {1 + accepted / 100:.3f} over 100 blocks" in found.seen
        assert f"{1 + RECORDED:.3f} recorded" in found.seen and bool(found.remedy) == (status != OK)
    few = live(metrics(blocks=49, accepted=0))["acceptance"]
    assert few.status == SKIPPED and "49 blocks so far, too few to tell (at least 50)" in few.seen
    assert "nothing is recorded" in live(metrics(accepted=1), config=None)["acceptance"].seen
    with pytest.raises(ValueError, match="the server does not speculate"):
        live("")


def test_acceptance_by_the_plugins_own_count() -> None:
    """vLLM's counters include drafts nobody made; the record may be the server's alone."""
    found = live(metrics(accepted=40, steering=True, accepted_tokens_total=80))["acceptance"]
    assert found.status == OK and "acceptance length 1.800" in found.seen
    text = metrics(accepted=40, steering=True)
    for sampling, value in (("sampled", 1.5), ("greedy", RECORDED)):
        text += f'vllm_steer:recorded_accepted_tokens{{engine="0",model_name="target",sampling="{sampling}"}} {value}\n'
    found = live(text, config=None)["acceptance"]
    assert found.status == WARNING and "2.207 recorded" in found.seen


def test_recorded_acceptance() -> None:
    assert recorded_acceptance(CONFIG, 5) == pytest.approx(RECORDED, abs=1e-3)
    assert 0.45 * RECORDED < recorded_acceptance(CONFIG, 1) < 0.55 * RECORDED  # a server that drafts one token
    for other in ({}, {"trained": {}}, {"trained": {"greedy": 3}}, {"trained": None}):
        assert recorded_acceptance(dataclasses.replace(CONFIG, acceptance=other), 5) is None


@pytest.mark.slow
def test_a_real_server(tmp_path: Path) -> None:
    from openai import OpenAI
    from server import serve

    prompts = [json.loads(line)["prompt"] for line in (PAIR / "heldout.jsonl").read_text().splitlines()[:4]]
    options = ("--dtype", "float32", "--max-model-len", "512", "--gpu-memory-utilization", "0.3", "--enforce-eager")
    options += ("--worker-extension-cls", "vllm_steer.serving.scale.Switch")
    spec, env = {"model": STEERED, "num_speculative_tokens": 5}, {"VLLM_SERVER_DEV_MODE": "1"}
    with serve(PAIR / "target", tmp_path / "log", *options, speculative=spec, env=env, timeout=300) as running:
        client = OpenAI(base_url=running.url + "/v1", api_key="none", timeout=120)

        def until(name: str, status: str) -> dict[str, Finding]:
            """The findings once the plugin's own counts, which come seconds later, have brought `status`."""
            for _ in range(10):
                found = examined(checkpoint=STEERED, target=TARGET, url=running.url)
                if found[name].status == status:
                    break
                time.sleep(3)
                client.completions.create(model=TARGET, prompt=prompts[0], max_tokens=8, temperature=0)
            return found

        assert until("steering", OK)["acceptance"].status == SKIPPED, "nobody has asked anything much yet"
        for prompt in prompts:
            client.completions.create(model=TARGET, prompt=prompt, max_tokens=96, temperature=0)
        found, counted = until("acceptance", OK), running.counters()
        running.steer(0)
        off = until("steering", FAIL)
    assert {f.status for f in found.values()} == {OK}, found
    measured = float(re.search(r"acceptance length (\S+)", found["acceptance"].seen).group(1))
    assert measured == pytest.approx(1 + counted["accepted"] / counted["drafts"], abs=0.3)
    assert off["steering"].seen == "off in 1 of 1 engines"
