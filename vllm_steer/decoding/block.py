"""The reference loop of block drafters on Hugging Face models: what vLLM's drafted tokens are compared with.

Batch of one, a real KV cache for the target. The drafter reads the target's states before the newest token, proposes
k states in one pass, and is walked along the *realised* chain: each draft depends on the one drafted before it, by the
approximator (TreeFlash), by a bigram or a small language model (draft refinement), or not at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.common.errors import SteeringError, require_at_least, require_one_of
from vllm_steer.decoding.block_tree import branches
from vllm_steer.decoding.chain import DRAFT_SAMPLES, Block, Generation, _Cached, _Chooser, _cut
from vllm_steer.decoding.rescoring import after, rescored
from vllm_steer.drafters.block.drafter import BlockDrafter
from vllm_steer.drafters.block.ngram import Ngram


@dataclass(frozen=True)
class Refinement:
    """A bigram and its weight."""

    ngram: Ngram
    alpha: float

    def rescored(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """Logits [V] of the token after `text`, of which the last one counts."""
        return rescored(logits, torch.tensor(text[-1], device=logits.device), self.ngram, self.alpha)


@dataclass(frozen=True)
class NeuralRefinement:
    """A small language model of the target's tokens, and the weight of its log-probabilities (the paper's second form).

    It reads the whole text before each draft, so it costs a pass for every draft, as a draft model does.
    """

    model: PreTrainedModel
    beta: float

    def rescored(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """Logits [V] of the token after `text`."""
        return logits.float() + self.beta * after(self.model, text)


@torch.no_grad()
def generate(
    target: PreTrainedModel,
    drafter: BlockDrafter,
    prompt: Sequence[int],
    *,
    k: int | None = None,
    refinement: Refinement | NeuralRefinement | None = None,
    max_new_tokens: int = 64,
    eos_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    draft_sample: str = "greedy",
    seed: int = 0,
    rows: int = 1,
) -> Generation:
    """Speculate for one prompt.

    Args:
        target: a Hugging Face causal LM; float32 for comparisons.
        drafter: what `drafters.block.checkpoint.load` returns.
        prompt: token ids, at least one.
        k: drafts per block (default: as many as the drafter has).
        refinement: None: the drafter alone.
        eos_token_ids: the output ends with the first of these.
        temperature: 0 is greedy.
        draft_sample: greedy, or probabilistic: drafts drawn at the temperature, verified by rejection sampling.
        rows: more than 1, at temperature 0: a tree of so many rows (block_tree.py); a block's drafts are then those of
            the row that was accepted longest.

    Raises SteeringError for options out of range.
    """
    k = drafter.config.draft_length if k is None else k
    for name, value in (("k", k), ("max_new_tokens", max_new_tokens), ("the prompt's length", len(prompt))):
        require_at_least(name, value, 1)
    require_at_least("temperature", temperature, 0)
    require_one_of("draft_sample", draft_sample, DRAFT_SAMPLES)
    require_at_least("rows", rows, 1)
    if rows > 1 and temperature:
        raise SteeringError(f"rows is {rows} and temperature {temperature}: the reference has trees at temperature 0")
    if rows > 1 and isinstance(refinement, NeuralRefinement):
        raise SteeringError(f"rows is {rows}: the reference refines chains with a language model, not trees")
    chooser, reader = _Chooser(temperature, draft_sample, seed), _Reader(target, drafter, refinement)
    return _loop(_Cached(target), reader, prompt, chooser, k, rows, max_new_tokens, frozenset(eos_token_ids))


def _loop(
    big: _Cached, reader: _Reader, prompt: Sequence[int], chooser: _Chooser,
    k: int, rows: int, max_new_tokens: int, eos: frozenset[int],
) -> Generation:  # fmt: skip
    tokens, blocks = list(prompt), list[Block]()
    tokens.append(chooser.target_token(reader.read(big, tokens, 0)[-1]))
    while len(tokens) - len(prompt) < max_new_tokens and tokens[-1] not in eos:
        newest = len(tokens) - 1
        if rows == 1:
            drafts, dists = draft(reader, tokens, k, chooser)
        else:
            drafts, dists = _longest(reader, big, draft_rows(reader, tokens, k, rows), tokens, chooser), []
        logits = reader.read(big, [tokens[newest], *drafts], newest)
        accepted, token = chooser.verify(logits, drafts, dists or [None] * k)
        big.crop(newest + 1 + accepted)
        new, stop = _cut([*drafts[:accepted], token], max_new_tokens - (len(tokens) - len(prompt)), eos)
        blocks.append(Block(newest, tuple(drafts), accepted, len(new), stop))
        tokens += new
    return Generation(tokens[len(prompt) :], blocks)


def draft(reader: _Reader, tokens: list[int], k: int, chooser: _Chooser) -> tuple[list[int], list[Tensor | None]]:
    """k drafts after `tokens`, and the distributions they were drawn from."""
    hidden = reader.hidden(tokens, k)
    drafts: list[int] = []
    dists: list[Tensor | None] = []
    for j in range(k):
        token, dist = chooser.draft_token(reader.logits(hidden[j], [*tokens, *drafts], j))
        drafts.append(token)
        dists.append(dist)
    return drafts, dists


def draft_rows(reader: _Reader, tokens: list[int], k: int, rows: int) -> list[list[int]]:
    """The rows of a tree after `tokens`, each k drafts."""
    hidden = reader.hidden(tokens, k)

    def logits(step: int, previous: Tensor) -> Tensor:
        return torch.stack([reader.logits(hidden[step], [token], step) for token in previous.tolist()])

    return branches(logits, torch.tensor(tokens[-1:], device=hidden.device), k, rows)[0].tolist()


def _longest(reader: _Reader, big: _Cached, rows: list[list[int]], tokens: list[int], chooser: _Chooser) -> list[int]:
    """The row of which the target accepts most, the first of several."""
    newest = len(tokens) - 1
    accepted = []
    for row in rows:
        logits = reader.read(big, [tokens[newest], *row], newest)
        accepted.append(chooser.verify(logits, row, [None] * len(row))[0])
    return rows[accepted.index(max(accepted))]


class _Reader:
    """The target's states so far, and the drafter that reads them, with what refines it if anything does."""

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: BlockDrafter,
        refinement: Refinement | NeuralRefinement | None = None,
    ):
        self.target, self.drafter, self.refinement = target, drafter.to(target.device), refinement
        self.states: Tensor | None = None  # [1, T, n H] of the tokens fed
        self.last: Tensor | None = None  # [1, T, H], what the target's head reads

    def read(self, big: _Cached, tokens: Sequence[int], start: int) -> Tensor:
        """Feed tokens from position `start` on: the target's logits [len(tokens), V] after each; keeps the states."""
        layers = self.drafter.config.states
        held: list[Tensor] = []
        head = self.target.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: held.append(given[0]))
        try:
            logits, states = big.feed(tokens, start, keep=0, states=layers)
        finally:
            hook.remove()
        new = states[None] if states is not None else held[0][..., :0]
        self.states = new if self.states is None else torch.cat([self.states[:, :start], new], 1)
        self.last = held[0] if self.last is None else torch.cat([self.last[:, :start], held[0]], 1)
        return logits

    def hidden(self, tokens: list[int], k: int) -> Tensor:
        """[k, H] of the block after `tokens`, of which the target was fed all but the newest."""
        assert self.states is not None and self.last is not None
        n = len(tokens) - 1
        newest, anchor = torch.tensor([[tokens[n]]]), torch.tensor([[n]])
        given = (self.states[:, :n].to(torch.float32), self.last[:, :n].to(torch.float32))
        return self.drafter.hidden(self._embed, newest, *given, anchor, k)[0, 0]

    def logits(self, hidden: Tensor, text: Sequence[int], step: int) -> Tensor:
        """Logits [V] of draft `step` from its state [H], after `text`."""
        normed = self.drafter.corrected(hidden, self._embed, torch.tensor(text[-1], device=hidden.device))
        head = self.drafter.head(self.target.get_output_embeddings(), step)
        logits = head(normed[None].to(self.target.dtype))[0].float()
        return logits if self.refinement is None else self.refinement.rescored(logits, text)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.target.get_input_embeddings()(ids).float()
