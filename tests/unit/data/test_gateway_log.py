"""A gateway's log as training data: what is used, what is left out and counted, what is no exchange."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from transformers import AutoTokenizer

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import read_file
from vllm_steer.data.gateway_log import NotAnswered, row

TARGET = ROOT / "examples/tiny_pair/target"
ASKED = {"model": "m", "prompt": "import os\n"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def completion(text: str = "def f():", **more: Any) -> dict[str, Any]:
    return {"model": "m", "object": "text_completion", "choices": [{"index": 0, "text": text}]} | more


def chat(**message: Any) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"} | message}]}


def chunks(*texts: str, **more: Any) -> list[dict[str, Any]]:
    deltas = [{"role": "assistant"}, *({"content": text} for text in texts), {}]
    found = [{"model": "m", "choices": [{"index": 0, "delta": delta} | more]} for delta in deltas]
    return [*found, {"choices": []}]


@pytest.mark.parametrize(
    ("request_", "response", "wanted"),
    [
        (ASKED, completion(), {"prompt": "import os\n", "response": "def f():", "template": {}}),
        (CHAT, chat(), {"prompt": CHAT["messages"], "response": "hello", "template": {}}),
        (CHAT, chunks("he", "llo"), {"prompt": CHAT["messages"], "response": "hello", "template": {}}),
        (
            CHAT,
            "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks("he", "llo")) + "data: [DONE]\n\n",
            {"prompt": CHAT["messages"], "response": "hello", "template": {}},
        ),
        (
            ASKED,
            [completion("def "), completion("f():")],
            {"prompt": "import os\n", "response": "def f():", "template": {}},
        ),
        (
            CHAT | {"tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}},
            chat(),
            {
                "prompt": CHAT["messages"],
                "response": "hello",
                "tools": [{"type": "function"}],
                "template": {"enable_thinking": False},
            },
        ),
        (
            CHAT,
            chat() | {"prompt_token_ids": [1, 2], "choices": [{"message": {"content": "x"}, "token_ids": [3]}]},
            {"prompt_ids": [1, 2], "response_ids": [3]},
        ),
        (
            CHAT,
            [c | {"prompt_token_ids": [1, 2]} for c in chunks("a", "b", token_ids=[3])],
            {"prompt_ids": [1, 2], "response_ids": [3, 3, 3, 3]},
        ),
    ],
)
def test_what_is_read(request_: dict[str, Any], response: Any, wanted: dict[str, Any]) -> None:
    assert row({"request": request_, "response": response}, "m") == wanted


@pytest.mark.parametrize(
    ("request_", "response", "reason"),
    [
        (ASKED, {"error": {"message": "no"}}, "errors"),
        (ASKED, {"object": "error", "message": "no"}, "errors"),
        (CHAT, [{"error": {"message": "no"}}], "errors"),
        (ASKED, completion(model="other"), "answers of other models"),
        (ASKED | {"model": "other"}, {"choices": [{"text": "x"}]}, "answers of other models"),
        (CHAT, chat(content=None, tool_calls=[{"id": "1"}]), "tool calls"),
        (CHAT, [*chunks("a"), {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}], "tool calls"),
        (CHAT, {"model": "m", "choices": chat()["choices"] * 2}, "several choices"),
        (CHAT, [*chunks("a"), {"choices": [{"index": 1, "delta": {"content": "b"}}]}], "several choices"),
        (CHAT, chat(reasoning_content="well"), "answers with their reasoning apart"),
        (CHAT, chat(content=""), "empty answers"),
        (ASKED | {"echo": True}, completion(), "answers that repeat their prompt (echo)"),
    ],
)
def test_what_is_left_out(request_: dict[str, Any], response: Any, reason: str) -> None:
    with pytest.raises(NotAnswered) as found:
        row({"request": request_, "response": response}, "m")
    assert str(found.value) == reason


@pytest.mark.parametrize("response", [None, 3, {}, {"choices": []}, {"choices": [1]}, [], [1], "data: {", "", [{}]])
def test_what_is_no_exchange(response: Any) -> None:
    with pytest.raises(SteeringError) as found:
        row({"request": ASKED, "response": response}, None)
    assert not isinstance(found.value, NotAnswered)


def test_a_log_is_counted_and_mixed_with_other_lines(tmp_path: Path) -> None:
    lines = [
        {"request": ASKED, "response": completion()},
        {"request": ASKED, "response": completion(model="other")},
        {"request": ASKED, "response": completion(model="other")},
        {"request": ASKED, "response": completion(model="other")},
        {"request": ASKED, "response": {"error": "no"}},
        {"prompt": "import os\n", "response": "def f():"},
        {"request": ASKED, "response": 3},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows, said = read_file(tmp_path / "log.jsonl", tokenizer, 64, model="m")
    assert len(rows) == 2 and rows[0].ids == rows[1].ids
    assert "3 logged exchanges left out: answers of other models" in said
    assert "1 logged exchanges left out: errors" in said
    assert "1 lines left out, the first is" in said and "the response is a int" in said
    assert len(read_file(tmp_path / "log.jsonl", tokenizer, 64)[0]) == 5, "without a name, of any model"
