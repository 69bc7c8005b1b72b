"""The tool that writes the README's matrix: it names tests that exist, and claims nothing that did not run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matrix
import pytest
from repository import ROOT

TESTS = {path.stem: path for path in ROOT.glob("tests/**/test_*.py")}
RESULTS = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_fine[v1-k]"/><testcase classname="tests.test_a" name="test_fine[v2-k]"/>
<testcase classname="tests.test_a" name="test_mixed[v1]"><failure message="m"/></testcase>
<testcase classname="tests.test_a" name="test_mixed[v2]"><skipped message="not testable here: no GPU"/></testcase>
<testcase classname="tests.test_a" name="test_lazy[v1]"><skipped message="not today"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "matrix.xml"
    path.write_text(RESULTS)
    return path


def run(monkeypatch: pytest.MonkeyPatch, rows: dict, *arguments: str) -> None:
    monkeypatch.setattr(matrix, "MATRIX", rows)
    monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
    matrix.main()


def test_every_test_of_the_matrix_exists() -> None:
    assert set(matrix.TREES) <= set(matrix.MATRIX)
    for wanted in (*matrix.MATRIX.values(), *matrix.TREES.values()):
        for group in wanted.values() if isinstance(wanted, dict) else [wanted]:
            for test in group[:1] if isinstance(group, tuple) else group:
                file, _, function = test.partition("[")[0].partition("::")
                assert re.search(rf"^def {function}\(", TESTS[file].read_text(), re.MULTILINE), test


def test_a_cell_is_the_worst_of_its_tests(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter\n")
    rows = {"one": ["test_a::test_fine[k]"], "two": ["test_a::test_fine", "test_a::test_mixed"]}
    rows["three"] = {"v1": ("test_a::test_fine", "because"), "v2": ["test_a::test_fine"]}
    monkeypatch.setattr(matrix, "TREES", {"one": ["test_a::test_mixed"]})
    run(monkeypatch, rows, str(results), "--write", str(readme))
    text = readme.read_text()
    assert "| one | works | works | **fails** | not testable here: no GPU | `a`, `trees` |" in text
    assert "| two | **fails** | not testable here: no GPU | not tested | not tested | `a` |" in text
    assert "| three | refused: because | works | not tested | not tested | `a` |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


@pytest.mark.parametrize(
    ("test", "message"),
    [("test_a::test_gone", "test_a::test_gone has no result for v1"), ("test_a::test_lazy", "for another reason")],
)
def test_nothing_is_claimed_that_did_not_run(
    test: str, message: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, {"row": [test]}, str(results))


def test_a_file_without_the_comments(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(SystemExit, match="must have the line"):
        run(monkeypatch, {"one": ["test_a::test_fine"]}, str(results), "--write", str(tmp_path / "README.md"))
