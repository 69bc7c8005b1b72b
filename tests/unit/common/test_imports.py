"""vLLM is met in one package only, and what runs everywhere is light.

That imports point one way is import-linter's to say: its contracts are in pyproject.toml, `make lint` checks them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_steer

ROOT = Path(vllm_steer.__file__).parent
PUBLIC = {"vllm.LLM", "vllm.RequestOutput", "vllm.SamplingParams", "vllm.sampling_params.RequestOutputKind"}
FILES = sorted(ROOT.rglob("*.py"))


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_serving_touches_vllm(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "serving":
        return
    for full, at_import in imported(path):
        if full.split(".")[0] == "vllm":  # its public offline engine is everybody's, when used
            assert full in PUBLIC and not at_import, f"{path.name} imports {full}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_the_tests_or_patches(path: Path) -> None:
    assert not {full.split(".")[0] for full, _ in imported(path)} & {"tests", "pairs", "patches", "pytest"}


@pytest.mark.parametrize(
    "module",
    [
        "vllm_steer",
        "vllm_steer.drafters.models",
        "vllm_steer.drafters.steered.config",
        "vllm_steer.cli",
        "vllm_steer.serving",
    ],
)
def test_light_modules(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'vllm', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
