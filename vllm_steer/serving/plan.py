"""What the front end decided, as data: the options it was given, and the plan that travels to every worker."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_steer.common.errors import SteeringError, require_positive_int
from vllm_steer.common.lenience import Lenience
from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.drafters.block.ngram import require_alpha
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.serving.kill_switch import KILL_SWITCH, disabled

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"  # where both model runners look for the target's layer ids
PLAN = "vllm_steer_plan"
TREE = "vllm_steer_tree"  # in the draft model's config too, of steered and of plain drafters
OP_VERSION = 2  # raise when the injected computation changes: it salts the compile caches
MAX_SCALE = 100
TREE_VERIFICATIONS = ("recursive", "coupled")
OPTIONS = "vllm_steer"  # key in vLLM's --additional-config


@dataclass(frozen=True)
class Options:
    """`--additional-config '{"vllm_steer": {...}}'`."""

    adapter: str | None = None  # directory or hub id with a steering/ folder; the draft model is its base drafter
    revision: str | None = None  # of the adapter, on the hub
    scale: float = 1.0  # multiplies every delta; 0 drafts like the plain drafter
    adapters: str | None = None  # directory below which the live switch may load others (serving/adapters.py)
    draft_graphs: bool = False  # V2: replay the drafter's decode passes as CUDA graphs
    filter_drafts: bool = True  # probabilistic drafts follow the request's top-k and top-p
    tree: list[int] | None = None  # children of every node by depth, in place of a chain of drafts
    tree_verification: str = "recursive"  # of sampled drafts, or "coupled"
    tree_rows: int | None = None  # rows of a tree that part where the drafter is unsure, in place of a chain of drafts
    refine: bool = True  # use the bigram beside a block drafter
    ngram: str | None = None  # directory with another ngram/
    alpha: float | None = None  # weight of the bigram, greedy and sampled (default: as it was tuned)
    lenience: Any = None  # a number, or {"epsilon", "form"}: what the output may give up (common/lenience.py)

    @classmethod
    def read(cls, additional: Any) -> Options:
        """Parse our key of vLLM's additional config. Raises SteeringError on unknown keys or wrong types."""
        raw = additional.get(OPTIONS, {}) if isinstance(additional, dict) else {}
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(raw, dict):
            raise SteeringError(f"additional-config key {OPTIONS!r} is {raw!r}, allowed is an object with {known}")
        for key in raw:
            if key not in known:
                raise SteeringError(f"additional-config {OPTIONS}: unknown key {key!r}; allowed are {', '.join(known)}")
        options = cls(**raw)
        options._check()
        return options

    @property
    def refines(self) -> bool:
        """Whether something is asked for by name that only block drafters have."""
        return any(each is not None for each in (self.ngram, self.alpha))

    def shape(self, k: int) -> TreeShape | None:
        """The tree of a draft model that drafts k deep; None: it drafts chains."""
        return TreeShape.asked(self.tree, self.tree_rows, k)

    def _check(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise SteeringError(f"additional-config {OPTIONS}: scale is {self.scale!r}, allowed is a number")
        if not abs(self.scale) <= MAX_SCALE:
            allowed = f"-{MAX_SCALE} to {MAX_SCALE}"
            raise SteeringError(f"additional-config {OPTIONS}: scale is {self.scale}, allowed is {allowed}")
        for key in ("draft_graphs", "filter_drafts", "refine"):
            if not isinstance(value := getattr(self, key), bool):
                raise SteeringError(f"additional-config {OPTIONS}: {key} is {value!r}, allowed are true and false")
        for key in ("adapter", "adapters", "revision", "ngram"):
            if not isinstance(getattr(self, key), str | None):
                raise SteeringError(f"additional-config {OPTIONS}: {key} must be a string")
        self._check_drafting()

    def _check_drafting(self) -> None:
        if self.lenience is not None:
            Lenience.read(self.lenience, f"additional-config {OPTIONS}: lenience")
        if self.alpha is not None:
            require_alpha(f"additional-config {OPTIONS}: alpha", self.alpha)
        if self.tree_rows is not None:
            require_positive_int(f"additional-config {OPTIONS}: tree_rows", self.tree_rows)
        if self.tree is not None:
            if not isinstance(self.tree, list):
                raise SteeringError(
                    f"additional-config {OPTIONS}: tree is {self.tree!r}, allowed is a list of whole numbers from 1 "
                    "up, the children of every node by depth, e.g. [4, 1, 1]"
                )
            TreeShape.of(self.tree)
            if self.tree_rows is not None:
                raise SteeringError(
                    f"additional-config {OPTIONS}: tree is {self.tree} and tree_rows is {self.tree_rows}: give one"
                )
        if self.tree_verification not in TREE_VERIFICATIONS:
            raise SteeringError(
                f"additional-config {OPTIONS}: tree_verification is {self.tree_verification!r}, allowed are "
                f"{' and '.join(TREE_VERIFICATIONS)}"
            )


class Written(dict):
    """A plan in a Hugging Face config, empty where the kill switch decided against steering.

    Its type says that `prepare` wrote it: a file can give a plain dict only.
    """


@dataclass(frozen=True)
class Plan:
    """What a worker needs to steer, and what the compiled drafter depends on."""

    source: str  # directory or hub id whose steering/ is loaded
    revision: str | None
    scale: float
    steered_layers: tuple[int, ...]
    projection_size: int
    max_num_seqs: int
    max_rows: int  # of one forward of the drafter
    draft_length: int
    op_version: int = OP_VERSION

    @staticmethod
    def of(vllm_config: VllmConfig) -> Plan | None:
        """The plan of an engine, or None when it is not steered.

        Raises SteeringError for a steered drafter that the front end did not look at, and for a plan that `prepare` did
        not write: both would go on unsteered.
        """
        found = written(vllm_config)
        if found is None:
            _refuse_overlooked(vllm_config)
        return Plan(**{**found, "steered_layers": tuple(found["steered_layers"])}) if found else None


def written(vllm_config: VllmConfig) -> Written | None:
    """What `prepare` decided for a drafter, None if it has not.

    Raises SteeringError for a forged config.json, or a plan whose type was lost on the way to a worker.
    """
    draft: Any = getattr(vllm_config.speculative_config, "draft_model_config", None)
    raw = getattr(getattr(draft, "hf_config", None), PLAN, None)
    if raw is None or (disabled() and not isinstance(raw, Written)):
        return None
    if not isinstance(raw, Written):
        raise SteeringError(
            f"{draft.model}/config.json has the key {PLAN!r}, which only the running plugin may set: remove it"
        )
    return raw


def _refuse_overlooked(vllm_config: VllmConfig) -> None:
    """Raise SteeringError for a steered drafter without a decision: in this vLLM `prepare` is never called."""
    import vllm

    draft = draft_model(vllm_config)
    if draft is None or disabled():
        return
    source, _ = source_of(draft, Options.read(vllm_config.additional_config))
    if source is not None:
        raise SteeringError(
            f"{source} is a steered drafter, and vllm-steer was not called to check it in the front end: this vLLM "
            f"({vllm.__version__}) has no place for that, or the plugin could not start (then the log says why): "
            f"install a vLLM that the README names, or set {KILL_SWITCH}=1 to serve the drafter unsteered"
        )


def tree_of(vllm_config: VllmConfig) -> TreeShape | None:
    """The tree an engine drafts, as `prepare` admitted it; None: it drafts chains."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    found = getattr(getattr(draft, "hf_config", None), TREE, None)
    if not isinstance(found, Written) or not found:
        return None
    return TreeShape(tuple(found["widths"]), found.get("adaptive", False))


def rejects_recursively(vllm_config: VllmConfig) -> bool:
    """Whether an engine's trees are sampled and verified by recursive rejection."""
    spec = vllm_config.speculative_config
    sampled = spec is not None and spec.method == "draft_model" and spec.draft_sample_method == "probabilistic"
    shape = tree_of(vllm_config)
    if not sampled or (shape is not None and shape.adaptive):
        return False  # which drafts of an adaptive tree are verified depends on them: only coupled draws are exact
    return Options.read(vllm_config.additional_config).tree_verification == "recursive"


def filters_drafts(vllm_config: VllmConfig) -> bool:
    """Whether a draft model, steered or plain, samples its drafts, and does so under the request's top-k and top-p."""
    spec = vllm_config.speculative_config
    sampled = spec is not None and spec.method == "draft_model" and spec.draft_sample_method == "probabilistic"
    return sampled and not disabled() and Options.read(vllm_config.additional_config).filter_drafts


def lenience_of(vllm_config: VllmConfig) -> Lenience | None:
    """What an engine's verification gives up; None: nothing, its output is the target's."""
    options = Options.read(vllm_config.additional_config)
    if options.lenience is None or disabled():
        return None
    found = Lenience.read(options.lenience, f"additional-config {OPTIONS}: lenience")
    return None if found.exact else found


def on_v2(vllm_config: VllmConfig) -> bool:
    """Whether vLLM has chosen its V2 model runner."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def draft_model(vllm_config: VllmConfig) -> Any:
    """vLLM's ModelConfig of a drafter that is a whole language model, or None."""
    spec = vllm_config.speculative_config
    return spec.draft_model_config if spec is not None and spec.method == "draft_model" else None


def source_of(draft: Any, options: Options) -> tuple[str | None, str | None]:
    """Where the steering comes from: the adapter, the draft model itself, or nowhere."""
    marked = getattr(draft.hf_config, checkpoint.MARKER, None) is not None
    local = Path(draft.model).is_dir()
    carries = checkpoint.has_steering(draft.model) if local else marked
    if options.adapter is not None:
        if marked or carries:
            raise SteeringError(
                f"the draft model {draft.model!r} carries its own steering and additional-config names the adapter "
                f"{options.adapter!r}: give the adapter's base drafter as draft model, or drop the adapter"
            )
        return options.adapter, options.revision
    if marked and not carries:
        raise SteeringError(
            f"{draft.model}/config.json says that it is a steered drafter, but its {checkpoint.FOLDER}/ folder is "
            f"missing: copy the folder from the checkpoint's source, or set {KILL_SWITCH}=1 to serve it unsteered"
        )
    return (draft.model, draft.revision) if carries else (None, None)
