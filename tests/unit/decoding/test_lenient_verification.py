"""Lenient verification: its rule, its closed form on a small vocabulary, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import said
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.lenience import FORMS, Lenience
from vllm_steer.decoding.chain import generate
from vllm_steer.decoding.verification import recursive

PAIR = Path("examples/tiny_pair")
P = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.05, 0.35, 0.3], dtype=torch.float64)
DRAWS = 20_000


@pytest.mark.parametrize("form", FORMS)
def test_what_is_said_has_the_closed_form(form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(len(P))
    for _ in range(DRAWS):
        draft = int(torch.multinomial(Q, 1, generator=generator))
        counts[recursive(P, Q, [draft], generator, lenience=Lenience(0.5, form))[1]] += 1
    assert counts[P == 0].sum() == 0, "a token that the target never says"
    keep = P > 0
    right = said(P, Q, Lenience(0.5, form))
    assert chisquare(counts[keep], DRAWS * right[keep]).pvalue > 1e-4
    assert chisquare(counts[keep], DRAWS * P[keep]).pvalue < 1e-10, "it is the target's own: nothing was given up"


@pytest.mark.parametrize("form", FORMS)
def test_epsilon_one_gives_nothing_up(form: str) -> None:
    log_p = torch.tensor([0.0, -1.0, -torch.inf])
    assert Lenience(1.0, form).exact and not Lenience(0.9, form).exact
    assert Lenience(1.0, form).log_gain(log_p).tolist() == [0, 0, 0]
    assert torch.allclose(said(P, Q, Lenience(1.0, form)), P)


def test_gains_are_the_papers() -> None:
    log_p = torch.tensor([0.5, 0.01]).log()
    assert torch.allclose(Lenience(0.5).log_gain(log_p).exp(), torch.tensor([2.0, 2.0]))
    assert torch.allclose(Lenience(0.5, "square").log_gain(log_p).exp(), torch.tensor([4.0, 4.0]))
    assert torch.allclose(Lenience(0.5, "exponential").log_gain(log_p).exp(), torch.tensor([0.5**-0.5, 10.0]))
    never = torch.tensor([-torch.inf])
    assert [(never + Lenience(0.1, form).log_gain(never)).item() for form in FORMS] == [-torch.inf] * 3


def test_less_is_asked_of_greedy_drafts_the_smaller_epsilon_is() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    models = [
        AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32).eval() for name in ("target", "drafter")
    ]
    prompt = tokenizer("import os\n\n\ndef read(path):\n")["input_ids"]
    leniences = [None, Lenience(0.5), Lenience(0.1), Lenience(1e-9)]
    found = [generate(*models, prompt, max_new_tokens=48, lenience=lenience) for lenience in leniences]
    lengths = [generation.acceptance_length for generation in found]
    assert lengths == sorted(lengths) and lengths[-1] == 6, lengths
    assert found[-1].tokens != found[0].tokens
    assert all(block.accepted == 5 for block in found[-1].blocks)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (0, "epsilon is 0, allowed is more than 0, to 1"),
        (1.5, "epsilon is 1.5"),
        (True, "epsilon is True"),
        (math.nan, "epsilon is nan"),
        ("0.5", "is '0.5', allowed is a number, or"),
        ({"form": "linear"}, "allowed is a number, or"),
        ({"epsilon": 0.5, "forms": "linear"}, "allowed is a number, or"),
        ({"epsilon": 0.5, "form": "cubic"}, "form is 'cubic', allowed are linear, square, exponential"),
    ],
)
def test_what_is_no_lenience(raw: Any, named: str) -> None:
    with pytest.raises(SteeringError, match="^here.*" + named.replace("(", r"\(")):
        Lenience.read(raw, "here")


def test_what_is_one() -> None:
    assert Lenience.read(0.5, "") == Lenience(0.5, "linear")
    assert Lenience.read({"epsilon": 1, "form": "square"}, "") == Lenience(1.0, "square")
