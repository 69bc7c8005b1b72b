"""tokenizer.py: what makes two tokenizers the same, whose is used, and that train and doctor say the same of a pair."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from tokenizers import AddedToken
from transformers import AutoTokenizer

from vllm_steer.common.errors import SteeringError
from vllm_steer.data.prompts import encode_prompt
from vllm_steer.drafters.tokenizer import compare_tokenizers, load_tokenizer, read_tokenizer

TARGET = ROOT / "examples/tiny_pair/target"
CHAT = [{"role": "user", "content": "hello there"}]
END = "<|endoftext|>"


def processed(single: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """An edit of tokenizer.json: what is put around a text."""

    def edit(raw: dict[str, Any]) -> None:
        special = {END: {"id": END, "ids": [0], "tokens": [END]}}
        pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special,
        }

    return edit


def half_the_merges(raw: dict[str, Any]) -> None:
    raw["model"]["merges"] = raw["model"]["merges"][: len(raw["model"]["merges"]) // 2]


def without_the_last_merge(raw: dict[str, Any]) -> None:
    raw["model"]["merges"].pop()


def normalized(raw: dict[str, Any]) -> None:
    raw["normalizer"] = {"type": "NFKC"}


def lowercased(raw: dict[str, Any]) -> None:
    raw["normalizer"] = {"type": "Lowercase"}


def stripped(raw: dict[str, Any]) -> None:
    """The special token swallows the spaces beside it."""
    raw["added_tokens"][0] |= {"lstrip": True, "rstrip": True}


TEXT, SPECIAL = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}
ENCODINGS = {
    "BOS": processed([SPECIAL, TEXT]),
    "EOS": processed([TEXT, SPECIAL]),
    "half the merges": half_the_merges,
    "one merge": without_the_last_merge,
    "NFKC": normalized,
    "lowercase": lowercased,
    "stripped": stripped,
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Two directories with the tiny pair's tokenizer."""
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TARGET / file, tmp_path / name)
    return str(tmp_path / "target"), str(tmp_path / "drafter")


def edit(directory: str, change: Callable[[dict[str, Any]], None], name: str = "tokenizer.json") -> None:
    path = Path(directory) / name
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("side", [0, 1])
def test_another_encoding_with_the_same_vocabulary_is_refused(pair: tuple[str, str], name: str, side: int) -> None:
    assert compare_tokenizers(*pair)[1] == []
    edit(pair[side], ENCODINGS[name])
    assert AutoTokenizer.from_pretrained(pair[0]).get_vocab() == AutoTokenizer.from_pretrained(pair[1]).get_vocab()
    around = "with special tokens around it " if name in ("BOS", "EOS") else ""
    with pytest.raises(SteeringError, match=rf"differ: .* {around}is \[.*\] in one and \[.*\] in the other; specul"):
        load_tokenizer(*pair)


def test_an_added_token_is_refused(pair: tuple[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    tokenizer.add_tokens([AddedToken("<think>")])
    tokenizer.save_pretrained(pair[1])
    with pytest.raises(SteeringError, match="token '<think>' is None in one and 512 in the other"):
        load_tokenizer(*pair)


def test_settings_are_named_and_the_targets_tokenizer_is_used(pair: tuple[str, str], caplog) -> None:
    target, drafter = (Path(name) / "chat_template.jinja" for name in pair)
    target.write_text("{% for m in messages %}T:{{ m.content }}{% endfor %}")
    drafter.write_text("{% for m in messages %}D:{{ m.content }}{% endfor %}")
    edit(pair[1], lambda raw: raw.update(eos_token=None), "tokenizer_config.json")
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(*pair)
    assert tokenizer.decode(encode_prompt(tokenizer, CHAT)) == "T:hello there"
    assert tokenizer.eos_token == END
    for said in (f"eos_token is {END!r} in the target's and None in", "the chat templates differ"):
        assert said in caplog.text
    drafter.unlink()
    assert "only the target has a chat template, which training" in compare_tokenizers(*pair)[1][-1]
    drafter.write_text("x")
    target.unlink()
    tokenizer, differences = compare_tokenizers(*pair)
    assert "only the drafter has a chat template, which is never used" in differences[-1]
    with pytest.raises(SteeringError, match="has no chat template: give prompts of plain text"):
        encode_prompt(tokenizer, CHAT)


def test_a_tokenizer_without_a_token_for_a_text_can_be_compared(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    for name, words in (("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["y", "x"])):
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path / name)
    assert compare_tokenizers(str(tmp_path / "a"), str(tmp_path / "b"))[1] == []
    with pytest.raises(SteeringError, match="token 'x' is 0 in one and 1 in the other"):
        compare_tokenizers(str(tmp_path / "a"), str(tmp_path / "c"))


@pytest.mark.parametrize("content", ["", "[]", '{"model": {}}', "[" * 10_000])
def test_a_damaged_tokenizer_is_named(pair: tuple[str, str], content: str) -> None:
    (Path(pair[1]) / "tokenizer.json").write_text(content)
    with pytest.raises(SteeringError, match=r"cannot load the tokenizer of .*/drafter \("):
        load_tokenizer(*pair)
    with pytest.raises(SteeringError, match=r"cannot load the tokenizer of \./nowhere \("):
        read_tokenizer("./nowhere")
