"""One way to serve the target, measured in a process of its own.

At each temperature the engine answers a few prompts to warm up, then all of them for counts and speed, then one batch
with a timer around its drafter: the timer synchronises the device, so it stays out of the speed.

    python -m vllm_steer.bench.candidate JOB RESULT      called by `measure_in_a_process`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from vllm_steer.bench import block_counting, processes, quality
from vllm_steer.common import provenance
from vllm_steer.common.errors import SteeringError
from vllm_steer.common.lenience import Lenience
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.drafters.block import ngram
from vllm_steer.drafters.block.config import METHODS, BlockConfig, is_block_drafter
from vllm_steer.drafters.models import read_model_config
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig, check_pair

TREE_MARK = "@tree:"
ROWS_MARK = "@rows:"  # draft trees of so many rows, which part where the drafter is unsure
LENIENCE_MARK = "@lenience:"  # and an epsilon, and maybe : and a form
BLIND_MARK = "@blind"  # of a block drafter: its drafts do not depend on each other
NONE = "none"  # the name of the contender without speculation
WARM_UP = 16  # tokens


class Settings(TypedDict):
    """Everything the numbers depend on that all candidates share, as stored in results.json."""

    target: str
    target_weights: str
    prompts: str
    split: str | None
    number_of_prompts: int
    prompts_sha256: str
    k: int
    max_tokens: int
    temperature: list[float]
    batch: int
    max_model_len: int
    engine: dict[str, Any]  # further options of vLLM's
    seed: int
    sampling: str
    judged: NotRequired[bool]  # answers are judged, because a contender is lenient
    run_code: NotRequired[bool]
    conditions: dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """No speculation (no drafter), a drafter, or an adapter with its base drafter; directories or hub ids."""

    name: str
    drafter: str | None = None
    adapter: str | None = None
    tree: tuple[int, ...] | None = None  # children of every node by depth; None: chains
    rows: int | None = None  # draft trees of so many rows, which part where the drafter is unsure
    blind: bool = False  # of a block drafter: without its approximator or bigram
    lenience: str | None = None  # EPSILON or EPSILON:FORM; None: the output is the target's

    @classmethod
    def parse(cls, text: str) -> Contender:
        """From NAME=DRAFTER or NAME=ADAPTER+DRAFTER, with @tree:W,W,... or @rows:L, of a block drafter @blind, and last
        @lenience:EPSILON."""
        name, equals, value = text.partition("=")
        value, given, lenience = value.partition(LENIENCE_MARK)
        blind, value = value.endswith(BLIND_MARK), value.removesuffix(BLIND_MARK)
        value, _, count = value.partition(ROWS_MARK)
        rows = None if not count else int(count) if count.isdigit() and int(count) else -1
        value, marked, widths = value.partition(TREE_MARK)
        tree = TreeShape.parse(widths).widths if marked else None
        if not equals or not value or rows == -1 or not re.fullmatch(r"[\w.-]+", name):
            raise SteeringError(
                f"--drafters has {text!r}, allowed is NAME=DRAFTER or NAME=ADAPTER+DRAFTER, with a name of letters, "
                f"digits and . _ -, and at the end {TREE_MARK}W,W,... or {ROWS_MARK}L for draft trees; of a block "
                f"drafter {BLIND_MARK} for drafts that do not depend on each other, and last {LENIENCE_MARK}EPSILON "
                "for output that is not the target's"
            )
        adapter, plus, drafter = value.partition("+")
        steered = bool(plus) and not Path(value).exists()
        models = {"drafter": drafter, "adapter": adapter} if steered else {"drafter": value}
        found = cls(name, **models, tree=tree, rows=rows, blind=blind, lenience=lenience if given else None)
        found.read_lenience()
        return found

    def read_lenience(self) -> Lenience | None:
        """What its output gives up, None for nothing. Raises SteeringError for what is no lenience."""
        if self.lenience is None:
            return None
        epsilon, _, form = self.lenience.partition(":")
        try:
            number: float | str = float(epsilon)
        except ValueError:
            number = epsilon
        return Lenience.read({"epsilon": number, "form": form or "linear"}, f"--drafters {self.name}{LENIENCE_MARK}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Contender:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**raw | {"tree": raw["tree"] and tuple(raw["tree"])})

    @property
    def method(self) -> str | None:
        """vLLM's `method` of a block drafter; None for whole language models."""
        if self.drafter is None or not is_block_drafter(self.drafter):
            return None
        return METHODS[BlockConfig.read(self.drafter).kind]

    def drafts(self, k: int) -> int:
        """Draft tokens of a block of depth k, as vLLM counts them: for a tree those of all rows."""
        if self.drafter is None:
            return 0
        shape = self.shape(k)
        return k if shape is None else shape.drafts

    def shape(self, k: int) -> TreeShape | None:
        """The rows of its trees, None for chains."""
        return TreeShape.asked(self.tree, self.rows, k)

    @property
    def steering(self) -> Path | None:
        """The steering/ folder it drafts with; None for a plain drafter."""
        if self.adapter is not None:
            return checkpoint.resolve(self.adapter) / checkpoint.FOLDER
        if self.drafter is None:
            return None
        here = checkpoint.resolve(self.drafter)  # of a hub id its snapshot
        return here / checkpoint.FOLDER if checkpoint.has_steering(here) else None

    def check(self, target: Any) -> Any:
        """The drafter's transformers config, None without one; `target` is the target's.

        Raises SteeringError when there is no such model, or its steering was trained for other models.
        """
        if self.drafter is None:
            return None
        if self.method is not None:
            BlockConfig.read(self.drafter).check_target(target)
            return None
        if self.blind:
            raise SteeringError(
                f"{self.name} has {BLIND_MARK}, and {self.drafter} is no block drafter: drop {BLIND_MARK}"
            )
        if checkpoint.has_steering(self.drafter) and not checkpoint.has_drafter(self.drafter):
            raise SteeringError(
                f"{self.drafter} is an adapter: give its base drafter as well, {self.name}={self.drafter}+DRAFTER"
            )
        drafter = read_model_config(self.drafter)
        if (steering := self.steering) is not None:
            check_pair(SteeringConfig.read(steering / "config.json"), target, drafter)
        return drafter

    def identity(self) -> dict[str, Any]:
        """What is measured under the name: as typed, and by fingerprint."""
        steering = self.steering
        return {
            "drafter": self.drafter,
            "adapter": self.adapter,
            "drafter_weights": provenance.fingerprint(self.drafter) if self.drafter else None,
            "steering_weights": provenance.fingerprint(steering) if steering else None,
        } | self._variant()

    def _variant(self) -> dict[str, Any]:
        """What an identity has only where it is so, so that older results stay the same."""
        found: dict[str, Any] = {"tree": list(self.tree)} if self.tree else {}
        found |= {"lenience": str(self.read_lenience())} if self.lenience else {}
        found |= {"rows": self.rows} if self.rows else {}
        if self.drafter is not None and self.method is not None:
            table = Path(self.drafter) / ngram.FOLDER
            found |= {"blind": self.blind, "rows": self.rows}
            found["ngram_weights"] = provenance.fingerprint(table) if ngram.has_ngram(self.drafter) else None
        return found


def measure_in_a_process(contender: Contender, settings: Settings, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """`measure` in a fresh Python under this process's environment. Raises SteeringError when it fails."""
    return processes.run(
        "vllm_steer.bench.candidate", contender.name, [dataclasses.asdict(contender), settings, prompts]
    )


def work(raw: dict[str, Any], settings: Settings, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """`measure`, from JSON."""
    return measure(Contender.from_dict(raw), settings, prompts)


def measure(contender: Contender, settings: Settings, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure at every temperature.

    Args:
        settings: what the contenders have in common.
        prompts: [{"id", "category", "ids": token ids}], where they are judged with "text" and "expected".

    Returns {"environment", "steered", "scale", "sampling", "peak_memory": a dict per worker, "runs": one per
    temperature}; "scale" is None for a drafter that is not steered. Raises
    SteeringError when blocks cannot be counted; vLLM's own exceptions pass.
    """
    from vllm_steer.serving import probe

    llm = open_engine(contender, settings, settings["k"], any(settings["temperature"]), settings["batch"])
    try:
        own = probe.own_sampling(llm) if settings["sampling"] == "served" else {}
        runs = [_run(llm, contender, t, own, settings, prompts) for t in settings["temperature"]]
        return {
            "environment": probe.describe(llm),
            "steered": all(llm.collective_rpc(probe.is_steered)),
            "scale": llm.collective_rpc(probe.scale)[0],
            "sampling": own,
            "peak_memory": llm.collective_rpc(probe.memory),
            "runs": runs,
        }
    finally:
        llm.llm_engine.engine_core.shutdown()


def open_engine(contender: Contender, settings: Any, k: int, sampled: bool, batch: int, varying: bool = False) -> Any:
    """An engine that serves this way, see probe.open_engine."""
    from vllm_steer.serving import probe

    return probe.open_engine(
        settings["target"],
        contender.drafter,
        contender.adapter,
        k=k,
        sampled=sampled,
        batch=batch,
        max_model_len=settings["max_model_len"],
        seed=settings["seed"],
        options=settings["engine"],
        tree=contender.tree,
        method=contender.method,
        rows=contender.rows,
        blind=contender.blind,
        lenience=contender.read_lenience(),
        varying=varying,
    )


def _run(
    llm: Any,
    contender: Contender,
    temperature: float,
    own_sampling: dict[str, Any],
    settings: Settings,
    prompts: list[dict[str, Any]],
) -> dict[str, Any]:
    from tqdm import tqdm

    from vllm_steer.serving import probe

    k = settings["k"] if contender.drafter else 0
    batch, most = settings["batch"], settings["max_tokens"]
    common: dict[str, Any] = {"batch": batch, "temperature": temperature, "seed": settings["seed"]}
    common["sampling"] = own_sampling
    ids = [prompt["ids"] for prompt in prompts]
    probe.drive(llm, ids[:batch], max_tokens=min(WARM_UP, most), **common)
    common["max_tokens"] = block_counting.tokens_to_ask(most, k)
    with tqdm(total=len(ids), desc=f"{contender.name}, T={temperature:g}", unit="prompt") as bar:
        deliveries, clock = probe.drive(llm, ids, finished=bar.update, **common)
    if preempted := probe.preemptions(llm):
        raise SteeringError(
            f"vLLM preempted {preempted} requests for want of KV cache, and verifies drafts nobody made when they come "
            "back: lower --batch or --max-model-len, or give vLLM more memory"
        )
    answers = [count(prompt, d, most, k, contender.drafts(k)) for prompt, d in zip(prompts, deliveries, strict=True)]
    drafter = drafting(llm, ids[:batch], common) if k else None
    if settings.get("judged"):
        judged = quality.judge(llm, prompts, [d.ids[:most] for d in deliveries], settings.get("run_code", False))
        answers = [a | j for a, j in zip(answers, judged, strict=True)]
    return {
        "temperature": temperature,
        "clock": {key: value for key, value in dataclasses.asdict(clock).items() if key != "steps"},
        "drafting_share": None if drafter is None else drafter[0] / drafter[1].decode_seconds,
        "answers": answers,
    }


def count(prompt: dict[str, Any], delivery: Any, max_tokens: int, k: int, drafts: int) -> dict[str, Any]:
    """One answer for the record: its blocks, and a digest of its first `max_tokens` tokens."""
    answer = block_counting.count(
        prompt["id"],
        prompt["category"],
        delivery.steps,
        max_tokens=max_tokens,
        k=k,
        drafts=drafts,
        accepted=delivery.accepted,
        drafted=delivery.drafted,
        stopped=delivery.finish == "stop",
    )
    digest = hashlib.sha256(json.dumps(delivery.ids[:max_tokens]).encode()).hexdigest()
    return answer.to_dict() | {"tokens_sha256": digest[:16]}


def drafting(llm: Any, prompts: list[list[int]], common: dict[str, Any]) -> tuple[float, Any] | None:
    """Seconds after the prefill that one batch spends in the drafter, and its clock; None if no step comes after it."""
    from vllm_steer.serving import probe

    started = False

    def before_step(prefilling: bool) -> None:
        nonlocal started
        if not prefilling and not started:
            llm.collective_rpc(probe.reset_timing)
            started = True

    llm.collective_rpc(probe.start_timing)
    _, clock = probe.drive(llm, prompts, before_step=before_step, **common)
    seconds = max(llm.collective_rpc(probe.stop_timing))
    return (seconds, clock) if started else None


if __name__ == "__main__":
    processes.main(work)
