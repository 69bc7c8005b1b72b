"""`import vllm_steer`: light, complete, and its own example runs."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from repository import ROOT

import vllm_steer

PAIR = ROOT / "examples/tiny_pair"


def test_every_public_name_is_there_and_listed() -> None:
    assert set(vllm_steer.__all__) <= set(dir(vllm_steer))
    for name in vllm_steer.__all__:
        assert getattr(vllm_steer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        vllm_steer.no_such_name  # noqa: B018


def test_the_example_of_its_docstring_runs() -> None:
    assert vllm_steer.__doc__
    code = textwrap.dedent(vllm_steer.__doc__.split("\n\n", 2)[2])
    for name, folder in (("target", "target"), ("drafter-steered", "steered")):
        code = code.replace(f'"{name}"', repr(str(PAIR / folder)))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out.split()[-1]) > 1
