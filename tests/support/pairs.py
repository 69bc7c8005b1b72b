"""Tiny random models for tests: one per family, and target/drafter/steered triples saved to a directory.

A pair must be neither hopeless nor perfect, or acceptance tests prove nothing. So the drafter is a *corner* of the
target: every weight of its two layers is the leading slice of the target's, and what the drafter lacks (the
target's further width and layers) is turned down by `distance`. Head size is 32: vLLM's CPU attention takes no less.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import Steering

HEAD_DIM = 32
VOCAB = 128
PAIR_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "granite")  # as targets in vLLM: they emit auxiliary states
FAMILIES = (
    *PAIR_FAMILIES,
    *("gemma", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3", "glm", "glm4"),
)


@dataclass(frozen=True)
class Size:
    """Sizes of a tiny model; heads follow from the width."""

    hidden: int
    layers: int
    ffn: int
    kv_heads: int = 1


TARGET = Size(hidden=128, layers=7, ffn=192, kv_heads=2)
DRAFTER = Size(hidden=64, layers=2, ffn=96)


def tiny_config(family: str, size: Size = DRAFTER, vocab_size: int = VOCAB, **extra: Any) -> Any:
    """A transformers config of `family` with no end-of-sequence token: generation runs to its length limit."""
    keys: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_DIM,
        num_key_value_heads=size.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if family == "qwen2":
        del keys["head_dim"]  # no such key there; the width divides evenly
    if family == "granite":  # its defaults of 1 are what llama does; real ones set all four
        keys |= dict(embedding_multiplier=2.0, residual_multiplier=0.7, logits_scaling=2.0, attention_multiplier=0.1)
    if family == "mistral":
        keys["sliding_window"] = None
    return AutoConfig.for_model(family, **(keys | extra))


def tiny_model(family: str, size: Size = DRAFTER, seed: int = 0, **extra: Any) -> PreTrainedModel:
    """A random float32 model in eval mode with norms and biases off their trivial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, size, **extra), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norm weights, biases
                parameter.add_(torch.randn_like(parameter), alpha=0.02 if name.endswith("bias") else 0.1)
    return model.float().eval()


@torch.no_grad()
def tiny_pair(
    family: str, seed: int = 0, distance: float = 0.08, target: Size = TARGET, drafter: Size = DRAFTER, **extra: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Target and drafter that agree on some tokens; `distance` 0.08: about two in three, 0.3: one in five."""
    big, small = tiny_model(family, target, seed, **extra), tiny_model(family, drafter, seed + 1, **extra)
    for layer in big.model.layers:
        mlp, attention = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
        mlp[:, drafter.ffn :] *= distance
        attention[drafter.hidden :] *= distance
        mlp[drafter.hidden :] *= distance
    for layer in big.model.layers[drafter.layers :]:
        layer.self_attn.o_proj.weight *= distance
        layer.mlp.down_proj.weight *= distance
    for parameter in big.parameters():
        if parameter.dim() == 2 and parameter.shape[1] == target.hidden:  # what reads the residual stream, and heads
            parameter[:, drafter.hidden :] *= distance
    source = dict(big.named_parameters())
    for name, parameter in small.named_parameters():
        parameter.copy_(source[name][tuple(slice(n) for n in parameter.shape)])
    for name, parameter in big.named_parameters():
        if name.endswith("norm.weight") and parameter.shape == (target.hidden,):
            parameter *= (drafter.hidden / target.hidden) ** 0.5  # the mean square is over more, quieter channels
    return big, small


def random_steering(
    target: Any, drafter: Any, rank: int | None = None, seed: int = 0, delta_std: float = 0.4, **keys: Any
) -> Steering:
    """A Steering for two transformers configs whose deltas have about `delta_std`; nothing in it is trivial."""
    names = ("tiny-target", "tiny-drafter")
    steering = Steering(SteeringConfig.for_models(target, drafter, names, rank=rank, **keys))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (steering.fuse.weight, steering.fuse.bias, steering.norm.weight, steering.norm.bias):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for layer in steering.project.modules() if rank else [steering.project]:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
        steering.output.weight.mul_(delta_std)
    return steering.requires_grad_(False)


def save_tokenizer(directory: Path, vocab_size: int = VOCAB) -> None:
    """A tokenizer whose token i is the word "ti": `encode("t5 t9")` is [5, 9]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(directory)


class Saved(NamedTuple):
    """Directories of models that were saved."""

    target: Path
    drafter: Path
    steered: Path  # the same drafter with a random steering that changes its drafts


def make_pair(
    directory: str | Path,
    family: str = "llama",
    seed: int = 0,
    rank: int | None = None,
    *,
    distance: float = 0.08,
    delta_std: float = 0.4,
    target: Size = TARGET,
    drafter: Size = DRAFTER,
    vocab_size: int = VOCAB,
    **extra: Any,
) -> Saved:
    """Save a tiny pair.

    `extra` goes to both models' configs. All three directories have a tokenizer.
    """
    root = Path(directory)
    paths = Saved(root / "target", root / "drafter", root / "steered")
    big, small = tiny_pair(family, seed, distance, target, drafter, vocab_size=vocab_size, **extra)
    for path, model in zip(paths, (big, small, small), strict=True):
        model.save_pretrained(path)
        save_tokenizer(path, vocab_size)
    checkpoint.save(paths.steered, random_steering(big.config, small.config, rank, seed, delta_std))
    checkpoint.mark(paths.steered)
    return paths


def quantize_int8(directory: Path, to: Path) -> Path:
    """Copy a model directory with int8 weights, a scale per output channel, in the compressed-tensors layout.

    Activations are quantised per token when served, so that a token's result does not depend on its batch.
    """
    shutil.copytree(directory, to)
    tensors = load_file(to / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name + "_scale"] = scale
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    keys = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": keys | {"strategy": "channel", "dynamic": False},
        "input_activations": keys | {"strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return change_config(to, quantization_config=quantization)


def change_config(directory: Path, **keys: Any) -> Path:
    """Set keys in a model directory's config.json; returns the directory."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return directory


def save_lora(directory: Path, config: Any, rank: int = 4, seed: int = 0, std: float = 0.3) -> Path:
    """Write a random LoRA for all attention and MLP projections of a llama-like model, as PEFT would."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    shapes = {f"self_attn.{n}_proj": (config.hidden_size, h * config.head_dim) for n, h in heads.items()}
    shapes["self_attn.o_proj"] = (config.num_attention_heads * config.head_dim, config.hidden_size)
    shapes |= {f"mlp.{n}_proj": (config.hidden_size, config.intermediate_size) for n in ("gate", "up")}
    shapes["mlp.down_proj"] = (config.intermediate_size, config.hidden_size)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[key + "A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            tensors[key + "B.weight"] = torch.randn(outputs, rank, generator=generator) * std / rank**0.5
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    names = sorted({name.rpartition(".")[2] for name in shapes})
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    return directory


def random_prompt(length: int, seed: int = 0, vocab_size: int = VOCAB) -> list[int]:
    """`length` token ids, the same for the same seed."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
