"""Training: losses against float64, guide offsets by perturbation, what each mode may change, resume, bad input."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import Size, tiny_config, tiny_model
from repository import ROOT
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.provenance import fingerprint
from vllm_steer.data import split
from vllm_steer.data.dataset import Row, collate, read_rows
from vllm_steer.data.response_file import meta_path
from vllm_steer.data.split import in_file_order, split_rows
from vllm_steer.decoding.chain import generate
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.drafters.tokenizer import load_tokenizer
from vllm_steer.training import config as run_config
from vllm_steer.training import losses, record, trainer, writing
from vllm_steer.training.acceptance import fixed_sources, measure_directory, walk
from vllm_steer.training.batches import read_data
from vllm_steer.training.config import MODES, TrainConfig
from vllm_steer.training.pair import Head, Pair, guide_sources, lazy_deltas, response_mask

GUIDE_SOURCES = "vllm_steer.training.pair.guide_sources"

VOCAB = 40
PAIR = ROOT / "examples/tiny_pair"
MODELS = ("target", "drafter")


def make_tokenizer(words: list[str]) -> object:
    """One token per word; id 0 ends a sequence. The chat template joins contents."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<e>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target/, drafter/ (random weights, one tokenizer) and data.jsonl with 24 rows of random tokens."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("toy")
    tokenizer = make_tokenizer([f"w{i}" for i in range(1, VOCAB)])
    for name, size in (("target", Size(64, 3, 96)), ("drafter", Size(32, 2, 48))):
        AutoModelForCausalLM.from_config(tiny_config("qwen3", size, VOCAB)).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    rows = torch.randint(1, VOCAB, (24, 20)).tolist()
    lines = [json.dumps({"prompt_ids": row[:6], "response_ids": row[6:]}) for row in rows]
    (path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return path


def options(folder: Path, output: Path, **changes) -> TrainConfig:
    base = dict(steps=2, batch_size=4, lr=1e-2, drafter_lr=1e-2, k=3, target_layers=(0, 1, 2))
    base |= dict(target=str(folder / "target"), drafter=str(folder / "drafter"), data=(str(folder / "data.jsonl"),))
    return TrainConfig(output=str(output), **(base | changes))


def toy_steering(folder: Path, layers: tuple[int, ...] = (0, 1)) -> Steering:
    """Random weights everywhere, so that every state shows in every delta."""
    configs = [AutoModelForCausalLM.from_pretrained(folder / name).config for name in ("target", "drafter")]
    steering = Steering(SteeringConfig.for_models(*configs, target_layer_ids=(0, 1, 2), steered_layers=layers))
    torch.nn.init.normal_(steering.project.weight)
    return steering


def weights(directory: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_match_float64_on_a_padded_vocabulary(dtype: torch.dtype) -> None:
    target, drafter = (5 * torch.randn(3, 4, n, generator=torch.Generator().manual_seed(n)) for n in (11, 13))
    target, drafter = target.to(dtype), drafter.to(dtype)
    p, q = (x[..., :11].double().softmax(-1) for x in (target, drafter))
    expected = {
        losses.forward_kl: (p * (p / q).log()).sum(-1),
        losses.reverse_kl: (q * (q / p).log()).sum(-1),
        losses.total_variation: (p - q).abs().sum(-1) / 2,
        losses.overlap: torch.minimum(p, q).sum(-1),
        losses.rejection: -torch.minimum(p, q).sum(-1).log(),
        losses.jensen_shannon: ((p * (2 * p / (p + q)).log()).sum(-1) + (q * (2 * q / (p + q)).log()).sum(-1)) / 2,
        losses.agreement: (p.argmax(-1) == q.argmax(-1)).double(),
    }
    for function, value in expected.items():
        found = function(target, drafter)
        assert found.dtype == torch.float32 and found.shape == (3, 4)
        torch.testing.assert_close(found.double(), value, atol=1e-5, rtol=1e-5)


def test_a_distribution_is_at_distance_zero_from_itself() -> None:
    logits = torch.randn(5, 9)
    for function in losses.LOSSES.values():
        torch.testing.assert_close(function(logits, logits), torch.zeros(5))
    assert losses.agreement(logits, logits).eq(1).all()


@pytest.mark.parametrize("name", list(losses.LOSSES))
def test_a_loss_in_chunks_has_the_value_and_gradient_of_one_in_float64(name: str, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    final, hidden, big, small = draw(23, 6), draw(23, 5), draw(6, 11), draw(5, 13)
    widest = []

    def head(matrix: Tensor, x: Tensor) -> Tensor:
        widest.append(x.shape[0] * matrix.shape[1])
        return x @ matrix

    def total(dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        monkeypatch.setattr(losses, "CHUNK", chunk)
        f, h, b, s = (x.to(dtype).requires_grad_() for x in (final, hidden, big, small))
        heads = (lambda x: head(b, x)), (lambda x: head(s, x))
        (values,) = losses.by_position([losses.LOSSES[name]], *heads, f, h, 13)
        value = values.sum()
        value.backward()
        assert b.grad is None, "the target does not train"
        return value.detach(), h.grad, s.grad

    monkeypatch.setattr(losses, "_log_probs", lambda p, q: (p[..., :11].log_softmax(-1), q[..., :11].log_softmax(-1)))
    expected = total(torch.float64, 10**6)
    monkeypatch.undo()
    widest.clear()
    found = total(torch.float32, 4 * 13)
    assert max(widest) <= 4 * 13, "no more logits at a time than a chunk holds"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_head_ends_like_its_own_model(family: str) -> None:
    """Granite scales its logits and Gemma 2 caps them, after the linear layer."""
    model = tiny_model(family)
    ids = torch.randint(1, 40, (1, 9))
    with torch.no_grad():
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(Head(model)(hidden[0]), model(ids, use_cache=False).logits[0])
        model(ids)  # the decoder is back


# --- which state steers which position ----------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 2, 5, 40])
def test_a_delta_depends_on_the_state_offset_positions_back_and_on_no_other(folder: Path, offset: int) -> None:
    steering, prompts = toy_steering(folder), torch.tensor([4, 0])
    states = torch.randn(2, 12, 3 * 64)

    def deltas(states: Tensor) -> Tensor:
        lazy = lazy_deltas(steering, states, fixed_sources(prompts, 12, offset))
        return torch.stack([lazy(slot) for slot in (0, 1)], dim=2)

    with torch.no_grad():
        before = deltas(states)
        for row, prompt in enumerate(prompts.tolist()):
            for t in range(12):
                if t >= prompt and t >= offset:
                    torch.testing.assert_close(before[row, t], steering(states[row, t - offset]))
                else:
                    assert not before[row, t].any(), "prompt and positions without a guide are unsteered"
        for s in range(12):
            other = states.clone()
            other[:, s] += 1 + torch.randn(3 * 64)
            changed = (deltas(other) - before).abs().amax((2, 3)) > 1e-5
            expected = torch.zeros(2, 12, dtype=torch.bool)
            if s + offset < 12:
                expected[:, s + offset] = s + offset >= prompts
            assert torch.equal(changed, expected)


def test_the_drafter_sees_a_state_from_its_position_plus_offset_on(folder: Path) -> None:
    target, drafter = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("target", "drafter"))
    pair = Pair(drafter, toy_steering(folder), target, losses.total_variation).eval()
    batch = collate([Row(tuple(range(1, 13)), 4), Row(tuple(range(3, 12)), 2)])
    mask = response_mask(batch)
    assert mask[1].tolist() == [False] * 2 + [True] * 7 + [False] * 3
    states, source = torch.randn(2, 12, 3 * 64), fixed_sources(batch["prompt_lengths"], 12, 2)
    other = states.clone()
    other[:, 5] += torch.randn(3 * 64)
    with torch.no_grad():
        first, second = (pair.hidden(batch | {"states": s}, source) for s in (states, other))
    changed = torch.zeros(2, 12, dtype=torch.bool)
    changed[mask] = (first - second).abs().amax(-1) > 1e-6
    assert not changed[:, :7].any() and changed[0, 7:].all() and changed[1, 7:9].all()


@pytest.mark.parametrize("rule", ["batch", "sequence", "block"])
def test_distances_of_every_rule(rule: str) -> None:
    """1..k all occur; one per batch, one per row, or counting up inside blocks of k. The same seed gives the same."""
    prompts, length, k = torch.tensor([4, 9]), 24, 4
    draw = lambda seed: guide_sources(rule, prompts, length, k, random.Random(seed))  # noqa: E731
    seen = set()
    for seed in range(40):
        source = draw(seed)
        assert torch.equal(source, draw(seed))
        for row, prompt in enumerate(prompts.tolist()):
            assert source[row, :prompt].eq(-1).all()
            distance = (torch.arange(length) - source[row])[prompt:].tolist()
            seen |= set(distance)
            if rule == "block":
                assert all(b == a % k + 1 for a, b in itertools.pairwise(distance))
            else:
                assert len(set(distance)) == 1
        if rule == "batch":
            assert 4 - source[0, 4] == 9 - source[1, 9]
    assert seen == {1, 2, 3, 4}
    if rule == "sequence":
        assert any(4 - draw(seed)[0, 4] != 9 - draw(seed)[1, 9] for seed in range(9))


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(MODES))
def test_a_mode_changes_what_it_names_and_nothing_else(folder: Path, tmp_path: Path, mode: str, monkeypatch) -> None:
    seen, save = {}, writing.write

    def spy(config, pair, *rest):
        save(config, pair, *rest)
        seen["drafter"] = pair.drafter.state_dict()

    monkeypatch.setattr(writing, "write", spy)
    trainer.train(options(folder, tmp_path / "out", mode=mode))
    plain = weights(folder / "drafter")
    same = [torch.equal(plain[name], tensor.cpu()) for name, tensor in seen["drafter"].items()]
    assert all(same) if mode == "steer" else not any(same)
    assert checkpoint.has_steering(tmp_path / "out") == (mode != "distill")
    assert (tmp_path / "out" / "model.safetensors").exists() == (mode != "steer")
    assert not (tmp_path / "out" / "checkpoints").exists()
    if mode == "steer":
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["acceptance.json", "steering", "training.png"]
    else:  # loads as an ordinary model, under its own parameter names
        assert weights(tmp_path / "out").keys() == plain.keys()
        AutoTokenizer.from_pretrained(tmp_path / "out")
    if mode != "distill":
        assert checkpoint.load(tmp_path / "out").output.weight.any()


def test_no_steps_give_the_plain_drafter(folder: Path, tmp_path: Path) -> None:
    acceptance = trainer.train(options(folder, tmp_path / "out", steps=0))
    steering = checkpoint.load(tmp_path / "out")
    assert not steering(torch.randn(5, 3 * 64)).any()
    assert acceptance["trained"] == acceptance["untrained"] == steering.config.acceptance["trained"]
    plain = weights(folder / "drafter")
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights(tmp_path / "out").items())


def test_training_accepts_more_and_records_how(folder: Path, tmp_path: Path) -> None:
    acceptance = trainer.train(options(folder, tmp_path / "out", steps=40))
    trained, untrained = acceptance["trained"], acceptance["untrained"]
    assert min(trained["overlap"]) > max(untrained["overlap"]) + 0.02
    assert len(trained["agreement"]) == 3 and trained["positions"] == 14
    record = checkpoint.load(tmp_path / "out").config
    assert record.draft_length == 3 and record.provenance["data_sha256"]
    assert "--steps 40" in record.provenance["command"] and "--mode joint" in record.provenance["command"]
    assert str(folder) not in json.dumps(record.to_dict()), "no machine's paths in a checkpoint"


def test_what_a_run_takes_is_said_before_it_and_changes_nothing(
    folder: Path, tmp_path: Path, caplog, monkeypatch
) -> None:
    given = {"steps": 3, "save_every": 3}
    with caplog.at_level("INFO", "vllm_steer"):
        trainer.train(options(folder, tmp_path / "said", **given))
    assert re.search(r"about [\d,]+ tokens/s in each process: 3 steps and their evaluations take \d+ s", caplog.text)
    monkeypatch.setattr(trainer, "forecast", lambda *_: "nothing was timed")
    trainer.train(options(folder, tmp_path / "silent", **given))
    said, silent = (load_file(tmp_path / name / "steering/model.safetensors") for name in ("said", "silent"))
    assert said.keys() == silent.keys() and all(torch.equal(said[name], silent[name]) for name in said)


def test_a_control_stands_beside_what_is_trained(folder: Path, tmp_path: Path) -> None:
    """The distilled drafter of the same data, also when only upper layers are steered from a cached trunk."""
    distilled = trainer.train(options(folder, tmp_path / "distilled", mode="distill"))
    given = dict(mode="steer", steered_layers=(1,), cache=str(tmp_path / "cache"), control=str(tmp_path / "distilled"))
    found = trainer.train(options(folder, tmp_path / "adapter", **given))
    assert found["control"] == {"drafter": "distilled"} | distilled["trained"]
    assert distilled["trained"]["overlap"] != found["untrained"]["overlap"] == distilled["untrained"]["overlap"]
    assert json.loads((tmp_path / "adapter/acceptance.json").read_text()) == found
    with pytest.raises(SteeringError, match="nowhere"):
        trainer.train(options(folder, tmp_path / "other", control=str(tmp_path / "nowhere")))


def test_what_is_measured_is_what_is_stored(folder: Path, tmp_path: Path) -> None:
    """An adapter from bfloat16 weights, merged and read back, predicts the same acceptance."""
    for name in ("target", "drafter"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_bytes((folder / "data.jsonl").read_bytes())
    trained = trainer.train(options(tmp_path, tmp_path / "adapter", mode="steer", lr=0.1, steps=5))["trained"]
    merged = checkpoint.merge_adapter(tmp_path / "adapter", tmp_path / "drafter", tmp_path / "full")
    _, [held] = read_data(options(folder, tmp_path / "new"), AutoTokenizer.from_pretrained(folder / "target"))
    (tmp_path / "held.jsonl").write_text((folder / "data.jsonl").read_text().splitlines()[held.number])
    assert measure_directory(tmp_path / "target", merged, merged, tmp_path / "held.jsonl", 3) == trained
    plain = measure_directory(tmp_path / "target", merged, tmp_path, tmp_path / "held.jsonl", 3)
    assert len(set(plain["overlap"])) == 1 and plain["overlap"] != trained["overlap"]


@pytest.mark.parametrize(
    ("chances", "expected"),
    [
        ([[1, 1, 1, 1, 1, 1]] * 2, (6, 2)),  # newest at 1: drafts 1 and 2, bonus; at 4: drafts 4 and 5
        ([[0, 0, 0, 0, 0, 0]] * 2, (4, 4)),  # newest at 1, 2, 3, 4; no whole block fits at 5
        ([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], (4, 2)),  # at 1 and 3: one draft and the target's own
        ([[0.5] * 6] * 2, (1.75 * 2.625, 2.625)),  # blocks at 1, 2, 3, 4: 1 + 1/2 + 1/2 + 5/8 of them
        ([[1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], (4, 2)),  # at 1: draft 1 a hit, draft 2 at its second place a miss
    ],
)
def test_blocks_walked_by_hand(chances: list, expected: tuple[float, float]) -> None:
    """Prompt of one token, row of six, k=2. A block at n drafts at n and n + 1."""
    assert walk(torch.tensor(chances, dtype=torch.float64)[:, None], [1], [6]) == pytest.approx(expected)


def test_a_prediction_on_the_targets_own_greedy_text_is_what_the_reference_loop_does(tmp_path: Path) -> None:
    """Whole blocks, plain drafter: nothing is approximate there."""
    target, drafter = (AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32) for name in MODELS)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    lines, blocks, tokens = [], 0, 0
    for line in (PAIR / "heldout.jsonl").read_text().splitlines()[:6]:
        prompt = tokenizer(json.loads(line)["prompt"])["input_ids"]
        found = generate(target, drafter, prompt, k=5, max_new_tokens=48, eos_token_ids=())
        lines.append(json.dumps({"prompt_ids": prompt, "response_ids": found.tokens}) + "\n")
        whole = [b for b in found.blocks if b.position + 5 <= len(prompt) + len(found.tokens)]
        blocks, tokens = blocks + len(whole), tokens + sum(b.accepted + 1 for b in whole)
    (tmp_path / "own.jsonl").write_text("".join(lines))
    predicted = measure_directory(PAIR / "target", PAIR / "drafter", PAIR / "drafter", tmp_path / "own.jsonl", 5)
    assert blocks > 40 and predicted["acceptance_length"]["greedy"] == round(tokens / blocks, 3)


def test_responses_shorter_than_a_block_are_refused(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1, 2, 3, 4, 5, 6 + i], "response_ids": [1, 2]} for i in range(4)]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SteeringError, match="no held-out response has 3 tokens"):
        trainer.train(options(folder, tmp_path / "out", data=(str(tmp_path / "short.jsonl"),)))


@pytest.mark.parametrize("torn", [False, True])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    folder: Path, tmp_path: Path, torn: bool, monkeypatch
) -> None:
    run = dict(steps=6, save_every=2)
    trainer.train(options(folder, tmp_path / "whole", **run))
    calls, distance = [], losses.LOSSES["jsd"]

    def stopping(*logits):
        calls.append(1)
        if len(calls) > 7:  # two of them were for the forecast
            raise KeyboardInterrupt
        return distance(*logits)

    def kill_amid_a_save() -> None:
        newest = tmp_path / "parts" / "checkpoints" / "checkpoint-4"
        (newest / "trainer_state.json").unlink()
        (newest / "optimizer.pt").write_bytes(b"torn")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(losses.LOSSES, "jsd", stopping)
        trainer.train(options(folder, tmp_path / "parts", **run))
    if torn:
        kill_amid_a_save()
    trainer.train(options(folder, tmp_path / "parts", resume=True, **run))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    states = torch.randn(4, 3 * 64)
    assert torch.equal(checkpoint.load(tmp_path / "whole")(states), checkpoint.load(tmp_path / "parts")(states))


def same_weights(one: Path, other: Path, **tolerance: float) -> None:
    a, b = weights(one), weights(other)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance)
    states = torch.randn(4, 3 * 64)
    torch.testing.assert_close(checkpoint.load(one)(states), checkpoint.load(other)(states), **tolerance)


MIXED = (3, 14, 5, 9, 2, 11, 7, 13)  # tokens of the responses


def mixed_lengths(path: Path) -> Path:
    """One prompt to hold out, and rows whose responses differ in length."""
    rows = torch.randint(1, VOCAB, (1 + len(MIXED), 24), generator=torch.Generator().manual_seed(3)).tolist()
    lengths = (14, *MIXED)
    lines = [{"prompt_ids": r[:6], "response_ids": r[6 : 6 + n]} for r, n in zip(rows, lengths, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def first_gradients(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> list[Tensor]:
    """Of the first optimiser step, as the optimiser sees them but for clipping."""
    seen: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.split, "split_of_run", None)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(1.0))

        def step(self: torch.optim.AdamW, closure: object = None) -> None:
            seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"])

        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(GUIDE_SOURCES, lambda rule, prompts, n, *_: fixed_sources(prompts, n, 2))
        trainer.train(config)
    return seen


def test_every_position_of_a_step_weighs_the_same(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """8 rows of mixed lengths as one batch, as 2 x 4 and as 8 x 1: one gradient."""
    data = mixed_lengths(tmp_path / "mixed.jsonl")
    run = dict(data=(str(data),), steps=1, keep="last")
    shapes = {"whole": (8, 1), "halves": (4, 2), "single": (1, 8)}
    found = {
        name: first_gradients(monkeypatch, options(folder, tmp_path / name, **run, batch_size=b, accumulate=a))
        for name, (b, a) in shapes.items()
    }
    assert len(found["whole"]) > 10
    for name in ("halves", "single"):
        for got, wanted in zip(found[name], found["whole"], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_accumulated_and_checkpointed_steps_are_ordinary_steps(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """One offset for all rows, so that two halves of a batch make the same gradient as the whole."""
    monkeypatch.setattr(GUIDE_SOURCES, lambda rule, prompts, n, *_: fixed_sources(prompts, n, 2))
    run = dict(steps=3, lr=1e-3, drafter_lr=1e-3)
    trainer.train(options(folder, tmp_path / "whole", **run))
    trainer.train(options(folder, tmp_path / "halves", **run, batch_size=2, accumulate=2))
    trainer.train(options(folder, tmp_path / "again", **run, gradient_checkpointing=True))
    same_weights(tmp_path / "whole", tmp_path / "halves", atol=2e-4, rtol=1e-3)
    same_weights(tmp_path / "whole", tmp_path / "again", atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_evaluation_or_the_last_is_kept(folder: Path, tmp_path: Path, keep: str, monkeypatch) -> None:
    """Evaluations that say step 2 of 4 was best."""
    lengths = iter([1.0, 3.0, 2.0, 2.0, 2.0])

    def judged(*_: object) -> dict:
        value = next(lengths)
        return {"overlap": [value], "agreement": [value], "acceptance_length": {"sampled": value, "greedy": value}}

    seen, saved = {}, writing.write
    monkeypatch.setattr(trainer, "_judge", judged)
    monkeypatch.setattr(writing, "write", lambda c, pair, *r: (seen.update(pair.state_dict()), saved(c, pair, *r)))
    snapshots = {}
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object, **keys: object) -> object:
        out = step(self, *args, **keys)
        snapshots[len(snapshots) + 1] = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    trainer.train(options(folder, tmp_path / "out", mode="steer", steps=4, save_every=2, keep=keep))
    expected = snapshots[2 if keep == "best" else 4]
    assert len(seen) == len(expected)
    for found, want in zip(sorted(seen.values(), key=str), sorted(expected, key=str), strict=True):
        assert torch.equal(found, want)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="NCCL wants a GPU for each process")
def test_several_processes_train_one_model(folder: Path, tmp_path: Path) -> None:
    """torchrun with two: each has half the rows of a step, one writes, the weights are those of one process.

    Rows differ in length, so that a mean of the two processes' means would be another training.
    """
    common = [f"--{name}={folder / name}" for name in ("target", "drafter")]
    common += [
        f"--data={mixed_lengths(tmp_path / 'mixed.jsonl')}",
        "--steps=3",
        "--k=1",
        "--target-layers",
        "0",
        "1",
        "2",
    ]
    common += ["--lr=1e-3", "--drafter-lr=1e-3", f"--cache={tmp_path / 'cache'}"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vllm_steer.cli"]
    for how, size, name in (([*launch], 2, "two"), (["-m", "vllm_steer.cli"], 4, "one")):
        words = [sys.executable, *how, "train", *common, f"--batch-size={size}", f"--output={tmp_path / name}"]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote ") == 1
    same_weights(tmp_path / "one", tmp_path / "two", atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_ray_workers_train_one_model(folder: Path, tmp_path: Path) -> None:
    """Ray Train on a local cluster: the weights of one process with a batch twice the size."""
    pytest.importorskip("ray.train")
    common = dict(steps=3, k=1, lr=1e-3, drafter_lr=1e-3)
    words = [sys.executable, "-m", "vllm_steer.cli", "train", "--ray", "--workers=2", "--batch-size=2"]
    words += [f"--{name}={folder / name}" for name in ("target", "drafter")]
    words += [f"--data={folder / 'data.jsonl'}", f"--output={tmp_path / 'ray'}", "--target-layers", "0", "1", "2"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "overlap" in done.stdout and not (tmp_path / "ray" / "checkpoints").exists()
    trainer.train(options(folder, tmp_path / "one", **common))
    same_weights(tmp_path / "one", tmp_path / "ray", atol=2e-4, rtol=1e-3)


def test_the_command_line_reaches_every_option(folder: Path, tmp_path: Path, capsys) -> None:
    given = dict(mode="steer", loss="tvd", steps=1, batch_size=2, lr=0.5, drafter_lr=0.1, k=2, rank=4)
    given |= dict(target_layers=(0, 1, 2), steered_layers=(1,), max_length=12, precision="bfloat16", seed=3)
    given |= dict(save_every=7, offsets="block", accumulate=2, keep="last", cache=str(tmp_path / "cache"))
    given |= dict(report_to=("tensorboard",), control=str(folder / "drafter"), chat_template_kwargs='{"loud": true}')
    words = ["--gradient-checkpointing", *(f"--{name}={folder / name}" for name in ("target", "drafter"))]
    words += [f"--data={folder / 'data.jsonl'}", f"--output={tmp_path / 'out'}"]
    for name, value in given.items():
        value = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, value)]
    parser = argparse.ArgumentParser()
    trainer.add_arguments(parser)
    args = parser.parse_args(words)
    assert not args.resume and not args.ray and set(vars(args)) == {f.name for f in dataclasses.fields(TrainConfig)}
    trainer.run(args)
    assert "overlap" in capsys.readouterr().out
    config = checkpoint.load(tmp_path / "out").config
    assert (config.rank, config.steered_layers, config.target_layer_ids, config.draft_length) == (4, (1,), (0, 1, 2), 2)
    assert config.acceptance["trained"]["positions"] == 12 - 6
    words = "--loss tvd,--lr 0.5,--seed 3,--precision bfloat16,--save-every 7,--drafter-lr 0.1,--offsets block"
    words += ",--accumulate 2,--keep last,--cache cache,--gradient-checkpointing,--report-to tensorboard"
    words += """,--chat-template-kwargs '{"loud": true}'"""
    for word in words.split(","):
        assert word in config.provenance["command"]


# --- data ---------------------------------------------------------------------------------------------------


def test_every_form_of_a_row(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    lines = [
        {"prompt": "w3 w4", "response": "w5"},
        {"prompt": [{"role": "user", "content": "w3"}], "response": "w5 w6"},
        {"text": "w7 w8 w9"},
        {"prompt_ids": [1, 2], "response_ids": [3, 4, 5]},
        {"prompt_ids": [1, 2, 3, 4], "response_ids": [5]},  # nothing left of the response at 4 tokens
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_rows(path, tokenizer, 4) == [
        Row((3, 4, 5), 2),
        Row((1, 3, 2, 5), 3),
        Row((7, 8, 9), 0),
        Row((1, 2, 3, 4), 2),
    ]


def test_rows_are_formatted_as_they_are_served(folder: Path, tmp_path: Path) -> None:
    """With the target's template, its variables and its end of sequence, whatever the drafter's are."""
    for name in MODELS:
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "target/chat_template.jinja").write_text("w1 {{ messages[0].content }} {{ 'w3' if loud else 'w2' }}")
    (tmp_path / "drafter/chat_template.jinja").unlink()
    lines = [{"prompt": [{"role": "user", "content": f"w{i}"}], "response": "w7 w8 w9 w10"} for i in range(11, 19)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kwargs, last in (("{}", 2), ('{"loud": true}', 3)):
        config = options(tmp_path, tmp_path / f"out{last}", chat_template_kwargs=kwargs, mode="joint")
        rows, held_out = read_data(config, load_tokenizer(config.target, config.drafter))
        assert {row.prompt for row in [*rows, *held_out]} == {(1, i, last) for i in range(11, 19)}
        assert f"--chat-template-kwargs '{kwargs}'" in record.provenance(config)["command"]
    trainer.train(config)
    served = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert AutoTokenizer.from_pretrained(tmp_path / "out3").chat_template == served.chat_template
    with pytest.raises(SteeringError, match="--chat-template-kwargs is not valid JSON"):
        options(tmp_path, tmp_path / "out", chat_template_kwargs="{")


def test_no_prompt_of_another_file_is_held_out(folder: Path, tmp_path: Path, caplog) -> None:
    """Rows of later files whose prompt is held out are left out and counted; the split is by prompt."""
    rows = [{"prompt_ids": [1 + i, 2], "response_ids": [3, 4, 5, j + 1]} for i in range(20) for j in range(4)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for path, chosen in ((first, rows), (second, rows[::2])):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = options(folder, tmp_path / "out", data=(str(first), str(second)))
    training, held_out = read_data(config, AutoTokenizer.from_pretrained(folder / "target"))
    assert len(held_out) == 4 and len({row.prompt for row in held_out}) == 1
    assert len(training) == 76 + 38 and not {row.prompt for row in training} & {row.prompt for row in held_out}
    assert "second.jsonl: 2 of 40 rows left out: their prompts are held out" in caplog.text
    everything = in_file_order(training, held_out)[0]
    assert [row.ids[0] for row in everything[:80]] == [row["prompt_ids"][0] for row in rows]


@pytest.mark.parametrize("old", [False, True])
def test_a_resumed_run_keeps_its_split(folder: Path, tmp_path: Path, old: bool, monkeypatch) -> None:
    """A new run by what it stored, whatever is chosen today; one from before there was a record, the last rows."""
    kept, describe = {}, split.describe

    def watched(rows, held_out, name):
        kept["held"] = [row.number for row in held_out]
        return describe(rows, held_out, name)

    def kill(*_, **__):
        raise KeyboardInterrupt

    config = options(folder, tmp_path / "out", steps=4, save_every=2)
    monkeypatch.setattr(split, "describe", watched)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "round_weights", kill)
        trainer.train(config)
    began = kept["held"]
    rows = read_rows(config.data[0], AutoTokenizer.from_pretrained(folder / "target"), 99)
    assert began == [row.number for row in split_rows(rows)[1]]
    record = tmp_path / "out/checkpoints" / split.FILE
    if old:
        record.unlink()
    monkeypatch.setattr(
        "vllm_steer.training.batches.split_rows", lambda rows: pytest.fail("a resumed run does not choose")
    )
    trainer.train(dataclasses.replace(config, resume=True))
    assert kept["held"] == ([23] if old else began) and began != [23]


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "w1"', "line 2: not valid JSON"),
        ('{"prompt": "w1"}', "line 2: found"),
        ('["w1"]', "line 2: found list"),
        ('{"text": 3}', "line 2: text is int"),
        ('{"prompt": 3, "response": "w1"}', "line 2: prompt is int"),
        ('{"prompt_ids": [1], "response_ids": [99]}', "line 2: response_ids: allowed"),
        ('{"prompt_ids": [true], "response_ids": [9]}', "line 2: prompt_ids: allowed"),
    ],
)
def test_a_broken_line_is_named(folder: Path, tmp_path: Path, line: str, complaint: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1 w2"}\n' + line + "\n")
    with pytest.raises(SteeringError, match=complaint):
        trainer.train(options(folder, tmp_path / "out", data=(str(data),)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"k": 0}, "--k is 0, allowed is 1"),
        ({"steps": -1}, "--steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"mode": "both"}, "--mode is 'both', allowed are steer"),
        ({"loss": "mse"}, "--loss"),
        ({"max_length": 6}, "raise --max-length"),
        ({"data": ("nowhere.jsonl",)}, "cannot read nowhere.jsonl"),
        ({"offsets": "often"}, "--offsets is 'often', allowed are batch, sequence, block"),
        ({"accumulate": 0}, "--accumulate is 0"),
        ({"keep": "first"}, "--keep is 'first'"),
        ({"workers": 2}, "--workers 2 needs --ray"),
        ({"report_to": ("mail",)}, "--report-to is 'mail', allowed are tensorboard, wandb"),
        ({"target_layers": (0, 1, 3)}, "target_layer_ids"),
        ({"steered_layers": (2,)}, "steered_layers"),
        ({"trained_layers": (1, 2)}, "--trained-layers has 2, .* has layers 0 to 1"),
        ({"trained_layers": (1,), "mode": "steer"}, "--trained-layers is for modes .* joint and distill"),
        ({"drafter": "./no/such/directory"}, "cannot load"),
        ({"resume": True}, "no checkpoint to resume"),
    ],
)
def test_a_wrong_option_is_named(folder: Path, tmp_path: Path, changes: dict, complaint: str) -> None:
    with pytest.raises(SteeringError, match=complaint):
        trainer.train(dataclasses.replace(options(folder, tmp_path / "out"), **changes))


def test_a_tracker_that_is_not_installed(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_config, "find_spec", lambda name: None)
    with pytest.raises(SteeringError, match="pip install wandb"):
        options(folder, tmp_path / "out", report_to=("wandb",))


def test_data_of_another_model_is_refused(folder: Path, tmp_path: Path, caplog) -> None:
    """The sidecar of `vllm-steer generate` says who wrote it: target and drafter may, and one cut short is told."""
    data = tmp_path / "written.jsonl"
    shutil.copy(folder / "data.jsonl", data)
    config = options(folder, tmp_path / "out", data=(str(data),))
    rows = [read_data(config, AutoTokenizer.from_pretrained(folder / "target"))]
    for writer, complete in (("target", True), ("drafter", True), ("target", False)):
        meta = {"model": {"name": writer, "fingerprint": fingerprint(folder / writer)}, "complete": complete}
        meta_path(data).write_text(json.dumps(meta))
        caplog.clear()
        rows.append(read_data(config, AutoTokenizer.from_pretrained(folder / "target")))
        assert ("is not complete" in caplog.text) is not complete
    assert all(found == rows[0] for found in rows)
    meta_path(data).write_text(json.dumps(meta | {"model": {"name": "stranger", "fingerprint": "0" * 64}}))
    with pytest.raises(SteeringError, match=r"was written by another model \(stranger\)"):
        trainer.train(config)
    meta_path(data).write_text("{}")
    with pytest.raises(SteeringError, match="written.meta.json is damaged"):
        trainer.train(config)


def test_different_tokenizers_are_refused(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder / "drafter").save_pretrained(tmp_path / "other")
    make_tokenizer([f"x{i}" for i in range(1, VOCAB)]).save_pretrained(tmp_path / "other")
    with pytest.raises(SteeringError, match="tokenizers of .* differ: token 'w1' is 1 in one and None"):
        trainer.train(options(folder, tmp_path / "out", drafter=str(tmp_path / "other")))


def test_an_output_that_exists_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(SteeringError, match="exists and is not an empty directory"):
        trainer.train(options(folder, tmp_path))


def test_several_devices_are_refused(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(SteeringError, match="2 GPUs in one process: start `torchrun"):
        trainer.train(options(folder, tmp_path / "out"))


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(losses.LOSSES, "jsd", lambda t, d: losses.forward_kl(t, d) * float("nan"))
    with pytest.raises(SteeringError, match="the loss is nan at step 0"):
        trainer.train(options(folder, tmp_path / "out"))
    assert not checkpoint.has_steering(tmp_path / "out")
    batch = json.loads((tmp_path / "out" / "failed-batch.json").read_text())
    assert batch["step"] == 0 and len(batch["input_ids"]) == 4 and batch["prompt_lengths"] == [6] * 4


# --- examples/tiny_pair -------------------------------------------------------------------------------------


def test_tiny_pair_never_trains_on_held_out_files() -> None:
    spec = importlib.util.spec_from_file_location("tiny_pair_make", ROOT / "examples/tiny_pair/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    splits = make.source_files()
    assert splits == make.source_files()
    names = [path for files in splits.values() for path in files]
    assert len(names) == len(set(names)) > 300 and all(splits.values())
    assert not any(part in make.SKIP for path in names for part in path.parent.parts[-1:])


def test_tiny_pair_is_small_and_its_training_shows(tmp_path: Path) -> None:
    """The committed directories, on the held-out prompts: distilling beats pretraining, steering beats distilling.

    The floors lie a little below what was measured when the pair was made (means over offsets: see README there).
    """
    sizes = {path.relative_to(PAIR).parts[0]: 0 for path in PAIR.rglob("*") if path.is_file()}
    for path in PAIR.rglob("*"):
        sizes[path.relative_to(PAIR).parts[0]] += path.stat().st_size if path.is_file() else 0
    assert sizes.pop("dflash") + sizes.pop("treeflash") < 6e6
    assert sum(sizes.values()) < 12e6
    prompts = [json.loads(line)["prompt"] for line in (PAIR / "heldout.jsonl").read_text().splitlines()]
    assert len(prompts) == 384
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts[:48]))
    mean = {}
    for name in ("drafter", "adapter", "distilled", "steered"):
        base = PAIR / ("drafter" if name == "adapter" else name)
        overlaps = measure_directory(PAIR / "target", base, PAIR / name, data, k=5)["overlap"]
        mean[name] = sum(overlaps) / 5
    assert mean["drafter"] + 0.003 < mean["adapter"], mean
    assert mean["drafter"] + 0.05 < mean["distilled"] < mean["steered"] - 0.003, mean


def test_guide_dropout_leaves_whole_rows_without_a_guide(folder: Path, tmp_path: Path) -> None:
    """Of the rows, about the share that was asked for; the others keep the sources they would have had."""
    batch = {"input_ids": torch.zeros(400, 12, dtype=torch.long), "prompt_lengths": torch.full((400,), 3)}
    asked = options(folder, tmp_path / "out", mode="joint", guide_dropout=0.25)
    pair = Pair.__new__(Pair)
    found = pair.draw(asked, batch, random.Random(1))
    whole = pair.draw(dataclasses.replace(asked, guide_dropout=0.0), batch, random.Random(1))
    dropped = (found == -1).all(1)
    assert 70 < int(dropped.sum()) < 130
    assert torch.equal(found[~dropped], whole[~dropped]) and (whole[:, 3:] >= 0).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(guide_dropout=1.0), "--guide-dropout is 1.0, allowed is 0 to less than 1"),
        (dict(guide_dropout=-0.1), "--guide-dropout is -0.1"),
        (dict(guide_dropout=0.1, mode="steer"), "--guide-dropout is for --mode joint"),
    ],
)
def test_guide_dropout_out_of_range(changes: dict, words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SteeringError) as error:
        options(folder, tmp_path / "out", **changes)
    assert words in str(error.value)
