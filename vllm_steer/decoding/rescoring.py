"""Draft refinement (arXiv 2404.09221): a block's logits rescored from left to right, the chosen prefix known.

Every position's logits are added alpha times a bigram's log-probability after the token chosen before, or beta times a
small language model's after the whole text. The paper cuts each position to a lattice of its most probable tokens
first. Here nothing is cut: only the stored successors of a token differ from its floor, so only they change. (Cut to 16
tokens, drafts at temperature 1 were accepted less than without any bigram.) What is drawn from the result is drawn from
a known distribution, so rejection sampling stays exact.

Shape legend: B rows, S successors, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_steer.drafters.block.ngram import Ngram


def rescored(logits: Tensor, previous: Tensor, ngram: Ngram, alpha: Tensor | float) -> Tensor:
    """Logits [..., V] in float32, up to a constant of each row, after the tokens `previous` [...]; `alpha` broadcasts
    over [..., S]."""
    return logits.float().scatter_add(-1, ngram.successors[previous], alpha * ngram.boosts[previous])


def after(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """A language model's log-probabilities [V] of the token after `text`, float32; every token of it is read again."""
    given = torch.tensor([list(text)], device=model.device)
    return torch.log_softmax(model(input_ids=given, use_cache=False, logits_to_keep=1).logits[0, -1].float(), -1)
