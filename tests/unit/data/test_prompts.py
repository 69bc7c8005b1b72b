"""prompts.py: what a prompt file may hold, and that a bad line is named and costs nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from repository import ROOT
from transformers import AutoTokenizer

from vllm_steer.common.errors import SteeringError
from vllm_steer.data import prompts
from vllm_steer.data.prompts import Prompt, encode_prompt, read_prompts

TARGET = ROOT / "examples/tiny_pair/target"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def write(path: Path, *lines: object) -> str:
    """A file of lines: bytes as they are, anything else as JSON."""
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return str(path)


def test_every_form_of_a_line(tmp_path: Path) -> None:
    source = write(
        tmp_path / "p.jsonl",
        b'\xef\xbb\xbf{"prompt": "first"}\r',  # as a Windows editor saves it
        b"  ",
        {"prompt": "caf\u00e9 \U0001f642", "id": "x", "category": "code", "answer": 3},
        {"prompt": CHAT, "id": 7, "category": None},
    )
    assert read_prompts(source) == [
        Prompt("line-1", "first"),
        Prompt("x", "caf\u00e9 \U0001f642", "code"),
        Prompt("7", CHAT),
    ]


def test_only_numbers_are_answers_to_compare(tmp_path: Path) -> None:
    given = ["42", "so it is 1,000", "Paris", ""]
    source = write(tmp_path / "p.jsonl", *({"prompt": "x", "id": str(i), "answer": a} for i, a in enumerate(given)))
    assert [prompt.expected for prompt in read_prompts(source)] == [
        {"answer": "42"}, {"answer": "so it is 1,000"}, None, None
    ]  # fmt: skip


BAD = [
    (b'{"prompt": "x"', "not valid JSON"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8 (invalid continuation byte at byte 15)"),
    (b"[" * 100_000, "not valid JSON"),
    (["x"], 'no object with the key "prompt"'),
    ({"text": "x"}, 'no object with the key "prompt"'),
    ({"prompt": 3}, "prompt is int"),
    ({"prompt": " \n"}, "prompt is empty"),
    (b'{"prompt": "\\ud83d"}', "half a surrogate pair"),
    ({"prompt": []}, "no messages"),
    ({"prompt": ["hello"]}, "message 1 has no role; allowed are system, user, assistant, tool"),
    ({"prompt": [CHAT[0], {"content": "x"}]}, "message 2 has no role"),
    ({"prompt": [{"role": "bot", "content": "x"}]}, "message 1 has role 'bot'"),
    ({"prompt": [{"role": ["user"], "content": "x"}]}, "message 1 has role ['user']"),
    ({"prompt": [{"role": "user"}]}, "content of message 1 is NoneType"),
    ({"prompt": [{"role": "user", "content": ""}]}, "content of message 1 is empty"),
    ({"prompt": [*CHAT, {"role": "assistant", "content": "x"}]}, "the last message is the assistant's"),
    ({"prompt": "x", "id": "kept"}, "id 'kept' was used before"),
    ({"prompt": "x", "id": True}, "id is bool"),
    ({"prompt": "x", "category": 1}, "category is int"),
    ({"prompt": "x", "split": "dev"}, "split is 'dev', allowed are train, validation, test"),
]


def test_bad_lines_are_named_and_the_rest_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [line for line, _ in BAD]
    source = write(tmp_path / "p.jsonl", {"prompt": "a", "id": "kept"}, *lines, {"prompt": "z"})
    with caplog.at_level(logging.WARNING):
        found = read_prompts(source)
    assert [prompt.id for prompt in found] == ["kept", f"line-{len(BAD) + 2}"]
    *named, summary = [record.getMessage() for record in caplog.records]
    assert len(named) == len(BAD)
    for number, (message, (_, complaint)) in enumerate(zip(named, BAD, strict=True), start=2):
        assert message.startswith(f"{source}, line {number} left out: ") and complaint in message, message
    assert summary == f"{source}: {len(BAD)} of {len(BAD) + 2} lines left out"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no usable line: a line is"),
        (b"\n \n", "no usable line"),
        (b"nonsense\n", "1 lines were left out"),
        ('{"prompt": "x"}\n'.encode("utf-16"), "no usable line"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(SteeringError, match=complaint):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_a_split_takes_the_lines_marked_with_it(tmp_path: Path) -> None:
    marks = ["train", "test", None, "validation", "train"]
    lines = [{"prompt": "x"} | ({"split": mark} if mark else {}) for mark in marks]
    source = write(tmp_path / "p.jsonl", *lines)
    assert [p.id for p in read_prompts(source, "train")] == ["line-1", "line-5"]
    assert [p.id for p in read_prompts(source, "validation")] == ["line-4"]
    assert len(read_prompts(source)) == 5
    with pytest.raises(SteeringError, match="split is 'dev', allowed are train, validation, test"):
        read_prompts(source, "dev")
    with pytest.raises(SteeringError, match='no usable line with "split": "test"'):
        read_prompts(write(tmp_path / "q.jsonl", {"prompt": "x"}), "test")


def test_builtin_sets_by_name_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in prompts.BUILTIN:
        lines = [{"id": f"{name}-{i}", "split": s, "prompt": CHAT} for i, s in enumerate(prompts.SPLITS)]
        write(tmp_path / f"{name}.jsonl", *lines)
    monkeypatch.setattr(prompts, "FOLDER", tmp_path)
    assert read_prompts("builtin:math", "test") == [Prompt("math-2", CHAT, "math")]
    assert [p.category for p in read_prompts("builtin", "train")] == list(prompts.BUILTIN)
    assert len(read_prompts("builtin")) == 15
    with pytest.raises(SteeringError, match="builtin:poems is not a built-in prompt set; there are builtin:chat, "):
        read_prompts("builtin:poems")


def test_token_ids_of_a_prompt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    assert encode_prompt(tokenizer, "import os") == tokenizer("import os")["input_ids"]
    assert encode_prompt(tokenizer, CHAT) == tokenizer("Be brief.\nHello\n")["input_ids"]
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.add_bos_token = True
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'A:' if add_generation_prompt }}"
    assert encode_prompt(tokenizer, CHAT) == tokenizer("Be brief.HelloA:", add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = "{{ loud and 'LOUD' }}{{ messages[0].content }}"
    assert encode_prompt(tokenizer, CHAT, {"loud": True}) == tokenizer("LOUDBe brief.")["input_ids"][1:]
    tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(SteeringError, match="template refused these messages .no system messages here"):
        encode_prompt(tokenizer, CHAT)
