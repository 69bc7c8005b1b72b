"""What lenience costs: whether answers are right, what is shown apart, and a real lenient benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_steer.bench import checks, quality, report
from vllm_steer.bench.candidate import Contender
from vllm_steer.bench.run import BenchConfig, benchmark
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.lenience import Lenience
from vllm_steer.data.prompts import read_prompts

PAIR = ROOT / "examples/tiny_pair"
PROMPT = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Sum."""\n'
TEST = "\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n"
FUNCTION = {"entry_point": "add", "test": TEST}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return a + b\n", True),
        ("    return a + b\n\n\ndef other():\n    raise SystemExit\n", True),
        ("    return a - b\n", False),
        ("    return a +\n", False),
        ("Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nand more", True),
        ("```python\ndef add(a: List, b):\n    return a + b\n", True),
        ("def add(a, b):\n    return a + b\n", True),
        ("    import os\n    os._exit(0)\n", False),
        ("    raise SystemExit(0)\n", False),
        ("    while True: pass\n", False),
        ("    x = ' ' * 2**34\n    return a + b\n", False),
        ("    import socket\n    socket.socket()\n    return a + b\n", False),
        ("    import subprocess\n    subprocess.run(['true'])\n    return a + b\n", False),
        ("    import os\n    os.system('true')\n    return a + b\n", False),
        ("    open('x', 'w').close()\n    return a + b\n", False),
        ("    import math, re, itertools\n    return int(math.fsum([a, b]))\n", True),
    ],
)
def test_functions(answer: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SECONDS", 2)
    assert checks.correct(FUNCTION, PROMPT, answer, True) is right
    assert checks.correct(FUNCTION, PROMPT, answer, False) is None, "only where that was asked for"


@pytest.mark.parametrize(
    ("answer", "right"),
    [("so 6 x 7 = 42.", True), ("$1,042.00 or 42", True), ("42 of 43", False), ("none", False), ("", False)],
)
def test_numbers(answer: str, right: bool) -> None:
    assert checks.correct({"answer": "42"}, "How much?", answer, False) is right
    assert checks.correct({"answer": "1,042"}, "", "1042.0", False) is True


def test_contenders() -> None:
    found = Contender.parse("a=x@tree:2,1@lenience:0.5:square")
    assert (found.drafter, found.tree, found.read_lenience()) == ("x", (2, 1), Lenience(0.5, "square"))
    assert Contender.parse("a=x@rows:2@blind@lenience:0.3").read_lenience() == Lenience(0.3)
    assert Contender.parse("a=x").read_lenience() is None
    for bad, why in (("2", "epsilon is 2.0"), ("x", "epsilon is 'x'"), ("0.5:cubic", "form is 'cubic'"), ("", "is ''")):
        with pytest.raises(SteeringError, match=why):
            Contender.parse(f"a=x@lenience:{bad}")


def test_what_a_prompt_expects(tmp_path: Path) -> None:
    lines = [
        {"prompt": "a", "answer": "3"},
        {"prompt": "b", "entry_point": "f", "test": "t"},
        {"prompt": "c", "answer": 3},
        {"prompt": "d"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_prompts(str(tmp_path / "p.jsonl"))
    assert [p.expected for p in found] == [{"answer": "3"}, {"entry_point": "f", "test": "t"}, None, None]
    assert all("expected" not in p.to_dict() for p in found)


def test_summary_by_hand() -> None:
    answers = [
        {"nll": 4.0, "tokens": 2, "correct": True, "tokens_sha256": "a"},
        {"nll": 1.0, "tokens": 8, "correct": False, "tokens_sha256": "b"},
        {"nll": 0.0, "tokens": 0, "correct": None, "tokens_sha256": "c"},
    ]
    exact = [{"tokens_sha256": "a"}, {"tokens_sha256": "x"}, {"tokens_sha256": "c"}]
    found = quality.summarise(answers, exact)
    assert (found["nll_per_token"], found["same_text"], found["correct"]) == (0.5, [2, 3], [1, 2])
    assert found["nll_95"] is not None and found["nll_95"][0] < 0.5 < found["nll_95"][1]
    assert quality.summarise(answers[:1], None) | {"nll_95": None} == {
        "nll_per_token": 2.0, "nll_95": None, "same_text": None, "correct": [1, 1]
    }  # fmt: skip


def test_a_lenient_benchmark_is_shown_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    lines = (PAIR / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(json.loads(line) | {"answer": "1"}) + "\n" for line in lines))
    drafter = str(PAIR / "drafter")
    config = BenchConfig(
        prompts=str(tmp_path / "p.jsonl"), output=str(tmp_path / "out"), target=str(PAIR / "target"),
        drafters=(f"exact={drafter}", f"lenient={drafter}@lenience:0.2"), max_tokens=24, temperature=(0.0,), batch=2,
        max_model_len=512, engine='{"enforce_eager": true, "dtype": "float32"}',
    )  # fmt: skip
    found = benchmark(config)
    exact, lenient = found["summary"][0]["rows"]
    assert (exact["lenience"], lenient["lenience"]) == (None, "0.2 (linear)")
    assert exact["same_text"] == [4, 4] and lenient["same_text"][0] < 4
    assert exact["acceptance_length"] < lenient["acceptance_length"]
    assert exact["nll_per_token"] == pytest.approx(nll(found, lines), rel=1e-3)
    text = report.table(found)
    before, apart = text.split("### Greedy (T=0), lenient: not the target's output")
    assert "| exact |" in before and "| lenient |" not in before and "lossless" not in text
    assert "| lenient | 0.2 (linear) |" in apart and "lenient over exact" in apart


@torch.no_grad()
def nll(found: dict[str, Any], lines: list[str]) -> float:
    """The exact contender's NLL per token by Hugging Face: it says the target's greedy text."""
    model = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    total = 0.0
    for line in lines:
        ids = tokenizer(json.loads(line)["prompt"], return_tensors="pt")["input_ids"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        logits = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
        total -= float(logits.gather(1, whole[0, ids.shape[1] :, None]).sum())
    return total / (24 * len(lines))
