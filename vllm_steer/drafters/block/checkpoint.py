"""Block drafters on disk: the published layouts, and beside them what this project knows of those it made.

DIR/config.json               as vLLM and the authors have it
DIR/model*.safetensors        the same
DIR/record/config.json        whose target it is, provenance, acceptance     } of a drafter made here;
DIR/record/golden.safetensors inputs, and the states they must give          } a published one has neither
DIR/ngram/                    a bigram, if one was counted (ngram.py)
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.files import write_json
from vllm_steer.drafters.block.config import WRITTEN_AS, BlockConfig
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.drafters.models import read_model_config, require_readable, weight_files
from vllm_steer.drafters.safe_tensors import FLOATS, read_tensors
from vllm_steer.drafters.steered.checkpoint import own_file

RECORD = "record"
CONFIG, GOLDEN, WEIGHTS = "config.json", "golden.safetensors", "model.safetensors"
GOLDEN_TOKENS, GOLDEN_TABLE = 2, 4  # context tokens, and embeddings that stand for the target's
GOLDEN_TOLERANCE = 1e-4  # relative to the largest value; float32 on any machine is far inside it
UNUSED = re.compile(r"(^|\.)(embed_tokens|rotary_emb)\.|^lm_head\.")  # of DFlash files; the target's are used


@dataclass(frozen=True)
class Record:
    """record/config.json."""

    target: str  # name
    fingerprint: str  # of the target, its tokenizer included
    provenance: dict[str, Any] = field(default_factory=dict)
    acceptance: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1


def save(directory: str | Path, drafter: BlockDrafter, record: Record) -> None:
    """Write a block drafter, in the dtype of its weights, with its record and golden values."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().cpu().contiguous() for name, x in file_tensors(drafter).items()}
    bad = [name for name, x in weights.items() if not torch.isfinite(x).all()]
    if bad:
        raise SteeringError(f"tensor {bad[0]} has values that are not finite: not saved")
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    raw = drafter.config.raw | {"architectures": [WRITTEN_AS[drafter.config.kind]]}
    write_json(directory / CONFIG, raw | {"dtype": str(next(iter(weights.values())).dtype).removeprefix("torch.")})
    folder = directory / RECORD
    folder.mkdir(exist_ok=True)
    save_file(_golden(copy.deepcopy(drafter).float().cpu()), folder / GOLDEN)
    write_json(folder / CONFIG, asdict(record))
    for path in (directory / WEIGHTS, folder / GOLDEN):
        path.chmod(0o644)  # safetensors writes for the owner alone; servers run as somebody else


def file_tensors(drafter: BlockDrafter) -> dict[str, Tensor]:
    """The state of a drafter under the keys of its file."""
    return {name.removeprefix(_prefix(drafter.config)): x for name, x in drafter.state_dict().items()}


def _prefix(config: BlockConfig) -> str:
    """What a drafter's keys have before those of its file."""
    return "model." if config.kind == "dflash" else ""


def load(directory: str | Path, dtype: torch.dtype = torch.float32) -> BlockDrafter:
    """Read and check a block drafter, published or made here, from its files alone.

    Raises SteeringError for anything missing, damaged, of another shape, or whose states differ from golden ones.
    """
    directory = Path(directory)
    config = BlockConfig.read(own_file(directory / CONFIG, directory).parent)
    drafter = _shaped(config)
    wanted = {name: tuple(x.shape) for name, x in file_tensors(drafter).items()}
    found = _read(directory, config, wanted)
    weights = {_prefix(config) + name: x.to(torch.float32, copy=True) for name, x in found.items()}
    drafter.load_state_dict(weights, assign=True)
    if (directory / RECORD).is_dir():
        _check_golden(own_file(directory / RECORD / GOLDEN, directory), drafter)
        read_record(directory)
    return drafter.to(dtype).requires_grad_(False)


def _shaped(config: BlockConfig) -> BlockDrafter:
    """A drafter without values. Raises SteeringError for a config of which none can be made."""
    try:
        return BlockDrafter(config, device="meta")
    except SteeringError:
        raise
    except Exception as error:  # a wrong value surfaces as whatever it breaks first, in transformers or torch
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SteeringError(f"{config.where} describes no drafter that could be ({reason}): copy it again") from None


def read_record(directory: str | Path) -> Record | None:
    """What is on record of a drafter; None for one that was not made here. Raises SteeringError for a damaged one."""
    path = Path(directory) / RECORD / CONFIG
    if not path.is_file():
        return None
    try:
        found = Record(**json.loads(own_file(path, Path(directory)).read_text(encoding="utf-8")))
        if not isinstance(found.target, str) or not isinstance(found.fingerprint, str):
            raise ValueError("not what was written")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, SteeringError):
            raise
        raise SteeringError(f"{path} is damaged ({error}): copy the {RECORD}/ folder again") from None
    if found.format_version != 1:
        raise SteeringError(f"{path} is version {found.format_version}, known is 1: upgrade vllm-steer")
    return found


def load_for(directory: str | Path, target: str | Path, dtype: torch.dtype = torch.float32) -> BlockDrafter:
    """`load`, then check it against the config of the target it will draft for."""
    BlockConfig.read(directory).check_target(read_model_config(target))
    return load(directory, dtype)


def _read(directory: Path, config: BlockConfig, wanted: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The wanted tensors of all weight files. What vLLM does not use either may be there besides."""
    found: dict[str, Tensor] = {}
    for path in weight_files(directory):
        if path.suffix != ".safetensors":
            raise SteeringError(f"{path} is a pickle; only safetensors are loaded: convert it, or delete the file")
        require_readable(own_file(path, directory))
        with safe_open(path, "pt") as file:
            names = {_current_key(name, config): name for name in file.keys()}  # noqa: SIM118  # not a dict
            for name in sorted(names.keys() - wanted.keys()):
                if not UNUSED.search(name):
                    raise SteeringError(
                        f"{path}: unknown tensor {names[name]!r}; allowed are {', '.join(sorted(wanted))}"
                    )
            found |= {name: file.get_tensor(key) for name, key in names.items() if name in wanted}
    for name, shape in wanted.items():
        if name not in found:
            raise SteeringError(f"{directory}: tensor {name!r} is missing: copy or save the whole drafter again")
        if tuple(found[name].shape) != shape:
            raise SteeringError(
                f"{directory}: tensor {name!r} has shape {list(found[name].shape)}, config.json asks for {list(shape)}"
            )
        if found[name].dtype not in FLOATS or not torch.isfinite(found[name]).all():
            raise SteeringError(f"{directory}: tensor {name!r} is no tensor of finite floats: copy it again")
    return found


def _current_key(name: str, config: BlockConfig) -> str:
    """Medusa's first files number their modules: HEAD.LAYER.linear.weight, HEAD.LAST.weight for the read-out."""
    if config.kind != "medusa":
        return name
    name = name.removeprefix("medusa_heads.")
    if match := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        return "blocks.{}.layers.{}.{}".format(*match.groups())
    match = re.fullmatch(r"(\d+)\.\d+\.weight", name)
    return name if match is None else f"lm_heads.{match.group(1)}.weight"


@torch.no_grad()
def _golden(drafter: BlockDrafter, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Fixed random inputs, or those given, and what the drafter, in float32, makes of them: hidden [k, H]."""
    config, generator = drafter.config, torch.Generator().manual_seed(0)
    wide = max(1, len(config.states)) * config.hidden_size
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    states, table = (given["states"], given["table"]) if given else (
        random(1, GOLDEN_TOKENS, wide), random(GOLDEN_TABLE, config.hidden_size))  # fmt: skip
    embed = lambda ids: table[ids % GOLDEN_TABLE]  # noqa: E731
    newest, anchor, k = torch.tensor([[1]]), torch.tensor([[GOLDEN_TOKENS]]), config.draft_length
    hidden = drafter.hidden(embed, newest, states, states[..., : config.hidden_size], anchor, k)
    out = drafter.corrected(hidden, embed, torch.arange(k).expand(1, 1, -1))[0, 0]
    return {"states": states, "table": table, "hidden": out.contiguous()}


def _check_golden(path: Path, drafter: BlockDrafter) -> None:
    config = drafter.config
    wide = max(1, len(config.states)) * config.hidden_size
    shapes = {
        "states": (1, GOLDEN_TOKENS, wide),
        "table": (GOLDEN_TABLE, config.hidden_size),
        "hidden": (config.draft_length, config.hidden_size),
    }
    golden = {name: x.float() for name, x in read_tensors(path, shapes).items()}
    found = _golden(drafter, golden)["hidden"]
    error = (found - golden["hidden"]).abs().max().item()
    allowed = GOLDEN_TOLERANCE * max(1.0, golden["hidden"].abs().max().item())
    if not error <= allowed:
        raise SteeringError(
            f"{path}: the weights give states that differ from the recorded ones by {error:.3g} (allowed "
            f"{allowed:.1g}): weights and golden file belong to different checkpoints; copy both again"
        )
