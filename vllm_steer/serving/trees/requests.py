"""Which requests may be drafted a tree: those whose logits at a node depend on the path to it alone."""

from __future__ import annotations

from typing import Any


def looks_back(params: Any) -> bool:
    """Whether vLLM changes a request's logits by what was said before, the drafts in front included.

    It reads a request's drafts as one chain. Grammars, penalties, bad words, min_tokens and thinking budgets follow
    that chain, so only the first row of such a request is the target's.
    """
    if params is None:
        return True
    return bool(
        params.structured_outputs is not None
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.bad_words
        or params.min_tokens
        or params.logit_bias
        or getattr(params, "thinking_token_budget", None) is not None
        or getattr(params, "extra_args", None)
    )
