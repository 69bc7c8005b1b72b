"""A pair and its adapter, to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import make_pair

from vllm_steer.drafters.steered import checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", rank=4)


@pytest.fixture(scope="module")
def adapter(pair: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    checkpoint.save(directory, checkpoint.load(pair.steered))
    return directory


@pytest.fixture
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM waits two seconds before it reads a bad config.json again."""
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda seconds: None)
