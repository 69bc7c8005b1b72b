"""Imports point one way, vLLM is met in one package only, and what runs everywhere is light. All by reading sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_steer

ROOT = Path(vllm_steer.__file__).parent
RANK = {  # a module imports only modules of lower rank
    "": 0,  # the package itself: its version
    "config": 1,
    "steering": 2,
    "options": 2,
    "findings": 2,
    "provenance": 2,
    "jsonl": 2,
    "tokenizer": 2,
    "prompts": 3,
    "response_file": 3,
    "engine": 2,
    "counting": 2,
    "report": 2,
    "plots": 2,
    "drafter": 3,
    "checkpoint": 3,
    "losses": 3,
    "split": 4,
    "data": 5,
    "endpoint": 4,
    "published": 4,
    "pair": 6,
    "cache": 6,
    "serving.probe": 3,
    "serving.plan": 3,
    "serving.seams": 3,
    "serving.survey": 3,
    "serving.watch": 3,
    "serve": 4,
    "contender": 4,
    "generate": 5,
    "batches": 7,
    "responses": 5,
    "checks": 7,
    "server_checks": 5,
    "train": 8,
    "evaluate": 6,
    "card": 6,
    "doctor": 8,
    "cli": 9,
}
PUBLIC = {"vllm.LLM", "vllm.SamplingParams", "vllm.sampling_params.RequestOutputKind"}
SERVING_SEES = {"", "config", "steering", "checkpoint"}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """Dotted name inside the package: "" for the package, "serving.plan", ..."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, wherever in it, and whether that happens when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in inside) for name in names)


def ours(name: str) -> str | None:
    """The module of ours behind an imported dotted name: vllm_steer.common.errors.SteeringError -> config."""
    first, *rest = name.split(".")
    if first != "vllm_steer":
        return None
    while rest and not ((ROOT.joinpath(*rest)).is_dir() or (ROOT.joinpath(*rest)).with_suffix(".py").is_file()):
        rest.pop()
    return ".".join(rest)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    name = name_of(path)
    used = {module for full, _ in imported(path) if (module := ours(full)) is not None} - {name}
    if name.split(".")[0] == "serving":
        assert {m for m in used if m.split(".")[0] != "serving"} <= SERVING_SEES
        return
    assert name in RANK, f"give {path.name} a rank in {Path(__file__).name}"
    for module in used:
        assert module in RANK and RANK[module] < RANK[name], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_serving_touches_vllm(path: Path) -> None:
    if name_of(path).split(".")[0] == "serving":
        return
    for full, at_import in imported(path):
        if full.split(".")[0] == "vllm":  # its public offline engine is everybody's, when used
            assert full in PUBLIC and not at_import, f"{path.name} imports {full}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_the_tests_or_patches(path: Path) -> None:
    assert not {full.split(".")[0] for full, _ in imported(path)} & {"tests", "pairs", "patches", "pytest"}


@pytest.mark.parametrize(
    "module", ["vllm_steer", "vllm_steer.drafters.steered.config", "vllm_steer.cli", "vllm_steer.serving"]
)
def test_light_modules(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'vllm', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
