"""drafter.py: the delta reaches every gated-MLP family where the paper puts it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pairs import DRAFTER, FAMILIES, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig
from transformers.activations import ACT2FN

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import hf
from vllm_steer.drafters.steered.hf import attach, decoder_layers

IDS = torch.arange(24).view(2, 12) * 5 % 128
BOTH = (0, 1)


@contextmanager
def by_hand(model: nn.Module, deltas: Tensor, layers: tuple[int, ...]) -> Iterator[None]:
    """Replace the input of each down_proj by act(gate) * (up + delta), from the MLP's input alone."""
    config = model.config
    act = ACT2FN[getattr(config, "hidden_activation", None) or config.hidden_act]
    handles = []
    for slot, layer in enumerate(layers):
        mlp = decoder_layers(model)[layer].mlp
        seen: list[Tensor] = []

        def remember(_module: nn.Module, args: tuple, seen: list[Tensor] = seen) -> None:
            seen[:] = args

        def replace(_module: nn.Module, _args: tuple, mlp=mlp, seen=seen, slot=slot) -> tuple:
            x = seen[0]
            if hasattr(mlp, "gate_up_proj"):
                gate, up = (x @ half.T for half in mlp.gate_up_proj.weight.chunk(2))
            else:
                gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
            return (act(gate) * (up + deltas[..., slot, :]),)

        handles += [mlp.register_forward_pre_hook(remember), mlp.down_proj.register_forward_pre_hook(replace)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_injection(family: str) -> None:
    model = tiny_model(family)
    plain = model(IDS).logits
    deltas = torch.randn(*IDS.shape, 2, DRAFTER.ffn)
    with by_hand(model, deltas, BOTH):
        expected = model(IDS).logits
    assert (expected - plain).abs().max() > 0.1

    names = list(model.state_dict())
    injector = attach(model, BOTH)
    assert torch.equal(model(IDS).logits, plain)
    with injector.using(torch.zeros(1, 1, 2, DRAFTER.ffn)):
        assert torch.equal(model(IDS).logits, plain)
    with injector.using(deltas):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(IDS).logits, plain)
    injector.detach()
    assert list(model.state_dict()) == names
    assert torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hidden_states_are_layer_inputs(family: str) -> None:
    """What guides are made of: HF `hidden_states[i]` is the input of decoder layer i, in every family."""
    model = tiny_model(family)
    inputs: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, args, kwargs: inputs.append((*args, *kwargs.values())[0]),
                                        with_kwargs=True)
        for layer in decoder_layers(model)
    ]  # fmt: skip
    states = model(IDS, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert len(inputs) == DRAFTER.layers
    for mine, theirs in zip(inputs, states, strict=False):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_one_layer_and_one_guide_for_all_rows() -> None:
    model = tiny_model("qwen2")
    delta = torch.randn(1, 1, 1, DRAFTER.ffn)
    with by_hand(model, delta, (1,)):
        expected = model(IDS).logits
    with attach(model, (1,)).using(delta):
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_drafter_takes_float32_deltas() -> None:
    model = tiny_model("llama").bfloat16()
    with attach(model, BOTH).using(torch.randn(1, 1, 2, DRAFTER.ffn)):
        assert model(IDS).logits.dtype == torch.bfloat16


def test_gradients_reach_the_deltas() -> None:
    model = tiny_model("llama").requires_grad_(False)
    deltas = torch.zeros(*IDS.shape, 2, DRAFTER.ffn, requires_grad=True)
    with attach(model, BOTH).using(deltas):
        model(IDS).logits.sum().backward()
    assert deltas.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
        OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=64,
            vocab_size=64,
            word_embed_proj_dim=32,
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_other_families_are_refused(config) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(SteeringError, match=r"(?i)(gpt2|opt).*families that fit: llama, qwen2") as caught:
        attach(model, BOTH)
    for family in FAMILIES:
        assert family in str(caught.value)


def test_families_are_those_tested() -> None:
    assert sorted(hf.FAMILIES.split(", ")) == sorted(FAMILIES)


@pytest.mark.parametrize("layers", [(0, 2), (-1,)])
def test_layers_that_do_not_exist(layers: tuple[int, ...]) -> None:
    with pytest.raises(SteeringError, match=rf"decoder layer {layers[-1]} "):
        attach(tiny_model("llama"), layers)


def test_steered_twice_is_refused_and_leaves_no_trace() -> None:
    model = tiny_model("llama")
    first = attach(model, (1,))
    with pytest.raises(SteeringError, match="layer 1 is steered already"):
        attach(model, BOTH)
    first.detach()
    attach(model, BOTH).detach()


def test_deltas_for_other_layers_are_a_bug() -> None:
    injector = attach(tiny_model("llama"), BOTH)
    with pytest.raises(AssertionError), injector.using(torch.zeros(1, 1, 3, DRAFTER.ffn)):
        pass
