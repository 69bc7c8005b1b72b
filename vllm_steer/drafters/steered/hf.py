"""Attach steering to a Hugging Face drafter by wrapping one submodule per MLP.

Injection (paper, eq. for the modified MLP): W_down(act(W_gate a) * (W_up a + delta)). Adding delta to the
output of `up_proj` is exactly that, so the up-projection is the one module wrapped and no model is copied.
Families whose gate and up are one matrix (`gate_up_proj`, gate first) get it on the upper half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = "llama, qwen2, qwen3, mistral, gemma, gemma2, gemma3_text, granite, olmo2, smollm3, phi3, glm, glm4"


class SteeredProjection(nn.Module):
    """`inner(x)` plus the current delta; `inner(x)` alone while no delta is set."""

    def __init__(self, inner: nn.Module, injector: Injector, slot: int, fused: bool):
        super().__init__()
        self.inner = inner
        self._injector = [injector]  # in a list: not a submodule, the injector owns nothing here
        self.slot = slot
        self.fused = fused

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight: some models read its dtype."""
        return cast(Tensor, self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The wrapped layer's output plus this layer's delta, where there is one; shapes as the wrapped layer's."""
        y = self.inner(x)
        delta = self._injector[0].delta(self.slot)
        if delta is None:
            return y
        delta = delta.to(y.dtype)
        if not self.fused:
            return y + delta
        gate, up = y.chunk(2, dim=-1)
        return torch.cat([gate, up + delta], dim=-1)


class Injector:
    """The handle `attach` returns: holds the deltas in force and can take the wrappers off again."""

    def __init__(self, model: PreTrainedModel, steered_layers: tuple[int, ...]):
        self.deltas: Tensor | Callable[[int], Tensor] | None = None  # [B or 1, T or 1, L, F], or slot -> [B, T, F]
        self.model = model
        self._parents: list[tuple[nn.Module, str]] = []
        found = [_projection(layer) for layer in decoder_layers(model)]
        chosen = []
        for layer in steered_layers:
            place = found[layer] if 0 <= layer < len(found) else None
            if place is None:
                raise SteeringError(
                    f"{type(model).__name__} (model_type {model.config.model_type!r}): decoder layer {layer} has no "
                    f"gated MLP with up_proj or gate_up_proj, so it cannot be steered; families that fit: {FAMILIES}"
                )
            if isinstance(getattr(*place), SteeredProjection):
                raise SteeringError(f"decoder layer {layer} is steered already: detach the first injector")
            chosen.append(place)
        for slot, (mlp, name) in enumerate(chosen):  # only now: a refusal leaves the model as it was
            inner = getattr(mlp, name)
            setattr(mlp, name, SteeredProjection(inner, self, slot, fused=name == "gate_up_proj"))
            self._parents.append((mlp, name))

    def delta(self, slot: int) -> Tensor | None:
        """The delta in force for one steered layer, [B or 1, T or 1, F]; None while unsteered."""
        return (
            self.deltas(slot) if callable(self.deltas) else None if self.deltas is None else self.deltas[..., slot, :]
        )

    @contextmanager
    def using(self, deltas: Tensor | Callable[[int], Tensor] | None) -> Iterator[None]:
        """Run the drafter under `deltas` [B, T, L, F] (sizes 1 broadcast); None means unsteered.

        A function slot -> [B, T, F] is asked layer by layer: all layers at once are L * F numbers a token, in training
        as many as a vocabulary.
        """
        assert not isinstance(deltas, Tensor) or deltas.shape[-2] == len(self._parents), "deltas are for other layers"
        before, self.deltas = self.deltas, deltas
        try:
            yield
        finally:
            self.deltas = before

    def detach(self) -> None:
        """Remove every wrapper and restore the model."""
        for mlp, name in self._parents:
            setattr(mlp, name, getattr(mlp, name).inner)
        self._parents = []


def attach(model: PreTrainedModel, steered_layers: tuple[int, ...]) -> Injector:
    """Wrap the MLPs of a Hugging Face causal LM so that deltas can be added inside them.

    Args:
        model: a causal LM with gated MLPs (see FAMILIES).
        steered_layers: decoder layer ids, ascending; slot i of a delta goes to `steered_layers[i]`.
    Raises:
        SteeringError: a named layer does not exist or is not a gated MLP.
    """
    return Injector(model, tuple(steered_layers))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a Hugging Face causal LM."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise SteeringError(f"{type(model).__name__} has no decoder layers to steer; families that fit: {FAMILIES}")
    return layers


def _projection(layer: nn.Module) -> tuple[nn.Module, str] | None:
    """A layer's MLP and the name of its up-projection in it; None if the MLP is not gated."""
    mlp = getattr(layer, "mlp", None)
    if mlp is None:
        return None
    parts = {name for name, _ in mlp.named_children()}
    if {"up_proj", "gate_proj", "down_proj"} <= parts:
        return mlp, "up_proj"
    return (mlp, "gate_up_proj") if {"gate_up_proj", "down_proj"} <= parts else None
