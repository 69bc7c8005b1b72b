"""Block drafters on disk and in torch: published layouts, damage, the bigram, DSpark's factors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import DFLASH, TARGET, TREEFLASH, make_block, make_ngram
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.block import checkpoint, dspark, ngram
from vllm_steer.drafters.block.config import BlockConfig, is_block_drafter, kind_of
from vllm_steer.drafters.block.modules import Approximator

PUBLISHED = {  # the keys of z-lab's and of TreeFlash's config.json, with tiny sizes
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 16,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_types": ["full_attention"] * 2,
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 32,
}
LAYER = (
    *(f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
)
DFLASH_KEYS = {"fc.weight", "hidden_norm.weight", "norm.weight", *(f"layers.{i}.{k}" for i in (0, 1) for k in LAYER)}


def published(directory: Path, prefix: str = "", **config: Any) -> Path:
    """A directory of the published layout, and nothing of this project's."""
    directory.mkdir()
    raw = PUBLISHED | config
    (directory / "config.json").write_text(json.dumps(raw))
    wide = {"fc.weight": (64, 5 * 64), "hidden_norm.weight": (64,), "norm.weight": (64,)}
    heads = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64), "q_norm": (32,)}
    heads |= {"k_norm": (32,), "gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    for key in DFLASH_KEYS - wide.keys():
        part = key.split(".")[-2]
        wide[key] = heads.get(part, (64,))
    weights = {prefix + key: torch.randn(shape).bfloat16() for key, shape in wide.items()}
    if prefix:
        weights |= {
            "ar_approximation.ug.weight": torch.randn(192, 128).bfloat16(),
            "ar_approximation.ug.bias": torch.randn(192).bfloat16(),
            "ar_approximation.d.weight": torch.randn(64, 96).bfloat16(),
            "ar_approximation.norm.weight": torch.randn(64).bfloat16(),
        }
    save_file(weights, directory / "model.safetensors")
    return directory


def copy(source: Path, directory: Path) -> Path:
    return Path(shutil.copytree(source, directory))


def edit(directory: Path, file: str = "config.json", **changes: Any) -> None:
    path = directory / file
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (raw | changes).items() if v is not None}))


@pytest.mark.parametrize("name", ["TreeFlashDraftModel", "DFlashTreeFlashDraftModel"])
def test_a_published_treeflash_loads_from_its_files_alone(tmp_path: Path, name: str) -> None:
    where = published(
        tmp_path / "a",
        "model.",
        architectures=[name],
        treeflash_config={"ar_approximation": "swiglu", "candidate_tokens": 16},
    )
    drafter = checkpoint.load(where)
    assert set(checkpoint.file_tensors(drafter)) == set(load_file(where / "model.safetensors"))
    assert (drafter.config.kind, drafter.config.draft_length, drafter.config.states) == (
        "treeflash",
        15,
        (2, 10, 18, 26, 34),
    )
    assert checkpoint.read_record(where) is None


def test_a_published_dflash_loads_in_shards_with_what_vllm_ignores(tmp_path: Path) -> None:
    where = published(tmp_path / "a")
    weights = load_file(where / "model.safetensors")
    (where / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({k: weights[k] for k in names[:9]}, where / "model-00001-of-00002.safetensors")
    rest = {k: weights[k] for k in names[9:]} | {"embed_tokens.weight": torch.zeros(32, 64)}
    save_file(rest, where / "model-00002-of-00002.safetensors")
    files = {k: f"model-0000{1 if k in names[:9] else 2}-of-00002.safetensors" for k in names}
    (where / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert set(checkpoint.file_tensors(checkpoint.load(where))) == DFLASH_KEYS


@pytest.mark.parametrize("shared", [True, False])
def test_medusa_heads_under_their_first_names(tmp_path: Path, shared: bool) -> None:
    where = make_block(tmp_path / "a", TARGET, "medusa", k=3)
    weights = load_file(where / "model.safetensors")
    shutil.rmtree(where / "record")
    head = weights.pop("lm_heads.0.weight")
    old = {f"medusa_heads.{k.split('.')[1]}.0.linear.weight": v for k, v in weights.items()}
    count = 1 if shared else 3
    old |= {f"medusa_heads.{i}.1.weight": head * (i + 1) for i in range(count)}
    save_file(old, where / "model.safetensors")
    if not shared:
        edit(where, original_lm_head=False)
    drafter = checkpoint.load(where)
    x = torch.randn(2, 256)
    found = drafter.head(lambda _: None, 2)(x)
    torch.testing.assert_close(found, x @ (head.float() * (1 if shared else 3)).T)


def test_an_untrained_approximator_changes_nothing() -> None:
    assert not Approximator(8, 16)(torch.randn(3, 8), torch.randn(3, 8)).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "allowed for a block drafter is one of DFlashDraftModel"),
        ({"block_size": 0}, "block_size is 0, allowed is a whole number from 1 up"),
        ({"hidden_size": "256"}, "hidden_size is '256'"),
        ({"dflash_config": {"mask_token_id": 0}}, "dflash_config has no target_layer_ids"),
        (
            {"dflash_config": {"mask_token_id": 512, "target_layer_ids": [0]}},
            "mask_token_id is 512, allowed is 0 to 511",
        ),
        ({"dflash_config": {"mask_token_id": 0, "target_layer_ids": []}}, "target_layer_ids is []"),
        ({"treeflash_config": {"ar_approximation": "other"}}, "ar_approximation is 'other', known is 'swiglu'"),
        ({"is_causal": True}, "causal blocks are vLLM's own"),
        ({"num_attention_heads": "many"}, "does not describe Qwen3 layers"),
        ({"intermediate_size": 100}, "has shape"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    where = copy(TREEFLASH, tmp_path / "a")
    edit(where, **changes)
    with pytest.raises(SteeringError, match=None) as error:
        checkpoint.load(where)
    assert words in str(error.value)


def test_of_another_target(tmp_path: Path) -> None:
    target = AutoConfig.from_pretrained(TARGET)
    config = BlockConfig.read(DFLASH)
    config.check_target(target)
    for changes, words in (
        ({"num_target_layers": 5}, "made for a target of 5 layers, this one has 4"),
        ({"vocab_size": 513}, "vocab_size is 513, the target's is 512"),
        (
            {"dflash_config": {"mask_token_id": 0, "target_layer_ids": [1, 2, 3]}},
            "allowed for a target of 4 layers is 0 to 2: DFlash counts the outputs of layers, vLLM's ids are one more",
        ),
    ):
        with pytest.raises(SteeringError) as error:
            BlockConfig.of(config.raw | changes, "it").check_target(target)
        assert words in str(error.value)


def test_damage_is_refused(tmp_path: Path) -> None:
    def refused(change: Any, words: str, source: Path = DFLASH) -> None:
        where = copy(source, tmp_path / f"d{len(list(tmp_path.iterdir()))}")
        change(where)
        with pytest.raises(SteeringError) as error:
            checkpoint.load(where)
            ngram.load(where)
        assert words in str(error.value), error.value

    def weights(change: Any) -> Any:
        def edited(where: Path) -> None:
            found = load_file(where / "model.safetensors")
            change(found)
            save_file(found, where / "model.safetensors")

        return edited

    def cut(file: str, share: float = 0.5) -> Any:
        def edited(where: Path) -> None:
            data = (where / file).read_bytes()
            (where / file).write_bytes(data[: int(len(data) * share)])

        return edited

    refused(cut("model.safetensors"), "is damaged")
    refused(cut("config.json"), "is damaged")
    refused(cut("record/config.json"), "is damaged")
    refused(cut("record/golden.safetensors"), "is truncated or not a safetensors file")
    refused(cut("ngram/model.safetensors"), "is truncated or not a safetensors file")
    refused(cut("ngram/config.json"), "missing or damaged")
    refused(lambda d: (d / "model.safetensors").unlink(), "no weights")
    refused(lambda d: (d / "ngram" / "model.safetensors").unlink(), "is missing")
    refused(lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "is a pickle")
    refused(weights(lambda w: w.pop("fc.weight")), "tensor 'fc.weight' is missing")
    refused(weights(lambda w: w.update(more=torch.zeros(1))), "unknown tensor 'more'")
    refused(
        weights(lambda w: w.update({"norm.weight": torch.full((256,), torch.nan)})), "is no tensor of finite floats"
    )
    refused(weights(lambda w: w.update({"norm.weight": w["norm.weight"] * 2})), "differ from the recorded ones")
    refused(weights(lambda w: w["ar_approximation.d.weight"].mul_(2)), "differ from the recorded ones", TREEFLASH)
    refused(lambda d: edit(d, "ngram/config.json", alpha=11), "alpha is 11, allowed is a number from 0 to 10")
    refused(lambda d: edit(d, "ngram/config.json", other=1), "unknown keys ['other']")
    refused(lambda d: edit(d, "ngram/config.json", alpha=None), "is not complete")
    refused(lambda d: edit(d, "ngram/config.json", successors=15), "has shape")
    refused(lambda d: edit(d, "ngram/config.json", format_version=2), "upgrade vllm-steer")
    refused(lambda d: edit(d, "record/config.json", format_version=2), "upgrade vllm-steer")


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    where = copy(DFLASH, tmp_path / "a")
    (where / "model.safetensors").unlink()
    (where / "model.safetensors").symlink_to(DFLASH / "model.safetensors")
    with pytest.raises(SteeringError, match="is a link out of"):
        checkpoint.load(where)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    first = checkpoint.load(TREEFLASH, torch.bfloat16)
    record = checkpoint.read_record(TREEFLASH)
    assert record is not None
    checkpoint.save(tmp_path / "a", first, record)
    for name in ("model.safetensors", "record/golden.safetensors"):
        old, new = load_file(TREEFLASH / name), load_file(tmp_path / "a" / name)
        assert old.keys() == new.keys()
        for key in old:
            torch.testing.assert_close(old[key], new[key])


def test_which_directories_hold_one(tmp_path: Path) -> None:
    assert is_block_drafter(DFLASH) and is_block_drafter(TREEFLASH)
    assert not is_block_drafter(TARGET) and not is_block_drafter(tmp_path)
    assert kind_of({"architectures": "DFlashDraftModel"}) is None


# --- the bigram -------------------------------------------------------------------------------------------------------


def test_a_bigram_is_counted_by_hand() -> None:
    config = ngram.NgramConfig(vocab_size=4, successors=2, alpha=1, alpha_sampled=1)
    found = ngram.count([[0, 1, 0, 1, 0, 2, 0, 3], [0, 1]], config)  # after 0: 1 three times, 2 and 3 once
    table = found.dense().exp()
    smooth, total = ngram.SMOOTHING, 5 + 4 * ngram.SMOOTHING
    torch.testing.assert_close(table[0], torch.tensor([smooth, 3 + smooth, 1 + smooth, smooth]) / total)
    torch.testing.assert_close(table[1], torch.tensor([2 + smooth, smooth, smooth, smooth]) / (2 + 4 * smooth))
    torch.testing.assert_close(table[3], torch.full((4,), 0.25))  # never seen: nothing is known


def test_a_bigram_saved_and_loaded_again(tmp_path: Path) -> None:
    make_ngram(tmp_path, 32)
    found = ngram.load(tmp_path)
    again = tmp_path / "again"
    found.save(again)
    torch.testing.assert_close(ngram.load(again).dense(), found.dense(), atol=1e-2, rtol=1e-3)
    with pytest.raises(SteeringError, match="cannot be written"):
        found.save(again)


def test_dspark_factors_give_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ngram.load(make_ngram(tmp_path, 32, alpha=0.5))
    w1, w2 = dspark.factors(table, 32)
    torch.testing.assert_close(w1 @ w2.T, 0.5 * table.dense(), atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(dspark, "EXACT_UP_TO", 0)
    w1, w2 = dspark.factors(table, 32)
    found, wanted = w1 @ w2.T, 0.5 * (table.dense() - table.floor[:, None])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_dspark_is_made_of_dflash_alone(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="is a treeflash drafter"):
        dspark.export(TREEFLASH, ngram.load(DFLASH), tmp_path / "a")
