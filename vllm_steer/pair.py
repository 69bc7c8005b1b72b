"""A drafter and its steering as one module, run and measured against the target, teacher forced.

The input at position t is steered with the guide at t - d, one offset d for the whole batch: when serving, the newest
token sits one position after the state that produced it, and the drafts after it 2..k positions. Prompt positions are
not steered.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer import checkpoint
from vllm_steer.config import SteeringError, default_target_layers
from vllm_steer.data import Row, collate, read_rows
from vllm_steer.drafter import attach
from vllm_steer.losses import agreement, overlap
from vllm_steer.steering import Steering


class Pair(nn.Module):
    """A drafter and its steering as one trainable module; `steering` is None when only the drafter trains."""

    def __init__(self, drafter: nn.Module, steering: Steering | None):
        super().__init__()
        self.drafter = drafter
        self.steering = steering
        self._injector = [attach(drafter, steering.config.steered_layers)] if steering is not None else []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, states: Tensor, prompt_lengths: Tensor, offset: int
    ) -> Tensor:
        """Drafter logits [B, T, V] for ids [B, T] under states [B, T, 3H], guides taken `offset` positions back."""
        context = nullcontext()
        if self.steering is not None:
            context = self._injector[0].using(offset_deltas(self.steering, states, prompt_lengths, offset))
        with context:
            return self.drafter(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What trains and nothing else: a resumable checkpoint need not carry frozen weights or tied copies."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if name in trained}

    def detach(self) -> None:
        """Take the wrappers off the drafter, so that it saves under its own names."""
        for injector in self._injector:
            injector.detach()


def offset_deltas(steering: Steering, states: Tensor, prompt_lengths: Tensor, offset: int) -> Tensor:
    """Deltas [B, T, L, F]: position t from the states at t - offset, zero in the prompt and where t < offset.

    Args:
        states: target states [B, T, 3H]. prompt_lengths: int64 [B]. offset: d, 1 or more.
    """
    length = states.shape[1]
    guides = nn.functional.pad(steering.guide(states), (0, 0, offset, 0))[:, :length]
    position = torch.arange(length, device=states.device)
    steered = (position >= prompt_lengths[:, None]) & (position >= offset)
    return steering.deltas(guides) * steered[..., None, None]


@torch.no_grad()
def read_target(target: nn.Module, batch: dict[str, Tensor], layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The target's states [B, T, 3H] float32 at three layers, and its logits [B, T, V]."""
    out = target(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
    )
    return torch.cat([out.hidden_states[i] for i in layers], dim=-1).float(), out.logits


def response_mask(batch: dict[str, Tensor]) -> Tensor:
    """Bool [B, T]: real tokens after the prompt, the positions a drafter is fed when serving."""
    position = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    return (position >= batch["prompt_lengths"][:, None]) & batch["attention_mask"].bool()


@torch.no_grad()
def measure(pair: Pair, target: nn.Module, rows: list[Row], layers: tuple[int, ...], k: int, batch_size: int) -> dict:
    """Predicted acceptance per offset on held-out rows.

    `overlap` is the mean of sum min(p, q), what sampling at temperature 1 accepts; `greedy` is how often both choose
    the same token. Every response position is steered with the pattern used in training (all guides `d` back, rather
    than one guide per block), so this predicts serving and does not replay it. `block_efficiency` (tokens per block,
    the target's own included) treats offsets as independent.
    """
    device = next(pair.parameters()).device
    sums, count = torch.zeros(2, k, dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch = {name: x.to(device) for name, x in collate(rows[start : start + batch_size]).items()}
        states, wanted = read_target(target, batch, layers)
        mask = response_mask(batch)
        count += int(mask.sum())
        for d in range(1, k + 1):
            logits = pair(**batch, states=states, offset=d)[mask]
            sums[0, d - 1] += overlap(wanted[mask], logits).sum().item()
            sums[1, d - 1] += agreement(wanted[mask], logits).sum().item()
    means = sums / count
    efficiency = (1 + means.cumprod(dim=1).sum(dim=1)).tolist()
    overlaps, greedy = ([round(x, 4) for x in row] for row in means.tolist())
    return {
        "overlap": overlaps,
        "greedy": greedy,
        "block_efficiency": {"sampled": round(efficiency[0], 3), "greedy": round(efficiency[1], 3)},
        "positions": count,
    }


def load_tokenizer(target: str, drafter: str) -> Any:
    """The one tokenizer of both models. Raises SteeringError when one cannot be read, or they differ."""
    from transformers import AutoTokenizer

    try:
        ours, theirs = (AutoTokenizer.from_pretrained(name) for name in (target, drafter))
    except (OSError, ValueError) as error:
        raise SteeringError(f"cannot load the tokenizers of {target} and {drafter}: {error}") from error
    a, b = ours.get_vocab(), theirs.get_vocab()
    if a != b:
        token = min(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
        raise SteeringError(
            f"the tokenizers of {target} and {drafter} differ: token {token!r} is {a.get(token)} in one and "
            f"{b.get(token)} in the other; speculation needs one tokenizer, take a drafter of the target's family"
        )
    return theirs


def load_models(target: str, drafter: str, precision: torch.dtype) -> tuple[nn.Module, nn.Module, torch.dtype]:
    """The target (frozen, in `precision`), the drafter (float32), and the dtype the drafter is stored in."""
    from transformers import AutoModelForCausalLM

    try:
        big = AutoModelForCausalLM.from_pretrained(target, dtype=precision)
        small = AutoModelForCausalLM.from_pretrained(drafter, dtype="auto")
    except (OSError, ValueError) as error:
        raise SteeringError(f"cannot load {target} and {drafter}: {error}") from error
    stored = small.dtype  # before the next line changes it
    return big.requires_grad_(False).eval(), small.float(), stored


def measure_directory(target: str | Path, drafter: str | Path, steering: str | Path, data: str | Path, k: int) -> dict:
    """`measure` a saved drafter on every row of a data file; unsteered if `steering` has no steering/ folder."""
    tokenizer = load_tokenizer(str(target), str(drafter))
    big, small, _ = load_models(str(target), str(drafter), torch.float32)
    module, layers = None, default_target_layers(big.config.num_hidden_layers)
    if checkpoint.has_steering(steering):
        module = checkpoint.load_for(steering, big.config, small.config)
        layers = module.config.target_layer_ids
    rows = read_rows(data, tokenizer, big.config.max_position_embeddings)
    return measure(Pair(small, module).eval(), big, rows, layers, k, batch_size=8)
