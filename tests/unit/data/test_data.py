"""data.py and jsonl.py: one reader for prompts and for training rows, and no row vanishes without a word."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from repository import ROOT
from transformers import AutoTokenizer

from vllm_steer.bench import remote, run
from vllm_steer.bench.run import BenchConfig
from vllm_steer.common.errors import SteeringError
from vllm_steer.data.dataset import read_file, read_rows
from vllm_steer.data.prompts import Prompt, encode_prompt, read_prompts
from vllm_steer.training.batches import model_limits

TARGET = ROOT / "examples/tiny_pair/target"
USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
GOOD = b'{"prompt": "int main(", "response": "void) {"}'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls %}<{{ c.function.name }} {{ c.function.arguments.a }}>{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(TARGET)
    found.chat_template = TEMPLATE
    return found


def write(path: Path, *lines: object) -> str:
    """A file of lines: bytes as they are, anything else as JSON."""
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return str(path)


def chat(*messages: Any, **keys: Any) -> dict[str, Any]:
    return {"prompt": list(messages), "response": "x"} | keys


BAD = [  # what is wrong with a prompt, for both readers
    (b'{"prompt": "x", "response": "y"', "not valid JSON"),
    (b'{"prompt": "caf\xe9", "response": "x"}', "not UTF-8 (invalid continuation byte"),
    (b'{"prompt": "\\ud83d hello", "response": "x"}', "prompt has half a surrogate pair"),
    (b'{"prompt": "x", "response": "x", "n": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
    (b'{"prompt": "x", "response": "x", "n": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "not valid JSON"),
    (b'{"prompt": "x", "prompt": "y", "response": "x"}', "not valid JSON (key 'prompt' is there twice)"),
    (b'{"prompt": NaN, "response": "x"}', "prompt is float, allowed is a string"),
    ({"prompt": "", "response": "x"}, "prompt is empty"),
    ({"prompt": " \n", "response": "x"}, "prompt is empty"),
    ({"prompt": None, "response": "x"}, "prompt is NoneType"),
    ({"prompt": "x", "response": "x", "category": 3}, "category is int"),
    (chat(), "prompt has no messages"),
    (chat("hi"), "message 1 has no role"),
    (chat(USER | {"content": None}), "content of message 1 is NoneType"),
    (chat({"role": "user"}), "content of message 1 is NoneType"),
    (chat(USER | {"content": ""}), "content of message 1 is empty"),
    (chat({"role": "system", "content": " "}, USER), "content of message 1 is empty"),
    (chat(USER | {"content": [{"type": "text", "text": "hi"}]}), "content of message 1 is a list of parts"),
    (chat(USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "is a list of parts"),
    (chat(USER | {"role": "human"}), "message 1 has role 'human'; allowed are system, user"),
    (chat(USER | {"role": [["deep"]]}), "message 1 has role [['deep']]"),
    (chat({"role": "system", "content": "x"}), "the last message is the system's: there is nothing to answer"),
    (chat(USER, {"role": "assistant", "content": "x"}), "the last message is the assistant's"),
    (b'{"prompt": [{"role": "user", "content": "\\udc00"}], "response": "x"}', "content of message 1 has half"),
    (chat(USER | {"tool_calls": [CALL]}), "message 1 has tool_calls and is the user's"),
    (chat({"role": "assistant", "tool_calls": [{}]}, USER), "tool_calls of message 1 cannot be used"),
    (chat({"role": "assistant", "tool_calls": "add"}, USER), "tool_calls of message 1 cannot be used"),
    (chat({"role": "assistant", "content": 3, "tool_calls": [CALL]}, USER), "content of message 1 is int"),
    (chat(USER, tools=[3]), "tools is [3], allowed is a list of objects"),
    (chat(USER, tools="add"), "tools is 'add', allowed is a list of objects"),
    ({"prompt": "hi", "response": "x", "tools": [{"name": "add"}]}, "tools go with a prompt of chat messages"),
]
BAD_ROWS = [  # what only a training row can have
    (["x"], "found list; a line is {"),
    ({"prompt": "x"}, "found ['prompt']; a line is {"),
    ({"prompt": "x", "response": "y", "text": "z"}, "found ['prompt', 'response', 'text']"),
    ({"text": " "}, "text is empty"),
    ({"prompt": "x", "response": ""}, "response is empty"),
    ({"prompt": "x", "response": None}, "response is NoneType"),
    ({"prompt": "x", "response": [{"role": "assistant", "content": "x"}]}, "response is list"),
    (b'{"prompt": "x", "response": "\\ud83d"}', "response has half a surrogate pair"),
    ({"prompt_ids": [1], "response_ids": []}, "the response is empty"),
    ({"prompt_ids": [1], "response_ids": [2.0]}, "response_ids: allowed is a list of token ids, found [2.0]"),
    ({"prompt_ids": [1, True], "response_ids": [2]}, "prompt_ids: allowed is a list of token ids, found [1, True]"),
    ({"prompt_ids": [1, -1], "response_ids": [2]}, "prompt_ids: allowed is a list"),
    ({"prompt_ids": {"1": 1}, "response_ids": [2]}, "prompt_ids: allowed is a list"),
]


@pytest.mark.parametrize("reader", ["prompts", "rows"])
def test_both_readers_name_the_same_lines(tmp_path: Path, tokenizer: Any, reader: str, caplog) -> None:
    bad = BAD + (BAD_ROWS if reader == "rows" else [])
    source = write(tmp_path / "p.jsonl", GOOD, *(line for line, _ in bad), GOOD)
    with caplog.at_level(logging.WARNING):
        found = read_rows(source, tokenizer, 64) if reader == "rows" else read_prompts(source)
    assert len(found) == 2
    *named, summary = [record.getMessage() for record in caplog.records]
    assert len(named) == len(bad)
    for number, (message, (_, complaint)) in enumerate(zip(named, bad, strict=True), start=2):
        assert message.startswith(f"{source}, line {number} left out: ") and complaint in message, message
    assert summary == f"{source}: {len(bad)} of {len(bad) + 2} lines left out"


@pytest.mark.parametrize(
    "line",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD + b"\r",
        '{"prompt": "one\u2028two\u0085three\x7f", "response": "x"}'.encode(),
        b'{"prompt": "\\u0000", "response": "x"}',
        b'{"prompt": "x", "response": "y", "score": NaN, "most": Infinity}',
        b'{"prompt": "x", "response": "y", "tools": null, "messages": []}',
        b'{"prompt": "x", "response": " "}',
    ],
)
def test_both_readers_take_what_is_unusual(tmp_path: Path, tokenizer: Any, line: bytes) -> None:
    source = write(tmp_path / "p.jsonl", line, b" ", GOOD)
    (first, _), (prompt, _) = read_rows(source, tokenizer, 64), read_prompts(source)
    raw = json.loads(line.decode("utf-8-sig"))
    assert prompt.prompt == raw["prompt"] and tokenizer.decode(first.prompt) == raw["prompt"]
    assert tokenizer.decode(first.ids[first.prompt_length :]) == raw["response"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (chat(USER), "user:hi"),
        (chat({"role": "assistant", "content": None, "tool_calls": [CALL]}, USER), "assistant:<add 1>user:hi"),
        (
            chat({"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}),
            "assistant:<add 1>tool:2",
        ),
        (chat({"role": "assistant", "content": "a", "tool_calls": []}, USER), "assistant:auser:hi"),
        (chat(USER, tools=[{"name": "add"}]), '[{"name": "add"}]user:hi'),
        (chat(USER, tools=[]), "user:hi"),
    ],
)
def test_chats_are_formatted_alike(tmp_path: Path, tokenizer: Any, line: dict[str, Any], text: str) -> None:
    source = write(tmp_path / "p.jsonl", line)
    [row], [prompt] = read_rows(source, tokenizer, 64), read_prompts(source)
    assert tokenizer.decode(row.prompt) == text
    assert tuple(encode_prompt(tokenizer, prompt.prompt, None, prompt.tools)) == row.prompt


def test_tools_that_no_one_reads_are_refused(tmp_path: Path, caplog) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)  # its template has no tools
    source = write(tmp_path / "p.jsonl", chat(USER, tools=[{"name": "add"}]), GOOD)
    assert len(read_rows(source, tokenizer, 64)) == 1
    assert "line 1 left out: the chat template ignores tools" in caplog.text
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(SteeringError, match="both have tools"):
        encode_prompt(tokenizer, [USER], {"tools": [{"name": "mul"}]}, [{"name": "add"}])
    with pytest.raises(SteeringError, match="the chat has half a surrogate pair"):
        encode_prompt(tokenizer, [USER | {"role": "\udc00"}])


def test_a_benchmark_leaves_out_what_the_template_refuses(tmp_path: Path, caplog) -> None:
    tools = {"prompt": [USER], "tools": [{"name": "add"}]}
    given = {"output": str(tmp_path / "out"), "target": str(TARGET), "drafters": ("plain=d",)}
    config = BenchConfig(prompts=write(tmp_path / "p.jsonl", tools, {"prompt": [USER]}), **given)
    kept, dropped, _ = run._encode(config, [])
    assert [prompt["id"] for prompt in kept] == ["line-2"]
    assert dropped[0]["id"] == "line-1" and "ignores tools" in dropped[0]["reason"]
    assert "prompt line-1 left out: the chat template ignores tools" in caplog.text
    config = BenchConfig(prompts=write(tmp_path / "p.jsonl", tools), **given)
    with pytest.raises(SteeringError, match="can be used; 1 were refused: the chat template ignores tools"):
        run._encode(config, [])


def test_a_server_gets_the_tools_of_a_prompt() -> None:
    pytest.importorskip("openai")
    asked = []

    def create(**given: Any) -> SimpleNamespace:
        asked.append(given)
        return SimpleNamespace(usage=SimpleNamespace(completion_tokens=3))

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    tools = [{"type": "function", "function": {"name": "add"}}]
    for prompt in (Prompt("a", [USER], None, tools), Prompt("b", [USER])):
        assert remote._ask(client, prompt, {"seed": 1}) == 3
    assert asked[0] == {"messages": [USER], "tools": tools, "tool_choice": "none", "seed": 1}
    assert asked[1] == {"messages": [USER], "seed": 1}
    assert "tools" in Prompt("a", [USER], None, tools).to_dict() and "tools" not in Prompt("b", [USER]).to_dict()


def test_a_flood_of_bad_lines_is_counted(tmp_path: Path, tokenizer: Any, caplog) -> None:
    source = write(tmp_path / "p.jsonl", *[b"x"] * 1000, GOOD)
    assert len(read_rows(source, tokenizer, 64)) == 1
    assert len(caplog.records) == 101 and "1000 of 1001 lines left out" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n\n", b"x\n", b"\xff\xfe\x00", None])
def test_a_file_without_rows_is_refused(tmp_path: Path, tokenizer: Any, content: bytes | None) -> None:
    path = tmp_path / "p.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SteeringError, match="cannot read|has no row with a response within 64 tokens"):
        read_rows(path, tokenizer, 64)
    with pytest.raises(SteeringError, match="cannot read .*embedded null"):
        read_rows("a\0b", tokenizer, 64)


# --- limits ----------------------------------------------------------------------------------------------------------


def rows(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"prompt_ids": [i % 500] * prompt, "response_ids": [1] * n} for i, (prompt, n) in enumerate(sizes)]


def test_rows_that_limits_take_are_counted_and_said(tmp_path: Path, tokenizer: Any, caplog) -> None:
    lines = rows(*[(10, 10)] * 6, (64, 5), (70, 5), (10, 100))
    lines += [{"prompt_ids": [1, 511], "response_ids": [512]}, {"prompt_ids": [10**30], "response_ids": [1]}]
    found, summary = read_file(write(tmp_path / "p.jsonl", *lines), tokenizer, 64)
    assert [len(row.ids) for row in found] == [20] * 6 + [64] and [row.number for row in found] == list(range(7))
    for said in (
        "2 of 11 rows left out: prompts that leave no room for a response in 64 tokens (--max-length)",
        "2 of 11 rows left out: ids outside the vocabulary",
        "1 of 11 rows cut to 64 tokens (--max-length), which takes 46 of 160 response tokens",
        "line 10 left out: response_ids: allowed are token ids from 0 to 511, found 512",
        "line 11 left out: prompt_ids: allowed are token ids from 0 to 511, found 1000000000",
        "2 of 11 lines left out",
    ):
        assert said in caplog.text
    assert "2 lines left out, the first is line 10: response_ids" in summary


def test_rows_beyond_a_models_positions_are_left_out(tmp_path: Path, tokenizer: Any, caplog) -> None:
    source = write(tmp_path / "p.jsonl", *rows((10, 22), (10, 23), (10, 100)), {"text": "x"})
    assert len(read_rows(source, tokenizer, 64, positions=(32, "D"))) == 2
    said = "2 of 4 rows left out: longer than the 32 positions of D (--max-length 32 would cut them)"
    assert said in caplog.text
    assert len(read_rows(source, tokenizer, 32, positions=(32, "D"))) == 4


def test_ids_without_an_embedding_are_left_out(tmp_path: Path, tokenizer: Any, caplog) -> None:
    source = write(tmp_path / "p.jsonl", *rows((1, 2)), {"text": "hello"}, *rows((1, 3)))
    assert len(read_rows(source, tokenizer, 64, embeddings=20)) == 2
    assert "line 2 left out: response_ids: allowed are token ids from 0 to 19" in caplog.text


@pytest.mark.parametrize(
    ("lines", "options", "complaint"),
    [
        (
            rows(*[(5, 5)] * 10, *[(70, 5)] * 190),
            {},
            "only 10 of the 200 rows .*: 190 of 200 rows left out: prompts that leave",
        ),
        (rows(*[(5, 5)] * 10, *[(5, 40)] * 11), {"positions": (32, "D")}, "only 10 of the 21 .* 32 positions of D"),
        ([*rows((5, 5)), *[{"prompt_ids": [1], "response_ids": [600]}] * 3], {}, "only 1 of the 4 .* 3 lines left out"),
        (rows(*[(60, 60)] * 20), {}, "--max-length 64 leaves 80 of the 1200 response tokens .* fewer than a tenth"),
    ],
)
def test_a_remainder_that_nobody_wants_is_refused(
    tmp_path: Path, tokenizer: Any, lines: list, options: dict, complaint: str
) -> None:
    with pytest.raises(SteeringError, match=complaint):
        read_rows(write(tmp_path / "p.jsonl", *lines), tokenizer, 64, **options)
    few = [*lines, *rows(*[(5, 5)] * 200), *rows(*[(5, 50)] * 4)]
    assert len(read_rows(write(tmp_path / "p.jsonl", *few), tokenizer, 64, **options)) >= 200


def test_the_limits_of_a_pair(tmp_path: Path) -> None:
    for name, keys in (("big", (64, 600)), ("small", (32, 512))):
        (tmp_path / name).mkdir()
        config = json.loads((TARGET / "config.json").read_text())
        config |= dict(zip(("max_position_embeddings", "vocab_size"), keys, strict=True))
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    big, small = str(tmp_path / "big"), str(tmp_path / "small")
    assert model_limits(big, small) == {"positions": (32, small), "embeddings": 512}
    assert model_limits(big) == {"positions": (64, big), "embeddings": 600}
