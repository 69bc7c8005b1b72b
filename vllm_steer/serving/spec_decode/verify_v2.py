"""V2 model runner: which tokens of draft trees are accepted.

V2 draws with noise of (seed, position, token), so what the target says at every node is known, and a draft is accepted
where it equals that: the output is the target's own without a drafter, seed for seed. Drafts are the most probable
tokens, or with draft_sample_method "probabilistic" the first ones under the same noise (coupled draws,
decoding/verification.py). With tree_verification "recursive" they are drawn under vLLM's noise for drafts, and verified
by recursive rejection sampling (trees/recursive.py).

Shape legend: B requests, k depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_steer.common.tree_shape import TreeShape
from vllm_steer.serving.plan import rejects_recursively
from vllm_steer.serving.trees.drafting import Rank, greedy
from vllm_steer.serving.trees.layout import Rows
from vllm_steer.serving.trees.recursive import Recursive


class Verifier:
    """Verifies the trees of an engine, and ranks drafts."""

    def __init__(self, speculator: Any, shape: TreeShape):
        self._speculator = speculator
        self._sampled = speculator.speculative_config.draft_sample_method == "probabilistic"
        self._recursive = None
        if rejects_recursively(speculator.vllm_config):
            self._recursive = Recursive(shape, speculator.max_num_reqs, speculator.vocab_size, speculator.device)

    @property
    def coupled(self) -> bool:
        """Whether drafts are drawn with the target's own noise: vLLM's ratio test would not be exact for them."""
        return self._sampled and self._recursive is None

    def verify(self, sampler: Any, logits: Tensor, batch: Any, rows: Rows, invalid: Tensor | None) -> Any:
        """Choose the winners and return vLLM's SamplerOutput; `sampler` is the RejectionSampler, logits [logits, V].

        `invalid` [logits] bool: rows whose draft no grammar has looked at, from vLLM; None: there is none.
        """
        inner, at = sampler.sampler, batch.logits_indices
        positions, states = batch.positions[at], inner.sampling_states
        processed = inner.apply_sampling_params(
            logits, batch.expanded_idx_mapping, batch.idx_mapping, batch.idx_mapping_np, positions, batch.input_ids[at],
            batch.expanded_local_pos, batch.seq_lens_cpu_upper_bound.numpy(),
        )  # fmt: skip
        own = gumbel_sample(
            processed, batch.expanded_idx_mapping, states.temperature.gpu, states.seeds.gpu, positions,
            apply_temperature=False, is_drafting=False, use_fp64=inner.use_fp64_gumbel,
        )  # fmt: skip
        # As vLLM's `gather_draft_sampled`, by the positions of requests, since rows have their own.
        placeholders = batch.positions[at[rows.on.first_logit]] < inner.req_states.prefill_len.gpu[batch.idx_mapping]
        following = rows.following(batch.input_ids[at].long(), placeholders, invalid)
        rows.choose(own, following)
        walked = self._walk(rows, batch, processed, following, states)
        kept = rows.kept()
        sampled, counts = _accept(rows, own[kept], following[kept], sampler.num_speculative_steps + 1)
        if walked is not None:
            said, accepted, where = walked
            sampled[:, : said.shape[1]] = torch.where(where[:, None], said, sampled[:, : said.shape[1]])
            counts = torch.where(where, accepted.int() + 1, counts)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            counts, batch.seq_lens, batch.cu_num_logits, batch.idx_mapping, inner.req_states.prefill_len.gpu
        )
        shown = processed if inner.logprobs_mode.startswith("processed") else logits
        logprobs = sampler._get_logprobs_tensors(
            sampled, num_sampled, shown[kept], rows.on.kept_begin.int(), rows.kept_begin,
            states.max_num_logprobs(batch.idx_mapping_np),
        )  # fmt: skip
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=logprobs,
            num_nans=get_num_nans(logits) if inner.compute_nans else None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _walk(
        self, rows: Rows, batch: Any, processed: Tensor, following: Tensor, states: Any
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """By recursive rejection, if asked for: what is said, how many drafts are accepted, and for which requests."""
        if self._recursive is None:
            return None
        seeds = states.seeds.gpu[batch.idx_mapping]
        winner, said, accepted = self._recursive.walk(rows, batch.req_ids, processed, following, seeds)
        where = (rows.on.is_tree > 0) & (states.temperature.gpu[batch.idx_mapping] > 0)
        rows.let_win(winner, where)
        return said, accepted, where

    def rank(self, requests: Sequence[str], newest: Tensor, states: Tensor | None = None) -> Rank:
        """How the drafts of a round for these requests are ranked, which follow the positions `newest` [B].

        `states` [B]: where vLLM keeps each request's (default: as the speculator of a draft model has them).
        """
        if not self._sampled:
            return greedy
        speculator, recursive = self._speculator, self._recursive
        if states is None:
            states = speculator.idx_mapping[: len(requests)]
        if recursive is not None:
            recursive.begin(list(requests), newest)

        def rank(logits: Tensor, width: int, rows: int, positions: Tensor) -> Tensor:
            of, found, logits = states.repeat_interleave(rows), [], logits.float()
            if recursive is not None:
                heat = speculator.temperature[of][:, None]
                recursive.note(logits / torch.where(heat > 0, heat, 1))
            for _ in range(width):  # the noise is in the kernel: the next best is the best without those before it
                best = gumbel_sample(
                    logits, of, speculator.temperature, speculator.seeds, positions, apply_temperature=True,
                    is_drafting=recursive is not None, use_fp64=speculator.use_fp64_gumbel,
                )  # fmt: skip
                found.append(best)
                logits = logits.scatter(1, best[:, None], -torch.inf)
            return torch.stack(found, 1)

        return rank


def _accept(rows: Rows, own: Tensor, following: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What is said along the chains that are shown: tokens [B, width], of which the first counts [B] hold.

    Args:
        own, following: [kept] the target's token, and the draft, after each token of the chains.
    """
    begin, end = rows.on.kept_begin[:-1], rows.on.kept_begin[1:]
    index = begin[:, None] + torch.arange(width, device=own.device)
    inside, last = index < end[:, None], index == end[:, None] - 1
    index = index.clamp(max=len(own) - 1)
    said = torch.where(inside, own[index], 0)
    agreed = inside & ~last & (said == following[index])
    return said, agreed.long().cumprod(1).sum(1).int() + 1
