"""Lenient verification on both model runners: the rule of common/lenience.py inside vLLM's own rejection sampling.

Only what decides about acceptance is changed, for the call. After a rejection the target's token is drawn from the same
residual as ever, max(p - q, 0), so no token's probability rises above f(p).

- Sampled requests: V1 accepts where p / q >= u, so its uniform numbers are multiplied by p / f(p). V2 accepts where
  log p > log u + log q, so the drafted token's logit is raised by log(f(p) / p) while the kernel runs, which has the
  normalising sum from before.
- Greedy requests: a draft is accepted where f(p(x)) >= max p, at temperature 1. Its logit (V2: the maximum that the
  kernel looks up) is raised above all others meanwhile.

Shape legend: N drafted tokens of a batch, R rows of logits (N and a bonus row for each request), V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vllm_steer.common.lenience import Lenience
from vllm_steer.serving.plan import lenience_of

_lenience: ContextVar[Lenience | None] = ContextVar("the lenience of the engine that verifies", default=None)
_shrink: ContextVar[Tensor | None] = ContextVar("p / f(p) of the drafts that V1 verifies, [N]", default=None)
BLOCK = 8192  # of the vocabulary in V2's kernels: rejection_sampler_utils.py, VOCAB_BLOCK_SIZE


def of_the_engine(original: type) -> type:
    """vLLM's RejectionSampler, which knows its engine's lenience; of either runner."""
    call = "forward" if hasattr(original, "forward") else "__call__"

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        original.__init__(self, *args, **kwargs)  # type: ignore[misc]  # the class's own
        self.lenience = lenience_of(get_current_vllm_config())

    def verify(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _lenience.set(self.lenience)
        try:
            return getattr(original, call)(self, *args, **kwargs)
        finally:
            _lenience.reset(token)

    own = {"__module__": original.__module__, "__init__": __init__, call: verify}
    return type(original.__name__, (original,), own)


def shrunk_uniforms(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """V1's generate_uniform_probs [N]."""

    @functools.wraps(original)
    def generate_uniform_probs(*args: Any, **kwargs: Any) -> Tensor:
        found = original(*args, **kwargs)
        return found if (shrink := _shrink.get()) is None else found * shrink

    return generate_uniform_probs


def lenient_rejection_sample(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """V1's rejection_sample."""

    @functools.wraps(original)
    def rejection_sample(
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        rest = (draft_probs, target_logits, bonus_token_ids, sampling_metadata, *args)
        given = (draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, *rest)
        lenience = _lenience.get()
        if lenience is None or not len(draft_token_ids):
            return original(*given, **kwargs)
        rows = torch.arange(len(draft_token_ids), device=target_logits.device)
        greedy: Tensor | bool = sampling_metadata.all_greedy
        if not (sampling_metadata.all_greedy or sampling_metadata.all_random):
            greedy = (sampling_metadata.temperature == 0)[torch.bucketize(rows, cu_num_draft_tokens, right=True)]
        drafts = draft_token_ids.clamp(min=0).long()
        log_p = lenience.log_p(target_logits, drafts)
        gain, drafted = lenience.log_gain(log_p), target_logits[rows, drafts]
        best = target_logits.max(-1).values
        passes = drafted + gain >= best
        target_logits[rows, drafts] = torch.where(passes & greedy, best + 1, drafted)
        token = _shrink.set((-gain).exp().double())
        try:
            return original(*given, **kwargs)
        finally:
            _shrink.reset(token)
            target_logits[rows, drafts] = drafted  # log-probabilities are read from the same logits

    return rejection_sample


class LenientKernel:
    """V2's _rejection_kernel; launched as ever where the engine gives nothing up."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    @functools.cached_property
    def _names(self) -> list[str]:
        return list(inspect.signature(self._kernel.fn).parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """A launch over `grid`, as of Triton's kernels."""
        launch = self._kernel[grid]
        return launch if (lenience := _lenience.get()) is None else functools.partial(self._run, lenience, launch)

    def _run(self, lenience: Lenience, launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        logits, ends = given["target_logits_ptr"], given["cu_num_logits_ptr"][1:].long()
        rows = torch.arange(len(logits), device=logits.device)
        tokens = given["draft_sampled_ptr"].roll(-1).index_fill(0, ends - 1, -1)  # row i verifies what row i + 1 reads
        request = torch.bucketize(rows, ends, right=True).clamp(max=len(ends) - 1)
        greedy = given["temp_ptr"][given["idx_mapping_ptr"].long()][request] == 0
        drafts = tokens.clamp(min=0).long()
        gain = lenience.log_gain(lenience.log_p(logits, drafts))
        drafted = logits[rows, drafts]
        logits[rows, drafts] = torch.where((tokens >= 0) & ~greedy, drafted + gain, drafted)
        self._let_greedy_pass(given, greedy & (tokens >= 0), rows, drafts, drafted + gain)
        try:
            return launch(*args, **kwargs)
        finally:
            logits[rows, drafts] = drafted  # the residual and log-probabilities are read from the same logits

    def _let_greedy_pass(self, given: dict[str, Any], greedy: Tensor, rows: Tensor, drafts: Tensor, f: Tensor) -> None:
        """Make drafts whose log f is not below the maximum the argmax that the kernel looks up, block by block."""
        largest, where = given["target_local_max_ptr"], given["target_local_argmax_ptr"]
        best, block = largest.max(-1).values, drafts // BLOCK
        passes = greedy & (f >= best)
        largest[rows, block] = torch.where(passes, best + 1, largest[rows, block])
        where[rows, block] = torch.where(passes, drafts, where[rows, block])
