"""The table of long tests: what it finds, and that a name that is no test's is noticed."""

from __future__ import annotations

import long_tests
import pytest

LENGTHS = "tests/engine/test_parity.py::test_other_draft_lengths"


def test_a_name_stands_for_its_parameters() -> None:
    names = [f"{LENGTHS}[7-v1]", f"{LENGTHS}[7-v2]", "tests/server/test_devices.py::test_an_unknown_vllm[newer]"]
    assert long_tests.find(names, whole_files=False) == set(names[1:])


def test_a_name_of_no_test_is_noticed() -> None:
    with pytest.raises(LookupError, match=r"which tests/engine/test_parity\.py does not have"):
        long_tests.find([f"{LENGTHS}[7-v2]"], whole_files=True)
