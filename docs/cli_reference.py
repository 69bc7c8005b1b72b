"""Write docs/cli_reference.md from the parsers' own help.

python docs/cli_reference.py            writes it
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vllm_steer import cli

PAGE = Path(__file__).parent / "cli_reference.md"


def reference() -> str:
    """The page: the help of the command and of each verb, at a fixed width."""
    os.environ["COLUMNS"] = "110"
    parts = ["# CLI reference", "Written by `python docs/cli_reference.py`. Every verb has `--help`."]
    parts += [_block("vllm-steer", cli._parser([]))]
    for verb in verbs():
        parts += [f"## {verb}", _block(f"vllm-steer {verb}", _subparser(verb))]
    return "\n\n".join(parts) + "\n"


def verbs() -> list[str]:
    """Names of the verbs, in the order of `--help`."""
    return list(_choices([]))


def _subparser(verb: str) -> argparse.ArgumentParser:
    return _choices([verb])[verb]


def _choices(argv: list[str]) -> dict[str, argparse.ArgumentParser]:
    actions = cli._parser(argv)._actions
    return next(action.choices for action in actions if isinstance(action, argparse._SubParsersAction))


def _block(name: str, parser: argparse.ArgumentParser) -> str:
    lines = parser.format_help().replace(Path(parser.prog.split()[0]).name, "vllm-steer").splitlines()
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
