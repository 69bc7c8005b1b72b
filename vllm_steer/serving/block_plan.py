"""What the front end decided about a block drafter, as data that travels to every worker in its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_steer.drafters.block.config import METHODS, kind_of
from vllm_steer.serving.kill_switch import disabled
from vllm_steer.serving.plan import Written, tree_of

BLOCK = "vllm_steer_block"


@dataclass(frozen=True)
class BlockPlan:
    """How the drafts of a block are made dependent on each other."""

    kind: str  # of drafters/block/config.py
    ngram: str | None  # the directory whose ngram/ rescores them; None: there is none
    alpha: float  # weight of the bigram for greedy drafts
    alpha_sampled: float  # and for sampled ones
    tree_rows: int | None = None  # None: a chain is drafted

    @property
    def repairs(self) -> bool:
        """Whether it changes what vLLM would draft."""
        return self.ngram is not None or self.kind == "treeflash" or self.tree_rows is not None


def config_of(vllm_config: Any) -> Any:
    """The Hugging Face config of a block drafter of a known kind, None of any other drafter."""
    spec = vllm_config.speculative_config
    if spec is None or spec.method not in METHODS.values():
        return None
    found = spec.draft_model_config.hf_config
    return found if kind_of(found) is not None else None


def block_plan(vllm_config: Any) -> BlockPlan | None:
    """The plan of an engine, as `prepare` wrote it; None: vLLM drafts as it always does."""
    found = getattr(config_of(vllm_config), BLOCK, None)
    return BlockPlan(**found) if isinstance(found, Written) and found and not disabled() else None


def counts_unsteered(vllm_config: Any) -> bool:
    """Whether an engine that is not steered counts its blocks: it drafts trees, or the blocks of a repaired DFlash."""
    plan = block_plan(vllm_config)
    repaired = plan is not None and plan.repairs and plan.kind != "medusa"
    return repaired or tree_of(vllm_config) is not None
