"""What a block drafter is, by its config.json: the layouts that vLLM and the authors of TreeFlash read.

Layer ids are DFlash's: id i is the *output* of the target's layer i, which vLLM and this project count as the input of
layer i + 1 (`BlockConfig.states`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.models import text_config

KINDS = {
    "dflash": "layers that read the target's states and fill a block of masks (DFlash, arXiv 2602.06036)",
    "treeflash": "DFlash and an approximator of the token before (TreeFlash, arXiv 2606.03819)",
    "medusa": "a head per position on the target's last state (Medusa, arXiv 2401.10774)",
}
METHODS = {"dflash": "dflash", "treeflash": "dflash", "medusa": "medusa"}  # vLLM's `method` of each kind
ARCHITECTURES = {
    "DFlashDraftModel": "dflash",
    "TreeFlashDraftModel": "treeflash",
    "DFlashTreeFlashDraftModel": "treeflash",
    "MedusaModel": "medusa",
}
CANDIDATE_HEADS = ("DFlash2DraftModel", "LiLiCorrDraftModel")  # vLLM's own, of V2 alone
APPROXIMATION = "swiglu"  # the form of TreeFlash's approximator
WRITTEN_AS = {"dflash": "DFlashDraftModel", "treeflash": "TreeFlashDraftModel", "medusa": "MedusaModel"}


@dataclass(frozen=True)
class BlockConfig:
    """The parts of a config.json that this project reads; `raw` is all of it."""

    kind: str
    raw: dict[str, Any]
    where: str  # for messages

    @classmethod
    def read(cls, directory: str | Path) -> BlockConfig:
        """The config of a model directory. Raises SteeringError for one that is no block drafter's, or is damaged."""
        path = Path(directory) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SteeringError(f"{path} is missing: give the directory of a block drafter") from None
        except (OSError, ValueError, RecursionError) as error:
            raise SteeringError(f"{path} is damaged ({error}): copy it again") from None
        if not isinstance(raw, dict):
            raise SteeringError(f"{path} is not an object: copy it again")
        return cls.of(raw, str(path))

    @classmethod
    def of(cls, raw: dict[str, Any], where: str) -> BlockConfig:
        """The config in a dict, checked. Raises SteeringError naming what is wrong with it."""
        kind = kind_of(raw)
        if kind is None:
            raise SteeringError(
                f"{where}: architectures is {raw.get('architectures')!r}, allowed for a block drafter is one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        found = cls(kind, raw, where)
        found._check()
        return found

    def _check(self) -> None:
        for key in ("hidden_size", "vocab_size", "num_hidden_layers", self._length_key):
            self._count(key)
        if self.kind == "medusa":
            return
        self._count("intermediate_size")
        for key in ("target_layer_ids", "mask_token_id"):
            if key not in self._dflash:
                raise SteeringError(f"{self.where}: dflash_config has no {key}, which says how the drafter is fed")
        ids = self._dflash["target_layer_ids"]
        if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
            raise SteeringError(f"{self.where}: target_layer_ids is {ids!r}, allowed is a list of layer numbers from 0")
        if type(mask := self._dflash["mask_token_id"]) is not int or not 0 <= mask < self.vocab_size:
            raise SteeringError(f"{self.where}: mask_token_id is {mask!r}, allowed is 0 to {self.vocab_size - 1}")
        if self.kind == "treeflash" and (name := self._treeflash.get("ar_approximation")) != APPROXIMATION:
            raise SteeringError(
                f"{self.where}: treeflash_config.ar_approximation is {name!r}, known is {APPROXIMATION!r}"
            )

    def _count(self, key: str) -> int:
        value = self.raw.get(key)
        if type(value) is not int or not 0 < value < 2**31:
            raise SteeringError(f"{self.where}: {key} is {value!r}, allowed is a whole number from 1 up")
        return value

    @property
    def _length_key(self) -> str:
        return "num_heads" if self.kind == "medusa" else "block_size"

    @property
    def _dflash(self) -> dict[str, Any]:
        found = self.raw.get("dflash_config")
        return found if isinstance(found, dict) else {}

    @property
    def _treeflash(self) -> dict[str, Any]:
        found = self.raw.get("treeflash_config")
        return found if isinstance(found, dict) else {}

    @property
    def hidden_size(self) -> int:
        """H, of drafter and target alike: the target embeds and reads out for the drafter."""
        return self.raw["hidden_size"]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.raw["vocab_size"]

    @property
    def layers(self) -> int:
        """Decoder layers of DFlash; residual blocks of a Medusa head."""
        return self.raw["num_hidden_layers"]

    @property
    def draft_length(self) -> int:
        """k: the most tokens it drafts. DFlash's block_size counts the newest token too."""
        return self.raw["num_heads"] if self.kind == "medusa" else self.raw["block_size"] - 1

    @property
    def states(self) -> tuple[int, ...]:
        """Target layers whose *inputs* it reads, as the rest of this project counts them; () for Medusa."""
        return () if self.kind == "medusa" else tuple(i + 1 for i in self._dflash["target_layer_ids"])

    @property
    def mask_token(self) -> int:
        """The token that stands for one to be drafted."""
        return self._dflash["mask_token_id"]

    @cached_property
    def model(self) -> Any:
        """DFlash layers as transformers describes them, a Qwen3Config."""
        from transformers import Qwen3Config

        try:
            return Qwen3Config(
                **{key: value for key, value in self.raw.items() if key not in ("architectures", "dtype")}
            )
        except Exception as error:  # a wrong value surfaces as whatever it breaks first
            reason = " ".join(str(error).split())[:300]
            raise SteeringError(f"{self.where} does not describe Qwen3 layers ({reason}): copy it again") from None

    def check_target(self, target: Any) -> None:
        """Raise SteeringError unless it fits a target, given by its transformers config."""
        target = text_config(target)
        for key in ("hidden_size", "vocab_size"):
            if (theirs := getattr(target, key, None)) != getattr(self, key):
                raise SteeringError(
                    f"{self.where}: {key} is {getattr(self, key)}, the target's is {theirs}: it was made for another "
                    "target"
                )
        count = target.num_hidden_layers
        if (layers := self.raw.get("num_target_layers")) not in (None, count):
            raise SteeringError(f"{self.where}: it was made for a target of {layers} layers, this one has {count}")
        if self.states and max(self.states) >= count:
            raise SteeringError(
                f"{self.where}: target_layer_ids are {self._dflash['target_layer_ids']}, allowed for a target of "
                f"{count} layers is 0 to {count - 2}: DFlash counts the outputs of layers, vLLM's ids are one more"
            )


def kind_of(raw: Any) -> str | None:
    """The kind of a block drafter from its config, a dict or a transformers config; None: it is none that is known."""
    found = raw.get("architectures") if isinstance(raw, dict) else getattr(raw, "architectures", None)
    for name in found if isinstance(found, list) else ():
        if isinstance(name, str) and name in ARCHITECTURES:
            return ARCHITECTURES[name]
    return None


def is_block_drafter(directory: str | Path) -> bool:
    """Whether a local directory holds a block drafter."""
    try:
        return kind_of(json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))) is not None
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
