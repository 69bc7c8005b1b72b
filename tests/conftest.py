"""Fixtures that tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import long_tests
import pytest
from engines import Runner


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the long tests, before `-m` chooses."""
    long = long_tests.find((item.nodeid for item in items), whole_files=not any("::" in word for word in config.args))
    for item in items:
        if item.nodeid in long:
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a verb sets for its own process (`doctor` silences vLLM) does not reach the servers of later tests."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


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
