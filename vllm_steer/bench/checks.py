"""Whether an answer is right, for prompts that come with an answer (a number) or with tests (of a Python function).

Tests run what a model wrote: only where that was asked for (`--run-code`), in a process with little time and memory, no
network, no further process and no file to write. That keeps accidents from this machine, not attacks: run strangers'
models in a container.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FENCE = re.compile(r"```[\w+-]*\n(.*?)(?:```|\Z)", re.DOTALL)
SECONDS, BYTES = 10, 2**30  # of a test: processor time, and address space
PASSED = 42  # the exit code after the last assertion: an answer that ends its process early has not passed
GUARD = """\
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
program = compile(sys.stdin.read(), "answer", "exec")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NEVER = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "signal.", "resource.", "pty.", "mmap.")
READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
def deny(event, found):
    if event.startswith(NEVER) and event not in READS or event == "open" and (found[2] or 0) & WRITES:
        raise PermissionError(event + " is not allowed in a test")
sys.addaudithook(deny)
exec(program, {{"__name__": "__answer__"}})
sys.stdout.flush()
os._exit({passed})
"""


def correct(wanted: dict[str, str], prompt: Any, answer: str, run_code: bool) -> bool | None:
    """Whether an answer is right; None: its tests may not be run.

    A number is the last one of the answer. A function is that of the first fenced block that defines it, or the text
    of the prompt continued up to the first line that is not indented.
    """
    if "answer" in wanted:
        return _number(answer) == _number(wanted["answer"])
    if not run_code:
        return None
    before = prompt if isinstance(prompt, str) else ""
    return passes(
        program(before, answer, wanted["entry_point"]) + f"\n{wanted['test']}\ncheck({wanted['entry_point']})\n"
    )


def program(prompt: str, answer: str, name: str) -> str:
    """The Python that defines function `name`: of the prompt and the answer that continues it, or of the answer."""
    defines = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    blocks = [block for block in FENCE.findall(answer) if defines.search(block)]
    if blocks or defines.search(answer):
        head = prompt[: match.start()] if (match := defines.search(prompt)) else ""
        return head + (blocks or [answer])[0]
    lines = answer.split("\n")
    end = next((i for i, line in enumerate(lines[1:], 1) if line[:1].strip()), len(lines))
    return prompt + "\n".join(lines[:end])


def passes(code: str) -> bool:
    """Whether a program runs to its end under the guard above."""
    guard = GUARD.format(seconds=SECONDS, bytes=BYTES, passed=PASSED)
    with tempfile.TemporaryDirectory() as empty:
        try:
            ended = subprocess.run(
                [sys.executable, "-I", "-c", guard],
                input=code.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=empty,
                env={},
                timeout=2 * SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return ended.returncode == PASSED


def _number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
