"""What the front end refuses, told as: the value, what is allowed, the remedy. No engine is started here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pairs import DRAFTER, Size, make_pair, tiny_model
from safetensors.torch import save_file
from samples import engine_config

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.serving import admission, patches, patching, register
from vllm_steer.serving.kill_switch import KILL_SWITCH, disabled
from vllm_steer.serving.plan import LAYER_IDS, Plan


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("plan"), "llama")


def adapter(steered: Path, directory: Path) -> str:
    checkpoint.save(directory, checkpoint.load(steered))
    return str(directory)


def copy_of(directory: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(directory, to))


def test_a_steered_drafter_gets_a_plan_that_salts_the_caches(pair: tuple[Path, Path, Path]) -> None:
    target, plain, steered = pair
    config = engine_config(target, steered, {"vllm_steer": {"scale": 0.5}}, max_num_seqs=7)
    plan = Plan.of(config)
    assert plan is not None
    assert (plan.scale, plan.max_num_seqs, plan.draft_length, plan.source) == (0.5, 7, 3, str(steered))
    assert getattr(config.speculative_config.draft_model_config.hf_config, LAYER_IDS) == [2, 3, 4]
    stock = engine_config(target, plain, {"vllm_steer": {"scale": 0.5}}, max_num_seqs=7)
    assert Plan.of(stock) is None
    hashes = {
        "target": lambda c: c.speculative_config.compute_hash(),
        "drafter": lambda c: c.speculative_config.draft_model_config.compute_hash(),
    }
    other = engine_config(target, steered, {"vllm_steer": {"scale": 0.5}}, max_num_seqs=9)
    for name, of in hashes.items():
        assert len({of(config), of(stock), of(other)}) == 3, f"the {name}'s compile cache would be shared"


def test_adapter_over_the_plain_drafter(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, plain, steered = pair
    config = engine_config(target, plain, {"vllm_steer": {"adapter": adapter(steered, tmp_path / "a")}})
    assert Plan.of(config).source == str(tmp_path / "a")


def test_the_kill_switch_serves_anything_unsteered(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _, steered = pair
    damaged = copy_of(steered, tmp_path / "damaged")
    (damaged / "steering/model.safetensors").write_bytes(b"nothing")
    monkeypatch.setenv(KILL_SWITCH, "1")
    assert Plan.of(engine_config(target, damaged)) is None
    monkeypatch.setenv(KILL_SWITCH, "0")
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        engine_config(target, damaged)


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", "True", "YES", "oN", " 1 "])
def test_the_kill_switch_is_on(value: str, pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KILL_SWITCH, value)
    assert disabled()
    assert Plan.of(engine_config(pair.target, pair.steered)) is None


@pytest.mark.parametrize("value", ["0", "false", "no", "off", "False", "NO", "Off", " 0", "", " "])
def test_the_kill_switch_is_off(value: str, pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KILL_SWITCH, value)
    assert not disabled()
    assert Plan.of(engine_config(pair.target, pair.steered)) is not None


@pytest.mark.parametrize("value", ["2", "-1", "flase", "disable", "none", "y", "1.0", "true,"])
@pytest.mark.parametrize("drafter", [None, "plain", "steered"])
def test_a_kill_switch_that_is_neither(
    drafter: str | None, value: str, pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KILL_SWITCH, value)
    told = f"{KILL_SWITCH} is '{value}', allowed are 1, true, yes, on .* 0, false, no, off or nothing .* unset it"
    with pytest.raises(ValueError, match=told):
        engine_config(pair.target, {"plain": pair.drafter, "steered": pair.steered}.get(drafter))


@pytest.mark.parametrize("switch", ["0", "1"])
def test_no_drafter_with_prompt_embeddings(
    switch: str, pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KILL_SWITCH, switch)
    target, *drafters = pair
    for drafter in drafters:
        with pytest.raises(
            ValueError, match=r"--enable-prompt-embeds\) do not work with the drafter .*: drop --enable"
        ):
            engine_config(target, drafter, enable_prompt_embeds=True)
        engine_config(target, drafter)
    engine_config(target, None, enable_prompt_embeds=True)
    ngrams = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    engine_config(target, None, enable_prompt_embeds=True, spec=ngrams)


@pytest.mark.parametrize(("v2", "size", "moe", "refused"), [
    (True, 2, True, True), (False, 2, True, False), (True, 1, True, False), (True, 2, False, False),
])  # fmt: skip
def test_no_draft_model_beside_data_parallel_experts_on_v2(v2: bool, size: int, moe: bool, refused: bool) -> None:
    config = SimpleNamespace(
        use_v2_model_runner=v2,
        parallel_config=SimpleNamespace(data_parallel_size=size),
        model_config=SimpleNamespace(is_moe=moe, enable_prompt_embeds=False),
        speculative_config=SimpleNamespace(method="draft_model", draft_model_config=SimpleNamespace(model="none")),
        additional_config={},
    )
    with pytest.raises(Exception) as told:  # what is not refused goes on to read the draft model, which is not there
        admission.prepare(config)
    assert ("data_parallel_size is 2 and the target is a mixture of experts" in str(told.value)) == refused


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        (
            {"vllm_steer": {"adaptor": "x"}},
            "unknown key 'adaptor'; allowed are adapter, revision, scale, adapters, draft_graphs, filter_drafts",
        ),
        ({"vllm_steer": {"scale": "big"}}, "scale is 'big', allowed is a number"),
        ({"vllm_steer": {"filter_drafts": "no"}}, "filter_drafts is 'no', allowed are true and false"),
        ({"vllm_steer": {"scale": float("nan")}}, "scale is nan, allowed is -100 to 100"),
        ({"vllm_steer": 3}, "is 3, allowed is an object"),
        ({"vllm_steer": {"adapter": 3}}, "adapter must be a string"),
        ({"vllm_steer": {"adapter": "/no/such/place"}}, "/no/such/place: no such directory"),
        ({"vllm_steer": {"adapter": "nobody/nothing-at-all"}}, "could not be fetched from the hub"),
    ],
)
def test_bad_options(
    pair: tuple[Path, Path, Path], additional: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        engine_config(pair.target, pair.drafter, additional)


def test_adapter_needs_a_plain_draft_model(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, _, steered = pair
    options = {"vllm_steer": {"adapter": adapter(steered, tmp_path / "a")}}
    with pytest.raises(ValueError, match="no draft model is configured"):
        engine_config(target, None, options)
    with pytest.raises(ValueError, match="carries its own steering"):
        engine_config(target, steered, options)


def test_adapters_lie_in_a_directory(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    engine_config(pair.target, pair.steered, {"vllm_steer": {"adapters": str(tmp_path)}})
    with pytest.raises(ValueError, match="adapters is '.*none', which is no directory: make it"):
        engine_config(pair.target, pair.steered, {"vllm_steer": {"adapters": str(tmp_path / "none")}})


def test_a_marker_without_its_folder(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import shutil

    lost = copy_of(pair.steered, tmp_path / "lost")
    shutil.rmtree(lost / "steering")
    with pytest.raises(ValueError, match="its steering/ folder is missing: copy the folder"):
        engine_config(pair.target, lost)


def test_another_target_or_drafter(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, _, steered = pair
    for name, size, message in (
        ("wide", Size(192, 7, 192, 2), "target has hidden_size=192, the steering was trained for hidden_size=128"),
        ("deep", Size(128, 9, 192, 2), "target has num_hidden_layers=9, the steering was trained for"),
    ):
        tiny_model("llama", size).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            engine_config(tmp_path / name, steered, skip_tokenizer_init=True)
    tiny_model("llama", Size(64, 2, 128)).save_pretrained(tmp_path / "drafter")
    options = {"vllm_steer": {"adapter": adapter(steered, tmp_path / "a")}}
    with pytest.raises(ValueError, match="drafter has intermediate_size=128, the steering was trained for"):
        engine_config(target, tmp_path / "drafter", options)


def test_another_vocabulary(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for role, size in (("target", Size(128, 7, 192, 2)), ("drafter", DRAFTER)):
        tiny_model("llama", size, vocab_size=160).save_pretrained(tmp_path / role)
    options = {"vllm_steer": {"adapter": adapter(pair.steered, tmp_path / "a")}}
    with pytest.raises(ValueError, match="vocab_size=160, the steering was trained for vocab_size=128"):
        engine_config(tmp_path / "target", tmp_path / "drafter", options, skip_tokenizer_init=True)


def test_a_target_without_auxiliary_states(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tiny_model("gemma", Size(128, 7, 192, 2)).save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="cannot emit hidden states of its layers .* choose a target of another"):
        engine_config(tmp_path / "gemma", pair.steered, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"spec": {"parallel_drafting": True}}, "parallel drafting"),
        ({"spec": {"enable_adaptive_verification": True}}, "adaptive verification"),
    ],
)
def test_refused_by_name(pair: tuple[Path, Path, Path], keys: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"does not work with {name}.*yet: turn that off, or set {KILL_SWITCH}=1"):
        engine_config(pair.target, pair.steered, **keys)


@pytest.mark.parametrize(
    ("part", "key", "name"),
    [  # a CPU, or these models, would be refused by vLLM first
        ("model_config", "enable_sleep_mode", "sleep mode, which loses the steering's weights,"),
        ("parallel_config", "decode_context_parallel_size", "decode context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", "prefill context parallelism"),
        ("speculative_config", "use_heterogeneous_vocab", "heterogeneous vocabularies"),
        ("speculative_config", "rejection_sample_method", "lossy verification .* 'fly'.*"),
    ],
)
def test_refused_by_name_where_vllm_goes_on(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, part: str, key: str, name: str
) -> None:
    config = engine_config(pair.target, pair.steered)
    now = getattr(getattr(config, part), key)
    monkeypatch.setattr(getattr(config, part), key, "fly" if isinstance(now, str) else type(now)(2))
    with pytest.raises(SteeringError, match=f"does not work with {name} yet"):
        admission._refuse_unsupported(config)


def test_draft_graphs_are_for_v2(pair: tuple[Path, Path, Path]) -> None:
    for drafter in (pair.drafter, pair.steered):  # plain ones can have them too
        with pytest.raises(ValueError, match="draft_graphs is for vLLM's V2 runner, this engine has V1"):
            engine_config(pair.target, drafter, {"vllm_steer": {"draft_graphs": True}})


def test_weight_transfer_is_refused(pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(pair.target, pair.steered)
    monkeypatch.setattr(config, "weight_transfer_config", object())
    with pytest.raises(SteeringError, match="does not work with weight transfer, .* but not its steering, yet"):
        admission._refuse_unsupported(config)


def test_draft_length_below_one(pair: tuple[Path, Path, Path]) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        engine_config(pair.target, pair.steered, spec={"num_speculative_tokens": 0})


def test_longer_drafts_than_trained_for_warn(
    pair: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = copy_of(pair.steered, tmp_path / "short")
    raw = json.loads((short / "steering/config.json").read_text()) | {"draft_length": 2}
    (short / "steering/config.json").write_text(json.dumps(raw))
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.steer"):
        engine_config(pair.target, short)
    assert "num_speculative_tokens=3 is more than the draft length 2" in caplog.text


def test_damage_is_found_before_any_worker_starts(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    damaged = copy_of(pair.steered, tmp_path / "damaged")
    save_file({"fuse.weight": tiny_model("llama").lm_head.weight.data}, damaged / "steering/model.safetensors")
    with pytest.raises(ValueError, match="tensor 'fuse.bias' is missing"):
        engine_config(pair.target, damaged)


def test_the_plugin_may_be_loaded_twice(pair: tuple[Path, Path, Path]) -> None:
    from vllm.config.vllm import VllmConfig

    register()
    before = VllmConfig.__post_init__
    register()
    assert VllmConfig.__post_init__ is before
    assert Plan.of(engine_config(pair.target, pair.steered)) is not None


def test_seams_can_be_undone_and_applied_again() -> None:
    import vllm.v1.worker.gpu_model_runner as runner

    register()
    steered = runner.DraftModelProposer
    patching.undo()
    try:
        assert runner.DraftModelProposer is steered.__bases__[-1]
    finally:
        patches.install()
    assert runner.DraftModelProposer is steered


def test_a_missing_seam_refuses_steered_drafters_only(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.v1.worker.gpu_model_runner as runner

    target, plain, steered = pair
    register()
    patching.undo()
    original = runner.DraftModelProposer
    try:
        monkeypatch.delattr(runner, "DraftModelProposer")
        register()
        assert Plan.of(engine_config(target, plain)) is None
        with pytest.raises(ValueError, match="has no place for steering: .*DraftModelProposer.*works with vLLM 0.32"):
            engine_config(target, steered)
        monkeypatch.setenv(KILL_SWITCH, "1")
        assert Plan.of(engine_config(target, steered)) is None
    finally:
        monkeypatch.undo()
        assert runner.DraftModelProposer is original
        patching.undo()
        patches.install()


def test_an_untested_vllm_is_steered_by_consent_to_that_release(
    pair: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    risk = rf"{patching.UNTESTED}=0\.99\.1 steers all the same, at your risk: .* acceptance falls, or the output"
    for value in (None, "1", "0.99", "0.99.2"):
        if value is not None:
            monkeypatch.setenv(patching.UNTESTED, value)
        with pytest.raises(
            ValueError, match=rf"this is vLLM 0\.99\.1, vllm-steer works with 0\.32 and 0\.33: .*{risk}"
        ):
            engine_config(pair.target, pair.steered)
    monkeypatch.setenv(patching.UNTESTED, "0.99.1")
    assert Plan.of(engine_config(pair.target, pair.steered)) is not None
    assert "steering on vLLM 0.99.1, which vllm-steer was not tested with" in caplog.text


def test_every_seam_says_why_and_until_when() -> None:
    for seam in patches.SEAMS:
        assert seam.why and seam.remove_when


def test_the_repair_of_vllm_is_still_needed() -> None:
    """When this fails, vLLM's own expansion writes its result: the seam `expand_batch_to_tokens` can go."""
    import torch
    import vllm.v1.sample.rejection_sampler as sampler
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    register()
    temperatures, ends = torch.tensor([0.5, 2.0]), torch.tensor([2, 3], dtype=torch.int32)
    assert sampler.expand_batch_to_tokens(temperatures, ends, 3).tolist() == [0.5, 0.5, 2.0]
    output = torch.full((3,), 7.0)
    _expand_kernel_impl(output, temperatures, ends, 0, 1)
    assert output.tolist() == [7.0, 7.0, 7.0], "vLLM's kernel now writes: remove the seam"
