"""A new block drafter for a target: its config in the published layout, and a start from the target's own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.block.config import APPROXIMATION, WRITTEN_AS, BlockConfig
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OF_TARGET = (  # keys of a Qwen3 config that a drafter takes over
    *("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "hidden_act", "rope_parameters", "max_position_embeddings", "initializer_range"),
)


def new_config(config: TrainConfig, tokenizer: Any, target: Any, layers: tuple[int, ...]) -> BlockConfig:
    """The config of a new drafter of `config.kind`; `layers` are the target's, as inputs.

    Raises SteeringError for a target that is not of layers like Qwen3's.
    """
    raw: dict[str, Any] = {"architectures": [WRITTEN_AS[config.kind]], "hidden_size": target.hidden_size}
    raw |= {"vocab_size": target.vocab_size, "num_hidden_layers": config.layers}
    where = f"the new {config.kind} drafter"
    if config.kind == "medusa":
        raw |= {"model_type": "medusa", "num_heads": config.k, "original_lm_head": True}
        return BlockConfig.of(raw, where)
    if min(layers) < 1 or max(layers) >= target.num_hidden_layers:
        raise SteeringError(
            f"--target-layers are {list(layers)}, allowed for DFlash are inputs 1 to {target.num_hidden_layers - 1}: "
            "it counts the outputs of layers"
        )
    for key in OF_TARGET:
        if (value := getattr(target, key, None)) is None and key == "head_dim":
            value = target.hidden_size // target.num_attention_heads
        if value is None:
            raise SteeringError(
                f"the target's config has no {key}: a DFlash drafter is made of layers like its target's"
            )
        raw[key] = value
    raw |= {
        "model_type": "qwen3",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * config.layers,
        "block_size": config.k + 1,
        "num_target_layers": target.num_hidden_layers,
        "dflash_config": {"mask_token_id": _mask(tokenizer, target), "target_layer_ids": [i - 1 for i in layers]},
    }
    if config.kind == "treeflash":
        raw["treeflash_config"] = {"ar_approximation": APPROXIMATION}
    return BlockConfig.of(raw, where)


def _mask(tokenizer: Any, target: Any) -> int:
    """A token that no text has before the end: the tokenizer's mask, an embedding no token has, padding, or the end."""
    if (mask := tokenizer.mask_token_id) is not None:
        return mask
    if (unused := 1 + max(tokenizer.get_vocab().values())) < target.vocab_size:
        return unused
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None)
    if found is None:
        raise SteeringError(
            "the tokenizer has no mask, padding or end token, which could stand for tokens to be drafted"
        )
    return found


@torch.no_grad()
def start_from_target(drafter: BlockDrafter, target: PreTrainedModel) -> None:
    """Begin with the weights of the target's last layers and norm where shapes agree; the rest is small and random."""
    if drafter.config.kind == "medusa":
        readout: Any = target.get_output_embeddings()
        for parameter in drafter.lm_heads.parameters():
            parameter.copy_(readout.weight)
        return
    decoder: Any = target.get_decoder()
    for module in drafter.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=drafter.config.model.initializer_range)
    last = list(decoder.layers)[-drafter.config.layers :]
    for ours, theirs in [*zip(drafter.model.layers, last, strict=False), (drafter.model.norm, decoder.norm)]:
        wanted = ours.state_dict()
        found = {name: x for name, x in theirs.state_dict().items() if name in wanted and x.shape == wanted[name].shape}
        ours.load_state_dict(found, strict=False)
