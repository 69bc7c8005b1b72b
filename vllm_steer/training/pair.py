"""A drafter and its steering as one module, run and measured against the target, teacher forced.

The input at position t is steered with the guide at t - d: when serving, the newest token sits one position after the
state that produced it, and the drafts after it 2..k positions. Prompt positions are not steered.

Shape legend: B rows, T tokens, N response positions of a batch, H target hidden size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from vllm_steer.drafters.steered.hf import Injector, attach, decoder_layers
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.training.losses import Distance, by_position

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vllm_steer.training.config import TrainConfig

OFFSET_RULES = {
    "batch": "one distance d in 1..k for the whole batch",
    "sequence": "one d per row",
    "block": "blocks of k from a random start, one guide each, as when serving",
}


class Head:
    """The end of a causal LM: last hidden states [N, H] -> logits [N, V], as its own forward computes them.

    It is the model's forward around a decoder that returns what it is given, so scaling and soft caps are in it.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocabulary] of hidden states [N, H] after the final norm."""
        name = self.model.base_model_prefix
        decoder = getattr(self.model, name)
        setattr(self.model, name, _Given(hidden[None].to(self.model.dtype)))
        try:
            return self.model(input_ids=None, use_cache=False).logits[0]
        finally:
            setattr(self.model, name, decoder)


class _Given(nn.Module):
    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)  # type: ignore[arg-type]  # it says FloatTensor


class TrainedWeights(nn.Module):
    """A module whose state is what is trained of it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # one form of two
        """The trained weights only: a resumable checkpoint needs no frozen weights and no tied copies."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse; frozen weights may be absent."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        found.missing_keys[:] = [name for name in found.missing_keys if name in trained]
        assert not strict or not (found.missing_keys or found.unexpected_keys), found
        return found


class Pair(TrainedWeights):
    """A drafter and its steering as one trainable module; `steering` is None when only the drafter trains.

    Args:
        target: gives the logits to compare with from its last hidden states; frozen, not a part of this module.
        loss: what training minimises, see LOSSES.
        first_layer: m > 0: the drafter's first m layers are cut off, it reads the input of layer m (`trunk`).
    """

    def __init__(
        self,
        drafter: PreTrainedModel,
        steering: Steering | None,
        target: PreTrainedModel,
        loss: Distance,
        first_layer: int = 0,
    ):
        super().__init__()
        self.drafter = drafter
        self.steering = steering
        self.first_layer = first_layer
        self.loss = loss
        self._target_head = [Head(target)]  # in a list: not a submodule
        self._cut = decoder_layers(drafter)[:first_layer]
        if first_layer:
            drafter.get_decoder().layers = decoder_layers(drafter)[first_layer:]
        slots = [] if steering is None else [i - first_layer for i in steering.config.steered_layers]
        self._injector = [attach(drafter, tuple(slots))] if slots else []

    @property
    def injector(self) -> Injector | None:
        """What steers the drafter's layers; None where nothing does."""
        return self._injector[0] if self._injector else None

    def hidden(self, batch: dict[str, Tensor], source: Tensor | None) -> Tensor:
        """The drafter's last hidden states [N, H2] at response positions, each steered from the state at `source`."""
        if self._injector and self.steering is not None:
            # Left in force after the forward: gradient checkpointing runs the layers again in the backward pass.
            self._injector[0].deltas = None if source is None else lazy_deltas(self.steering, batch["states"], source)
        given = (
            {"inputs_embeds": batch["trunk"].to(self.drafter.dtype)}
            if self.first_layer
            else {"input_ids": batch["input_ids"]}
        )
        out = self.drafter.get_decoder()(**given, attention_mask=batch["attention_mask"], use_cache=False)
        return out.last_hidden_state[response_mask(batch)]

    def compare(self, functions: Sequence[Distance], batch: dict[str, Tensor], source: Tensor | None) -> Tensor:
        """Each function of (target logits, drafter logits) at the N response positions: float32 [len(functions), N]."""
        final = batch["final"][response_mask(batch)]
        heads = self._target_head[0], Head(self.drafter)
        return by_position(functions, *heads, final, self.hidden(batch, source), self.drafter.config.vocab_size)

    def forward(self, source: Tensor, **batch: Tensor) -> Tensor:
        """The sum of `self.loss` over response positions, a scalar: the mean is of a whole optimiser step."""
        return self.compare([self.loss], batch, source).sum()

    def groups(self, config: TrainConfig) -> list[tuple[nn.Module, float]]:
        """Modules and their peak learning rates."""
        given = [(self.steering, config.lr), (self.drafter, config.drafter_lr)]
        return [(module, rate) for module, rate in given if module is not None]

    def draw(self, config: TrainConfig, batch: dict[str, Tensor], rng: random.Random) -> Tensor:
        """Which target state steers each position in this step, for `forward`."""
        length = batch["input_ids"].shape[1]
        source = guide_sources(config.offsets, batch["prompt_lengths"], length, config.k, rng)
        if not config.guide_dropout:
            return source
        dropped = [rng.random() < config.guide_dropout for _ in range(len(source))]
        return source.masked_fill(torch.tensor(dropped, device=source.device)[:, None], -1)

    def positions(self, batch: dict[str, Tensor]) -> int:
        """How many positions `forward` sums over."""
        return int(response_mask(batch).sum())

    def measure(self, batches: Iterable[dict[str, Tensor]], k: int) -> dict[str, Any]:
        """Predicted acceptance, see acceptance.py."""
        from vllm_steer.training.acceptance import measure

        return measure(self, batches, k)

    def written(self) -> list[nn.Parameter]:
        """The weights of a checkpoint: the steering's, and all of the drafter's if some of them train."""
        own = [] if self.steering is None else list(self.steering.parameters())
        drafter = list(self.drafter.parameters())
        if any(p.requires_grad for p in drafter):
            own += drafter + [p for layer in self._cut for p in layer.parameters()]
        return own

    def detach(self) -> None:
        """Remove the wrappers and restore the first layers, so that the drafter is saved in its original form."""
        for injector in self._injector:
            injector.detach()
        if self.first_layer:
            self.drafter.get_decoder().layers = nn.ModuleList([*self._cut, *decoder_layers(self.drafter)])


def guide_sources(rule: str, prompt_lengths: Tensor, length: int, k: int, rng: random.Random) -> Tensor:
    """Which target state steers each position: int64 [B, T], -1 for none (the prompt, or before the first state)."""
    position = torch.arange(length, device=prompt_lengths.device)
    rows = len(prompt_lengths)
    if rule == "block":
        phase = torch.tensor([rng.randrange(k) for _ in range(rows)], device=position.device)
        into = (position - prompt_lengths[:, None] + phase[:, None]) % k  # how far into its block
        distance = into + 1
    else:
        count = 1 if rule == "batch" else rows
        distance = torch.tensor([rng.randint(1, k) for _ in range(count)], device=position.device)[:, None]
    return place_sources(position, distance, prompt_lengths)


def place_sources(position: Tensor, distance: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Sources `distance` positions back; -1 in the prompt and before the first state."""
    source = position - distance
    return torch.where((position >= prompt_lengths[:, None]) & (source >= 0), source, -1)


def lazy_deltas(steering: Steering, states: Tensor, source: Tensor) -> Callable[[int], Tensor]:
    """slot -> deltas [B, T, F] of one steered layer, from states [B, T, 3H]; zero where `source` [B, T] is -1."""
    guide = steering.compress(steering.guide(states.to(steering.fuse.weight.dtype)))
    index = source.clamp(min=0)[..., None].expand(-1, -1, guide.shape[-1])
    placed = guide.gather(1, index) * (source >= 0)[..., None]  # the projection has no bias: zero stays zero
    return lambda slot: steering.delta(placed, slot)


@torch.no_grad()
def read_target(target: PreTrainedModel, batch: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """The target's `states` [B, T, len(layers) * H], the inputs of these layers (none: no key), and `final` [B, T, H],
    what its head reads."""
    out = target.get_decoder()(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=bool(layers),
        use_cache=False,
    )
    states = {"states": torch.cat([out.hidden_states[i] for i in layers], dim=-1)} if layers else {}
    return states | {"final": out.last_hidden_state}


@torch.no_grad()
def read_trunk(drafter: PreTrainedModel, batch: dict[str, Tensor], first_layer: int) -> Tensor:
    """The input of the drafter's layer `first_layer`, [B, T, H2]."""
    keys = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return drafter.get_decoder()(**keys, output_hidden_states=True, use_cache=False).hidden_states[first_layer]


@torch.no_grad()
def trunk_fits(drafter: PreTrainedModel, first_layer: int, batch: dict[str, Tensor]) -> bool:
    """Whether the drafter computes the same when it starts at `first_layer` from what enters that layer.

    Families that scale embeddings inside their decoder (Granite) do not.
    """
    decoder = drafter.get_decoder()
    layers, real = decoder.layers, batch["attention_mask"].bool()
    keys = {"attention_mask": batch["attention_mask"], "use_cache": False}
    whole = decoder(input_ids=batch["input_ids"], output_hidden_states=True, **keys)
    decoder.layers = layers[first_layer:]
    try:
        rest = decoder(inputs_embeds=whole.hidden_states[first_layer], **keys)
    finally:
        decoder.layers = layers
    return torch.allclose(rest.last_hidden_state[real], whole.last_hidden_state[real], atol=1e-3, rtol=1e-3)


def response_mask(batch: dict[str, Tensor]) -> Tensor:
    """Bool [B, T]: real tokens after the prompt, the positions a drafter is fed when serving; where some of them were
    chosen (`choose_positions`), these."""
    if "chosen" in batch:
        return batch["chosen"]
    position = torch.arange(batch["attention_mask"].shape[1], device=batch["attention_mask"].device)
    return (position >= batch["prompt_lengths"][:, None]) & batch["attention_mask"].bool()


def choose_positions(batch: dict[str, Tensor], share: float, seed: str) -> dict[str, Tensor]:
    """The batch with a random share of its response positions chosen, at least one, for a loss that is taken there."""
    mask = response_mask(batch)
    among = torch.rand(
        mask.shape, generator=torch.Generator().manual_seed(random.Random(f"{seed}:positions").getrandbits(63))
    ).to(mask.device)
    lowest = among.masked_fill(~mask, 2.0).min()  # of all, so that no step is empty
    return batch | {"chosen": mask & ((among < share) | (among == lowest))}
