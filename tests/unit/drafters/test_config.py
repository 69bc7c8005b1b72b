"""config.py: every mistake in a steering config is a sentence that names the value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pairs import tiny_config
from samples import valid_config
from transformers import AutoConfig

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.models import drafter_shape, read_model_config, target_shape
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair, default_target_layers


def test_round_trip() -> None:
    config = SteeringConfig.from_dict(valid_config())
    assert SteeringConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.target_layer_ids == (1, 4, 6)
    assert (config.num_steered, config.projection_size) == (2, 20)


def test_optional_keys_have_defaults() -> None:
    config = SteeringConfig.from_dict(valid_config(rank=..., draft_length=..., provenance=..., acceptance=...))
    assert (config.rank, config.draft_length, config.provenance, config.acceptance) == (None, None, {}, {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, ["unknown key 'colour'", "allowed are", "steered_layers"]),
        ({"target__colour": 1}, ["target", "unknown key 'colour'", "vocab_size"]),
        ({"drafter": ...}, ["'drafter' is missing"]),
        ({"drafter__intermediate_size": ...}, ["drafter", "'intermediate_size' is missing"]),
        ({"format_version": 2}, ["version 2 is newer", "at most 1", "upgrade"]),
        ({"format_version": 7, "colour": 1}, ["version 7 is newer"]),  # before its unknown keys
        ({"format_version": 0}, ["format_version is 0"]),
        ({"format_version": "1"}, ["format_version is '1'"]),
        ({"target_layer_ids": [1, 4, 8]}, ["[1, 4, 8]", "0 to 7"]),
        ({"target_layer_ids": [-1, 4, 6]}, ["[-1, 4, 6]", "0 to 7"]),
        ({"target_layer_ids": [1, 6, 4]}, ["[1, 6, 4]", "ascending", "[1, 4, 6]"]),
        ({"target_layer_ids": [1, 1, 4]}, ["[1, 1, 4]", "distinct"]),
        ({"target_layer_ids": [1, 4]}, ["[1, 4]", "exactly 3"]),
        ({"target_layer_ids": [1, 4, True]}, ["True"]),
        ({"target_layer_ids": [1, 4, 6.0]}, ["6.0"]),
        ({"target_layer_ids": "1,4,6"}, ["'1,4,6'", "list"]),
        ({"steered_layers": [0, 3]}, ["steered_layers [0, 3]", "0 to 2"]),
        ({"steered_layers": []}, ["steered_layers is empty"]),
        ({"rank": 0}, ["rank is 0", "from 1 up"]),
        ({"rank": 2.5}, ["rank is 2.5"]),
        ({"rank": True}, ["rank is True"]),
        ({"draft_length": 0}, ["draft_length is 0", "from 1 up"]),
        ({"target__hidden_size": -12}, ["hidden_size is -12"]),
        ({"target__hidden_size": "12"}, ["hidden_size is '12'"]),
        ({"target__name": 3}, ["target.name is 3"]),
        ({"target": "T"}, ["target is 'T'", "object"]),
        ({"provenance": []}, ["provenance is []", "object"]),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SteeringError) as caught:
        SteeringConfig.from_dict(valid_config(**changes), "here/config.json")
    for word in ["here/config.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1', "\udcff", "[" * 100_000])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SteeringError, match="config.json"):
        SteeringConfig.read(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="cannot read .*config.json: No such file"):
        SteeringConfig.read(tmp_path / "config.json")


def test_pair_check_names_the_first_difference() -> None:
    target, drafter = tiny_config("llama", num_hidden_layers=8), tiny_config("qwen3")
    config = SteeringConfig(target_shape("T", target), drafter_shape("D", drafter), (1, 2, 3), (0,))
    check_pair(config, target, drafter)
    check_pair(config, None, None)
    for key, role, models in (
        ("hidden_size", "target", (tiny_config("llama", num_hidden_layers=8, hidden_size=96), drafter)),
        ("num_hidden_layers", "target", (tiny_config("llama"), drafter)),
        ("vocab_size", "target", (tiny_config("llama", num_hidden_layers=8, vocab_size=256), drafter)),
        ("intermediate_size", "drafter", (target, tiny_config("qwen3", intermediate_size=128))),
        ("vocab_size", "drafter", (target, tiny_config("qwen3", vocab_size=256))),
    ):
        with pytest.raises(SteeringError, match=rf"this {role} has {key}=\d+, .* trained for {key}=\d+ .*train a"):
            check_pair(config, *models)


def test_sizes_of_a_multimodal_config_are_its_text_part() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"hidden_size": 48, "num_hidden_layers": 5})
    assert (target_shape("T", config).hidden_size, target_shape("T", config).num_hidden_layers) == (48, 5)


def test_a_model_without_one_ffn_width_is_refused() -> None:
    with pytest.raises(SteeringError, match="'gpt2' has intermediate_size None"):
        drafter_shape("D", AutoConfig.for_model("gpt2"))


def test_model_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=f"cannot read the model config of {tmp_path}"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(SteeringError, match="no-such-model"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(("layers", "ids"), [(3, (0, 1, 2)), (6, (3, 4, 5)), (7, (2, 3, 4)), (28, (2, 14, 25))])
def test_default_layers(layers: int, ids: tuple[int, int, int]) -> None:
    assert default_target_layers(layers) == ids


def test_default_layers_need_three() -> None:
    with pytest.raises(SteeringError, match="2 layers"):
        default_target_layers(2)
