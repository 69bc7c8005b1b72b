"""common/redaction.py: no secret and no path of this machine in what is written or printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from vllm_steer import cli
from vllm_steer.common import options
from vllm_steer.common.identity import Identity
from vllm_steer.common.redaction import is_secret, redact, redact_words
from vllm_steer.ops import hub
from vllm_steer.ops.doctor import run as doctor
from vllm_steer.ops.doctor.findings import OK, Finding

PAIR = ROOT / "examples/tiny_pair"


@pytest.mark.parametrize(
    "key",
    ["hf_token", "HF_TOKEN", "--hf-token", "hfToken", "token", "api_key", "--api-key", "OPENAI_API_KEY", "apikey",
     "aws_secret_access_key", "aws_access_key_id", "password", "db_password", "hf-password", "secret", "client_secret",
     "kv_transfer_config.api_key", "authorization", "AWS_CREDENTIALS", "key", "HFTOKEN", "authtoken", "api_keys",
     "passwords", "secrets", "pwd", "DB_PASS", "--x.api-key+", "bearer"],
)  # fmt: skip
def test_secret_keys(key: str) -> None:
    assert is_secret(key)
    assert redact({"a": [{key: "S3CRET"}]}) == {"a": [{key: "***"}]}


@pytest.mark.parametrize(
    "key",
    ["max_tokens", "max_num_batched_tokens", "--max-tokens", "tokens", "eos_token", "pad_token", "num_key_value_heads",
     "stop_token_ids", "stop_token", "audio_token", "bytes_per_token", "tokenizer", "compass", "keyboard",
     "token_ids", "keep", "keys", "secretary", "per_token_bytes"],
)  # fmt: skip
def test_other_keys(key: str) -> None:
    assert not is_secret(key)
    assert redact({key: "x y"}) == {key: "x y"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"hf_token": None, "api_key": "", "use_token": True}, {"hf_token": None, "api_key": "", "use_token": True}),
        ({"hf_token": {"value": "S3CRET"}}, {"hf_token": "***"}),
        ('{"hf_token": "S3CRET", "x": 1}', '{"hf_token": "***", "x": 1}'),
        (["--engine", '{"a": {"b_key": "S3CRET"}}'], ["--engine", '{"a": {"b_key": "***"}}']),
        ({"speculative": json.dumps({"more": json.dumps({"api_key": "S3CRET"})})},
         {"speculative": json.dumps({"more": json.dumps({"api_key": "***"})})}),
        ("http://user:S3CRET@host:8000/v1", "http://***@host:8000/v1"),
        ("https://S3CRET@host/x", "https://***@host/x"),
        ("http://localhost:8000/v1/models", "http://localhost:8000/v1/models"),
        ("/home/me/models/drafter", "drafter"),
        ("/home/me/models/drafter/", "drafter"),
        ("~/models/drafter", "drafter"),
        ("file:///home/me/drafter", "drafter"),
        ("plain=/home/me/drafter", "plain=drafter"),
        ("steered=/home/me/adapter+/home/me/drafter", "steered=adapter+drafter"),
        ("see '/home/me/x.json', please", "see 'x.json', please"),
        ("OWNER/NAME", "OWNER/NAME"),
        ("path:/home/me/x", "path:x"),
        ("plain=file:///home/me/x", "plain=x"),
        ("plain=/x", "plain=x"),
        ("~me/models/x", "x"),
        ("C:/models/x", "x"),
        ("C:\\models\\x", "x"),
        ("\\\\host\\share\\x", "x"),
        ({"/home/me/x": 1}, {"x": 1}),
        ("http://h/v1?api_key=S3CRET&x=1", "http://h/v1?api_key=***&x=1"),
        ("http://u:S3C@RET@h/v1", "http://***@h/v1"),
        (' {"api_key": "S3CRET"}', '{"api_key": "***"}'),
        ("{'api_key': 'S3CRET', 'x': 1}", "{'api_key': '***', 'x': 1}"),
        ("failed with hf_token=S3CRET, x", "failed with hf_token=***, x"),
        ("HF_TOKEN: S3CRET", "HF_TOKEN: ***"),
        ("Authorization: Bearer S3CRET99", "Authorization: *** ***"),
        ("STEER_DISABLE=1 vllm-steer bench --hf-token S3CRET", "STEER_DISABLE=1 vllm-steer bench --hf-token '***'"),
        ("/usr/bin/python3.11 -m x --hf-token S3CRET", "python3.11 -m x --hf-token '***'"),
        ("a/b/c of x", "a/b/c of x"),
        ("1/2 and 3 / 4", "1/2 and 3 / 4"),
        ("{not json", "{not json"),
        ("vllm-steer bench --engine '{\"hf_token\": \"S3CRET\"}' --output /home/me/out",
         "vllm-steer bench --engine '{\"hf_token\": \"***\"}' --output out"),
    ],
)  # fmt: skip
def test_values(given: Any, shown: Any) -> None:
    assert redact(given) == shown
    assert redact(shown) == shown


def test_what_needs_no_change_is_the_same_object() -> None:
    identity = Identity("v2:a:b:c")
    assert redact({"weights": identity})["weights"] is identity
    assert redact("/home/me/x", paths=True) == "/home/me/x"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--api-key a b --port 1", "--api-key *** *** --port 1"),
        ("--api-key=a --port 1", "--api-key=*** --port 1"),
        ("--a.b-token a c --x 1", "--a.b-token *** *** --x 1"),
        ("--a.b_token=a rest", "--a.b_token=*** rest"),
        ("--api-key a=S= --port 1", "--api-key *** --port 1"),
        ("--api-key -S --port 1", "--api-key *** --port 1"),
        ("--api-key S -p 1", "--api-key *** -p 1"),
        ("--x.api-key+ S --x.hf_token+=S y", "--x.api-key+ *** --x.hf_token+=*** y"),
        ("HF_TOKEN=a vllm serve /m/x", "HF_TOKEN=*** vllm serve x"),
        ("--model=/m/x --url http://u:p@h/v1", "--model=x --url http://***@h/v1"),
    ],
)
def test_words(words: str, shown: str) -> None:
    assert redact_words(words.split()) == shown.split()


def test_a_recorded_command_has_no_secret(tmp_path: Path) -> None:
    command = options.command("bench", {"engine": '{"hf_token": "S3CRET"}', "output": str(tmp_path / "out"), "k": 5})
    assert shlex.split(command) == [
        "vllm-steer",
        "bench",
        "--engine",
        '{"hf_token": "***"}',
        "--output",
        "out",
        "--k",
        "5",
    ]


def test_the_doctor_shows_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda case: [Finding("server", OK, f"{case.url} answers", "hf_token=S3CRET")]
    )
    assert cli.main(["doctor", "--url", "http://me:S3CRET@host:1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "ok       server http://***@host:1 answers: hf_token=***"


def test_only_a_checkpoint_is_uploaded(tmp_path: Path) -> None:
    for name in (
        ".env", "notes.txt", "responses.jsonl", "responses.meta.json", "cache.json", "states.bin", "optimizer.pt",
        "checkpoints/checkpoint-2/model.safetensors", "cache/states.bin", "steering/.secret", "steering/model.bin",
        "optimizer.safetensors", "training_state.safetensors", "states.safetensors", "LICENSE.env", "modeling_x.py",
        "failed-batch.json", "id_rsa", "additional_chat_templates/tool.jinja", "additional_chat_templates/x.py",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    mine = {p.relative_to(PAIR / "steered").as_posix() for p in (PAIR / "steered").rglob("*") if p.is_file()}
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((PAIR / "steered" / name).read_bytes())
    for name in ("README.md", "LICENCE", "USE_POLICY.md", "model-00001-of-00002.safetensors", "processor_config.json"):
        (tmp_path / name).write_text("x")
        mine.add(name)
    wanted, left_out = hub.belongings(tmp_path)
    assert set(wanted) == mine | {"additional_chat_templates/tool.jinja"}
    assert {".env", "checkpoints/", "cache/", "steering/.secret", "states.bin", "responses.jsonl"} <= set(left_out)
