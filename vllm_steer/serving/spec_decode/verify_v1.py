"""V1 model runner: which tokens of draft trees are accepted.

At temperature 0 the row that agrees longest with the target's argmax is vLLM's to verify, as a chain of k. At other
temperatures the target's token at every node is drawn with noise of (seed, position, token), the same in all rows, and
a draft is accepted where it equals that: every token is a draw from the target's own distribution. Drafts are the most
probable tokens, or with draft_sample_method "probabilistic" the first ones under the same noise (coupled draws,
decoding/verification.py). With tree_verification "recursive" they are drawn under noise of their own, and verified by
recursive rejection sampling (trees/recursive.py).

Shape legend: B requests, k depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.rejection_sampler import apply_sampling_constraints
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_steer.serving.sampling.draft_filters import cut
from vllm_steer.serving.trees.drafting import Rank, greedy
from vllm_steer.serving.trees.layout import Rows, to_device
from vllm_steer.serving.trees.noise import gumbel
from vllm_steer.serving.trees.recursive import DRAFTS, Recursive
from vllm_steer.serving.trees.requests import looks_back

NOISE_ITEM = 32  # bytes a number while noise is made: int64 and float64
NOISE_BYTES = 2**29  # at once: vLLM does not count on it when it sizes the KV cache


class Verifier:
    """Verifies the trees of an engine, and ranks drafts by the same noise."""

    def __init__(self, device: torch.device, sampled: bool, filtered: bool, recursive: Recursive | None):
        """Drafts are `sampled`, under the target's noise or for recursive rejection, or are the most probable tokens;
        `filtered` ones follow the request's top-k and top-p."""
        self._device, self._sampled, self._filtered, self._recursive = device, sampled, filtered, recursive
        self._looks_back: dict[str, bool] = {}
        self._seeds: dict[str, int] = {}
        self._batch: Sequence[str] = ()

    def meet(self, batch: Sequence[str], known: Mapping[str, Any]) -> np.ndarray:
        """Note the requests of a batch, of those known to the model runner; [B] bool, which are drafted chains."""
        if any(name not in self._seeds for name in batch) or len(self._seeds) > 2 * len(known):
            params = {name: known[name].sampling_params for name in known}
            self._looks_back = {name: looks_back(each) for name, each in params.items()}
            self._seeds = {name: self._seeds.get(name) or _seed(each) for name, each in params.items()}
        self._batch = batch
        return np.fromiter(map(self._looks_back.__getitem__, batch), dtype=bool, count=len(batch))

    def verify(
        self,
        sampler: Any,
        verdict: Callable[..., Any],
        rows: Rows,
        positions: Tensor,
        metadata: SpecDecodeMetadata,
        logits: Tensor,
        sampling: Any,
    ) -> Any:
        """Choose the winners and return vLLM's SamplerOutput.

        Args:
            sampler: vLLM's RejectionSampler, and `verdict` its `forward`.
            positions: [logits] of the tokens that have logits.
            metadata, logits, sampling: as vLLM gives them to `verdict`, for all rows.
        """
        following = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
        following[metadata.target_logits_indices.long()] = metadata.draft_token_ids.long()
        processed = self._processed(rows, logits, sampling)
        # Recursive rejection draws for itself: then only greedy requests are judged by this.
        certain = sampling.all_greedy or self._recursive is not None
        own = processed.argmax(-1) if certain else self._own(rows, processed, positions, sampling)
        agreed, said = rows.choose(own, following), None
        drawn = None if sampling.all_greedy else self._drawn(rows, sampling)
        if self._recursive is not None and drawn is not None:
            winner, said, accepted = self._recursive.walk(rows, self._batch, processed, following, self._seed_table())
            rows.let_win(winner, drawn)
            agreed = torch.where(drawn, accepted, agreed)
        kept = rows.kept()
        chain = _chain(rows, metadata, following[kept], kept)
        # Penalties and bad words read the drafts, of requests that show their first row. The list has spare room.
        if sampling.spec_token_ids:
            pairs = zip(sampling.spec_token_ids, chain.num_draft_tokens, strict=False)
            sampling = replace(sampling, spec_token_ids=[ids[:n] for ids, n in pairs])
        found = verdict(chain, None, logits[kept], sampling)
        if drawn is None:
            return found
        ids = found.sampled_token_ids
        said = (rows.said(own) if said is None else said).to(ids.dtype)
        said = torch.where(torch.arange(said.shape[1], device=own.device) <= agreed[:, None], said, -1)
        ids = torch.where(drawn[:, None], said, ids)
        if sampling.max_num_logprobs is None:
            return replace(found, sampled_token_ids=ids)
        shown = processed[kept] if sampler.is_processed_logprobs_mode else logits[kept].float()
        drafts, bonus = chain.target_logits_indices.long(), chain.bonus_logits_indices.long()
        logprobs = sampler._get_logprobs_tensors(
            sampling.max_num_logprobs, chain, logits[kept], shown[drafts], shown[bonus], ids
        )
        return replace(found, sampled_token_ids=ids, logprobs_tensors=logprobs)

    def _processed(self, rows: Rows, logits: Tensor, sampling: Any) -> Tensor:
        """Logits [logits, V] by the temperature and the filters of each request, if it does not look back."""
        of = rows.on.request_of_logit
        if sampling.allowed_token_ids_mask is not None:
            logits = logits.masked_fill(sampling.allowed_token_ids_mask[of], -torch.inf)
        if sampling.all_greedy:
            return logits
        return apply_sampling_constraints(logits.float().clone(), rows.on.logits_end.int(), sampling)

    def _own(self, rows: Rows, processed: Tensor, positions: Tensor, sampling: Any) -> Tensor:
        """What the target says after each token, [logits]: its draw by noise of seed and position, or its argmax."""
        of, size = rows.on.request_of_logit, processed.shape[-1]
        seeds, drawn = self._seed_table()[of], sampling.temperature[of, None] > 0
        at_once = max(1, NOISE_BYTES // (size * NOISE_ITEM))
        parts = (each.split(at_once) for each in (processed, seeds, positions, drawn))
        return torch.cat(
            [(p + torch.where(t, gumbel(s, at, size), 0)).argmax(-1) for p, s, at, t in zip(*parts, strict=True)]
        )

    def _drawn(self, rows: Rows, sampling: Any) -> Tensor:
        """Which requests have trees at a temperature above 0, [B]: their tokens are drawn here, not by vLLM."""
        return (rows.on.is_tree > 0) & (sampling.temperature[: rows.requests] > 0)

    def _seed_table(self) -> Tensor:
        seeds = np.fromiter(map(self._seeds.__getitem__, self._batch), np.int64, len(self._batch))
        return to_device(self._device, seeds=seeds).seeds

    def rank(self, sampling: Any, newest: Tensor) -> Rank:
        """How the drafts of a round are ranked that follows the positions `newest` [B]."""
        if not self._sampled or sampling.all_greedy:
            return greedy
        if self._recursive is not None:
            self._recursive.begin(list(self._batch), newest)
        stream = 0 if self._recursive is None else DRAFTS
        seeds, filters = self._seed_table(), (sampling.top_k, sampling.top_p)

        def rank(logits: Tensor, width: int, rows: int, positions: Tensor) -> Tensor:
            temperature = sampling.temperature.repeat_interleave(rows)
            if self._filtered:
                top_k, top_p = (None if each is None else each.repeat_interleave(rows) for each in filters)
                logits = cut(logits, temperature, top_k, top_p)
            heat = temperature[:, None]
            scaled = logits.float() / torch.where(heat > 0, heat, 1)
            if self._recursive is not None:
                self._recursive.note(scaled)
            noise = gumbel(seeds.repeat_interleave(rows), positions, logits.shape[-1], stream)
            return greedy(scaled + torch.where(heat > 0, noise, 0), width, rows, positions)

        return rank


def _seed(params: Any) -> int:
    """A request's own seed, or one from the stream that all ranks of an engine share."""
    given = getattr(params, "seed", None)
    return int(torch.randint(2**62, ())) if given is None else given


def _chain(rows: Rows, metadata: SpecDecodeMetadata, following: Tensor, kept: Tensor) -> SpecDecodeMetadata:
    """vLLM's metadata for the chains that are shown; following [kept] are the drafts after each of their logits."""
    end, drafts = rows.on.kept_begin[1:], rows.on.kept_drafts
    return SpecDecodeMetadata(
        draft_token_ids=following[drafts].int(),
        num_draft_tokens=rows.shown_drafts.tolist(),
        cu_num_draft_tokens=(end - torch.arange(1, rows.requests + 1, device=kept.device)).int(),
        cu_num_sampled_tokens=end.int(),
        target_logits_indices=drafts.int(),
        bonus_logits_indices=(end - 1).int(),
        logits_indices=metadata.logits_indices[kept],
    )
