"""README and docs: links lead somewhere, commands parse, the CLI reference is current, no path of a machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from repository import ROOT

from vllm_steer import cli
from vllm_steer.serving.plan import Options

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(?:bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
VLLM_SERVE = ("serve",)  # passes on what it does not know


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        place = page.parent / name if name else page
        if not place.exists() or (anchor and anchor not in anchors(place.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def commands(text: str) -> list[list[str]]:
    """Every `vllm-steer` command in fenced blocks, continuation lines joined, as words."""
    lines = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("vllm-steer ")]


def refused(words: list[str]) -> bool:
    """Whether the parser does not take a command."""
    words = [word.replace("$ENGINE", "{}") for word in words]
    try:
        _, rest = cli._parser(words).parse_known_args(words)
    except SystemExit as end:
        return end.code != 0
    return bool(rest) and words[0] not in VLLM_SERVE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    assert not [words for words in commands(page.read_text(encoding="utf-8")) if refused(words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_path_of_a_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|Users|tmp)/\S*", page.read_text(encoding="utf-8"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in nav]


def test_the_cli_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs/cli_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.reference() == module.PAGE.read_text(encoding="utf-8"), "run python docs/cli_reference.py"


def test_what_these_tests_find(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[a](page.md#a-title) [b](page.md#no) [c](gone.md)\n```bash\nvllm-steer check X --no\n```\n"
    )
    assert dead_links(page) == ["page.md#no", "gone.md"]
    assert commands(page.read_text()) == [["check", "X", "--no"]] and refused(["check", "X", "--no"])
    assert refused(["train", "--target", "T"]) and not refused(["check", "X"])


def test_every_option_of_the_engine_is_explained() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", text.split("## Environment")[0], re.MULTILINE))
    assert explained == {field.name for field in dataclasses.fields(Options)}
