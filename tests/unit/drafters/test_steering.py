"""steering.py: the formulas of the paper, and "no change" as the starting point."""

from __future__ import annotations

import pytest
import torch
from pairs import random_steering, tiny_config
from torch import Tensor

from vllm_steer.drafters.steered.module import Steering

H, L, F = 128, 2, 96
RANKS = pytest.mark.parametrize("rank", [None, 5])


def make(rank: int | None = None, **keys) -> Steering:
    target = tiny_config("llama", hidden_size=H, num_hidden_layers=7)
    return random_steering(target, tiny_config("llama"), rank, **keys)


def by_hand(steering: Steering, states: Tensor) -> Tensor:
    w = {name: tensor.double() for name, tensor in steering.state_dict().items()}
    g = states.double() @ w["fuse.weight"].T + w["fuse.bias"]
    centred = g - g.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"] + w["norm.bias"]
    matrix = w["project.weight"] if steering.config.rank is None else w["project.up.weight"] @ w["project.down.weight"]
    return (x @ matrix.T).view(*states.shape[:-1], steering.config.num_steered, F)


@RANKS
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
def test_deltas_are_the_formula(rank: int | None, batch: tuple[int, ...]) -> None:
    steering = make(rank)
    states = torch.randn(*batch, 3 * H)
    deltas = steering(states)
    assert deltas.shape == (*batch, L, F)
    torch.testing.assert_close(deltas.double(), by_hand(steering, states), atol=1e-5, rtol=1e-5)
    assert steering.guide(states).shape == (*batch, H)


def test_steered_layers_set_the_size() -> None:
    assert make(steered_layers=(1,))(torch.randn(3 * H)).shape == (1, F)


@RANKS
def test_starts_as_no_change(rank: int | None) -> None:
    fresh = Steering(make(rank).config)
    low, mid, high = torch.randn(3, 4, H)
    torch.testing.assert_close(fresh.guide(torch.cat([low, mid, high], -1)), low + mid + high)
    assert not fresh(torch.randn(4, 3 * H)).any()


@RANKS
def test_a_fresh_one_can_learn(rank: int | None) -> None:
    fresh = Steering(make(rank).config)
    fresh(torch.randn(4, 3 * H)).sum().backward()
    assert fresh.output.weight.grad.abs().sum() > 0
    assert fresh.output.out_features == L * F


def test_low_rank_is_smaller() -> None:
    sizes = [sum(p.numel() for p in make(rank).project.parameters()) for rank in (None, 5)]
    assert sizes == [H * L * F, 5 * (H + L * F)]
