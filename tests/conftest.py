"""Fixtures every engine test shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from engines import Runner


@pytest.fixture(scope="session")
def runners() -> Iterator[Callable[[str], Runner]]:
    """`runners("v1")`, `runners("v2")`: the engine process of that model runner, started when first asked for."""
    live: dict[str, Runner] = {}

    def get(name: str) -> Runner:
        if name not in live:
            live[name] = Runner(name)
        return live[name]

    yield get
    for runner in live.values():
        runner.close()
