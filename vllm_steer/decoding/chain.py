"""The reference speculative loop on Hugging Face models: what vLLM's drafted tokens are compared with.

Batch of one, real KV caches, the *window rule*. Positions count from 0; the prompt is 0..P-1 and n is the position
of the newest token, the one no model has been fed yet.

    prefill   the target reads the prompt and yields the newest token, n = P
    draft     guide = target states at n-1, whose logits produced the newest token. The drafter is fed the window w..n,
              every row under this guide, over whatever it had cached there; then k drafts under the same guide.
              w is the newest position of the round before; in the first round it is P, the prompt being fed unsteered.
    verify    the target is fed the newest token and the drafts at n..n+k; a prefix is accepted, one token is added
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vllm_steer.common.errors import SteeringError
from vllm_steer.common.lenience import Lenience
from vllm_steer.decoding.verification import recursive
from vllm_steer.drafters.steered.hf import Injector, attach
from vllm_steer.drafters.steered.module import Steering

DRAFT_SAMPLES = ("greedy", "probabilistic")


@dataclass(frozen=True)
class Block:
    """One round: what was drafted, and what verification made of it."""

    position: int  # n: position of the newest token when the block was drafted
    drafts: tuple[int, ...]
    accepted: int  # drafts that passed verification, also those a stop then cut off
    kept: int  # tokens of this block in the output: accepted + 1 unless it was cut
    stop: str | None = None  # "eos" or "length" for the block that ended the output

    @property
    def tokens(self) -> int:
        """Tokens this block is worth: all it verified, but nothing after an end-of-sequence token."""
        return self.kept if self.stop == "eos" else self.accepted + 1


@dataclass(frozen=True)
class Generation:
    """New tokens (prompt excluded) and the blocks they came from; the first token comes from the prefill."""

    tokens: list[int]
    blocks: list[Block]

    @property
    def acceptance_length(self) -> float:
        """Tokens per block of this answer, see the function of that name."""
        return acceptance_length(self.blocks)


def acceptance_length(blocks: Sequence[Block]) -> float:
    """Tokens per block, the target's own (bonus or correcting) token included: 1 + accepted / blocks.

    Counting rule: the first token of an answer comes from the prefill and belongs to no block. A block that
    `max_new_tokens` cuts counts in full, for the limit is not the drafter's doing; one that an end-of-sequence
    token ends counts up to that token. NaN when there are no blocks.
    """
    return sum(block.tokens for block in blocks) / len(blocks) if blocks else float("nan")


class _Cached:
    """A model with its KV cache, of one text or of several continuations of it."""

    def __init__(self, model: PreTrainedModel, mask: Tensor | None = None):
        """`mask` bool [R, P]: the real tokens of prompts that are padded on the left; None: all are."""
        self.model, self.mask = model, mask
        # Without a config every layer keeps all positions, so that any layer can be cropped: sliding windows stay
        # in the attention mask, which does not need the cache to forget.
        self.cache = DynamicCache()

    def feed(self, tokens: Sequence[int], start: int, keep: int = 1, states: Sequence[int] = ()) -> tuple:
        """`feed_rows` of one text: logits [keep, V], and the inputs of `states` [keep, len(states) * H] or None."""
        logits, inputs = self.feed_rows([tokens], start, keep, states)
        return logits[0], inputs[0] if states else None

    def feed_rows(
        self, rows: Sequence[Sequence[int]] | Tensor, start: int, keep: int = 0, states: Sequence[int] = ()
    ) -> tuple:
        """Feed each of R continuations its tokens, equally many, at positions start, start + 1, ..., dropping what was
        cached from `start` on.

        Returns the last `keep` positions, 0 for all: logits [R, keep, V] and the inputs of the decoder layers `states`,
        concatenated, [R, keep, len(states) * H] (None without `states`).
        """
        assert start <= self.cache.get_seq_length(), "a gap in the cache"
        self.crop(start)
        tokens = torch.as_tensor(rows, device=self.model.device)
        out = self.model(
            tokens,
            **self._padding(start, start + tokens.shape[1]),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(states),
            logits_to_keep=keep,
        )
        inputs = torch.cat([out.hidden_states[i][:, -keep:] for i in states], -1) if states else None
        return out.logits.float(), inputs

    def _padding(self, start: int, end: int) -> dict[str, Tensor]:
        """What the model must be told to feed columns start to end of padded rows."""
        if self.mask is None:
            return {}
        mask = torch.nn.functional.pad(self.mask, (0, max(0, end - self.mask.shape[1])), value=True)[:, :end]
        return {"attention_mask": mask.long(), "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]}

    def select(self, rows: Sequence[int]) -> None:
        """Continue from these rows, in this order; one may be there several times, or not at all."""
        self.cache.batch_select_indices(torch.tensor(list(rows), device=self.model.device))

    def crop(self, length: int) -> None:
        """Drop positions from `length` on."""
        surplus = self.cache.get_seq_length() - length
        if surplus > 0:
            self.cache.crop(-surplus)


class _Chooser:
    """Turns logits into tokens: argmax at temperature 0, else sampling and rejection sampling with one generator."""

    def __init__(self, temperature: float, draft_sample: str, seed: int, lenience: Lenience | None = None):
        self.temperature, self.lenience = temperature, lenience
        self.sample_drafts = temperature > 0 and draft_sample == "probabilistic"
        self.generator = torch.Generator().manual_seed(seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] -> float64 probabilities on the CPU, where the generator is."""
        return torch.softmax(logits.double().cpu() / self.temperature, dim=-1)

    def draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def target_token(self, logits: Tensor) -> int:
        """The target's own choice from one row [V]."""
        return int(logits.argmax()) if self.temperature == 0 else self.draw(self.probabilities(logits))

    def draft_token(self, logits: Tensor) -> tuple[int, Tensor | None]:
        """A draft from one row [V], and the distribution it was drawn from (None: it was the argmax)."""
        if not self.sample_drafts:
            return int(logits.argmax()), None
        q = self.probabilities(logits)
        return self.draw(q), q

    def verify(self, logits: Tensor, drafts: Sequence[int], dists: Sequence[Tensor | None]) -> tuple[int, int]:
        """Target logits [k+1, V] after the newest token and each draft -> (number accepted, the token after them).

        Sampled: draft d_i passes with probability min(1, p_i(d_i) / q_i(d_i)); at the first that does not, the
        token is drawn from max(p_i - q_i, 0). An argmax draft has q_i = 1 at d_i and 0 elsewhere. Either way
        every token is distributed as the target's own. With lenience f(p_i) takes the place of p_i in the test,
        greedily against the largest p_i at temperature 1, and what is said is not the target's.
        """
        if self.temperature == 0:
            choices = logits.argmax(-1).tolist()
            passed = [self._passes(row, d) for row, d in zip(logits, drafts, strict=False)]
            accepted = next((i for i, good in enumerate(passed) if not good), len(drafts))
            return accepted, choices[accepted]
        p = self.probabilities(logits)
        for i, (draft, dist) in enumerate(zip(drafts, dists, strict=True)):
            q = torch.zeros_like(p[i]).index_fill_(0, torch.tensor(draft), 1.0) if dist is None else dist
            child, token = recursive(p[i], q, [draft], self.generator, lenience=self.lenience)
            if child is None:
                return i, token
        return len(drafts), self.draw(p[-1])

    def _passes(self, logits: Tensor, draft: int) -> bool:
        """Whether a greedy draft is accepted, by the target's logits [V]."""
        if self.lenience is None:
            return int(logits.argmax()) == draft
        log_p = torch.log_softmax(logits, -1)
        return bool(log_p[draft] + self.lenience.log_gain(log_p[draft]) >= log_p.max())


@torch.no_grad()
def generate(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompt: Sequence[int],
    steering: Steering | None = None,
    *,
    k: int = 5,
    max_new_tokens: int = 64,
    eos_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    draft_sample: str = "greedy",
    seed: int = 0,
    scale: float = 1.0,
    lenience: Lenience | None = None,
) -> Generation:
    """Speculate for one prompt.

    Args:
        target, drafter: Hugging Face causal LMs; float32 for comparisons.
        prompt: token ids, at least one.
        steering: None, or with scale 0: the plain drafter.
        k: drafts per block.
        eos_token_ids: the output ends with the first of these.
        temperature: 0 is greedy; T > 0 samples losslessly from softmax(logits / T).
        draft_sample: at T > 0, drafts are the drafter's argmax ("greedy") or samples at T ("probabilistic").
        seed: of everything random here.
        scale: multiplies the deltas.
        lenience: what the output gives up; None: nothing.
    Raises:
        SteeringError: an argument out of its range, or a drafter that cannot be steered.
    """
    _require_request(prompt, max_new_tokens, temperature)
    _require(k >= 1, f"k is {k}, allowed is a draft length from 1 up")
    _require(draft_sample in DRAFT_SAMPLES, f"draft_sample is {draft_sample!r}, allowed are {', '.join(DRAFT_SAMPLES)}")
    with _guiding(drafter, steering, scale) as guide:
        chooser = _Chooser(temperature, draft_sample, seed, lenience)
        return _loop(_Cached(target), _Cached(drafter), prompt, guide, chooser, k, max_new_tokens,
                     frozenset(eos_token_ids))  # fmt: skip


def _require_request(prompt: Sequence[int], max_new_tokens: int, temperature: float) -> None:
    _require(len(prompt) > 0, "the prompt is empty: give at least one token id")
    _require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, allowed is 1 or more")
    _require(temperature >= 0, f"temperature is {temperature}, allowed is 0 (greedy) or more")


class _Guide:
    """Steering, or its absence, behind one interface."""

    def __init__(self, steering: Steering | None, injector: Injector | None, scale: float):
        self.steering, self.injector, self.scale = steering, injector, scale
        self.layer_ids = steering.config.target_layer_ids if steering is not None else ()

    def using(self, states: Tensor | None):
        """Context in which every row the drafter is fed is steered by target states [3H]."""
        if self.steering is None or self.injector is None or states is None:
            return nullcontext()
        deltas = self.steering(states.to(self.steering.fuse.weight.dtype)) * self.scale
        return self.injector.using(deltas[None, None])  # one guide for all rows


@contextmanager
def _guiding(drafter: PreTrainedModel, steering: Steering | None, scale: float) -> Iterator[_Guide]:
    """Attach the steering, if there is any to apply, and take it off again."""
    if scale == 0:
        steering = None
    injector = attach(drafter, steering.config.steered_layers) if steering is not None else None
    try:
        yield _Guide(steering, injector, scale)
    finally:
        if injector is not None:
            injector.detach()


def _loop(
    target: _Cached, drafter: _Cached, prompt: Sequence[int], guide: _Guide, chooser: _Chooser,
    k: int, max_new_tokens: int, eos: frozenset[int],
) -> Generation:  # fmt: skip
    tokens = list(prompt)
    logits, states = target.feed(tokens, 0, states=guide.layer_ids)
    drafter.feed(tokens, 0)  # prompt rows are never steered
    source = states[0] if states is not None else None  # target states at n - 1
    window = newest = len(prompt)
    tokens.append(chooser.target_token(logits[0]))
    blocks: list[Block] = []
    while len(tokens) - len(prompt) < max_new_tokens and tokens[-1] not in eos:
        with guide.using(source):
            drafts, dists = _draft(drafter, tokens, window, k, logits.shape[-1], chooser)
        logits, states = target.feed([tokens[newest], *drafts], newest, keep=k + 1, states=guide.layer_ids)
        accepted, token = chooser.verify(logits, drafts, dists)
        source = states[accepted] if states is not None else None
        target.crop(newest + 1 + accepted)
        new, stop = _cut([*drafts[:accepted], token], max_new_tokens - (len(tokens) - len(prompt)), eos)
        blocks.append(Block(newest, tuple(drafts), accepted, len(new), stop))
        tokens += new
        window, newest = newest, newest + accepted + 1
    return Generation(tokens[len(prompt) :], blocks)


def _draft(
    drafter: _Cached, tokens: list[int], window: int, k: int, vocab: int, chooser: _Chooser
) -> tuple[list[int], list[Tensor | None]]:
    """k drafts after `tokens`, whose positions from `window` on are fed (again) under the guide in force."""
    drafts: list[int] = []
    dists: list[Tensor | None] = []
    feed, start = tokens[window:], window
    for _ in range(k):
        logits, _ = drafter.feed(feed, start)
        draft, dist = chooser.draft_token(_fit(logits[0], vocab))
        drafts.append(draft)
        dists.append(dist)
        feed, start = [draft], start + len(feed)
    return drafts, dists


def _fit(logits: Tensor, vocab: int) -> Tensor:
    """Drafter logits [V'] on the target's vocabulary: one tokenizer is padded to different sizes."""
    if len(logits) >= vocab:
        return logits[:vocab]
    return torch.nn.functional.pad(logits, (0, vocab - len(logits)), value=float("-inf"))


def _cut(new: list[int], room: int, eos: frozenset[int]) -> tuple[list[int], str | None]:
    """The tokens of a block that go into the output, and why it ends there, if it does."""
    for i, token in enumerate(new[:room]):
        if token in eos:
            return new[: i + 1], "eos"
    return new[:room], "length" if len(new) >= room else None


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise SteeringError(message)
