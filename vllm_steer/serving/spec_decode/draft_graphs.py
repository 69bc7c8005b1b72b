"""V2: the later passes of a draft round as one CUDA graph, for draft models as vLLM has it for EAGLE.

vLLM 0.32 and 0.33 launch every kernel of a draft model one by one on V2. Asked for by `draft_graphs`, the k - 1 decode
passes of a round, with their sampling, are captured once for each batch size of vLLM's list and replayed; batches in
between are padded. What is in the graph reads and writes fixed buffers only. The first pass stays eager.

No GPU has run this. Everything that a CPU can show is shown in tests/engine/test_draft_graphs.py.

Shape legend: B requests in the batch, n those of the graph that is replayed (n >= B), k draft length.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from vllm_steer.serving.plan import Options

logger = logging.getLogger("vllm.steer")


class GraphedSpeculator(StandaloneARSpeculator):
    """vLLM's speculator for draft models, which replays its decode passes where it may and was asked to."""

    loops: SpeculatorCudaGraphManager | None = None  # vLLM drops managers among the attributes to profile memory

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As vLLM's, and decide whether the decode passes become graphs."""
        self.loops = None
        super().init_cudagraph_manager(cudagraph_mode)
        asked = Options.read(self.vllm_config.additional_config).draft_graphs
        why_not = self._why_eager(cudagraph_mode)
        if asked and why_not is None:
            self.loops = SpeculatorCudaGraphManager(
                self.vllm_config, self.device, CUDAGraphMode.FULL_DECODE_ONLY, decode_query_len=1
            )
        elif asked:
            logger.warning("draft_graphs: %s, so the drafter's passes are launched kernel by kernel", why_not)
        elif why_not is None:
            logger.info(
                "V2 launches the drafter's passes kernel by kernel, which can cost more than it gains; "
                '--additional-config \'{"vllm_steer": {"draft_graphs": true}}\' captures them as CUDA graphs (no GPU '
                "has run that yet), and VLLM_USE_V2_MODEL_RUNNER=0 chooses V1, which has graphs of its own"
            )

    def _why_eager(self, mode: CUDAGraphMode) -> str | None:
        """What forbids graphs here; None: nothing does."""
        parallel = self.vllm_config.parallel_config
        reasons = {
            "with one draft token there is no pass after the first": self.num_speculative_steps == 1,
            "this vLLM captures the drafter itself": any(isinstance(v, CudaGraphManager) for v in vars(self).values()),
            "cudagraph_mode has no full graphs of decodes": mode.decode_mode() != CUDAGraphMode.FULL,
            "the drafter is asked to be eager (enforce_eager)": bool(self.speculative_config.enforce_eager),
            "its attention backend cannot refresh its metadata in place": not self.supports_decode_metadata_update,
            "its attention backend cannot be captured": (
                self.attn_cg_support.min_cg_support.value < AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value
            ),
            "data or context parallelism is on": self.dp_size > 1
            or self.dcp_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "drafts are watermarked": self.draft_watermarker is not None,
        }
        return next((reason for reason, found in reasons.items() if found), None)

    def capture(self) -> None:
        """As vLLM's, and capture the decode passes; no row is steered meanwhile."""
        super().capture()
        if self.loops is None:
            return
        self.idx_mapping.fill_(-1)  # no request: the kernels skip what would touch one
        self.loops.capture(
            self._loop,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing the drafter's decode passes",
        )

    def _loop(
        self,
        num_requests: int,
        num_tokens: int,
        attn_metadata: Any,
        slot_mappings: Any,
        num_tokens_across_dp: Tensor | None,
        mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        """The decode passes of n requests, on buffers that `_prepare` has filled; this is what a graph records.

        It mirrors the loop of StandaloneARSpeculator._multi_step_decode, whose inputs advance before each pass: here
        they advance after it, so that the first pass finds them ready.
        """
        buffers, requests = self.input_buffers, self.idx_mapping[:num_requests]
        positions, seq_lens = buffers.positions[:num_requests], buffers.seq_lens[:num_requests]
        starts = buffers.query_start_loc[: num_requests + 1]
        for step in range(1, num_speculative_steps):
            self.block_tables.compute_slot_mappings(requests, starts, positions, num_tokens)
            self._update_draft_decode_metadata(attn_metadata, num_requests)
            hidden_states = self._run_model(
                buffers.input_ids[:num_tokens],
                buffers.positions[:num_tokens],
                attn_metadata,
                slot_mappings,
                num_tokens_across_dp,
            )
            self.current_draft_step.fill_(step)
            drafts = self.sample_draft(
                hidden_states[:num_requests],
                positions,
                requests,
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
            )
            self.draft_tokens[:num_requests, step] = drafts
            buffers.input_ids[:num_requests].copy_(drafts)
            positions.add_(1).clamp_(max=self.max_model_len - 1)
            seq_lens.add_(1).clamp_(max=self.max_model_len)

    def _may_replay(self) -> bool:
        """Whether this round is one that a graph holds."""
        return True

    def _multi_step_decode(self, input_batch: Any, num_rejected: Tensor, num_reqs: int, skip_attn: bool, *args: Any):
        if self.loops is not None and not skip_attn and self._may_replay():
            graph = self.loops.dispatch(num_reqs, num_reqs, 1, 0)
            if graph.cg_mode == CUDAGraphMode.FULL:
                self._replay(graph, input_batch, num_rejected, num_reqs)
                return
        super()._multi_step_decode(input_batch, num_rejected, num_reqs, skip_attn, *args)

    def _replay(self, graph: BatchExecutionDescriptor, batch: Any, num_rejected: Tensor, num_requests: int) -> None:
        assert self.loops is not None and graph.num_reqs is not None
        self._prepare(batch, num_rejected, num_requests, graph.num_reqs)
        for groups in self.attn_groups:
            for group in groups:
                group.map_to_kernel_block_table(self.block_tables.input_block_tables[group.kv_cache_group_id])
        self.loops.run_fullgraph(graph)

    def _prepare(self, batch: Any, num_rejected: Tensor, num_requests: int, padded: int) -> None:
        """Fill the buffers for the first decode pass: B requests, and rows up to n that are of none.

        vLLM's first pass has left the query starts of its own, longer rows, and `draft_tokens` may hold -1.
        """
        buffers = self.input_buffers
        last = self.expanded_positions[self.last_token_indices[:num_requests]]
        buffers.positions[:num_requests] = (last + 1).clamp_(max=self.max_model_len - 1)
        buffers.positions[num_requests:padded] = 0
        lens = batch.seq_lens[:num_requests] - num_rejected[:num_requests].int() + 2
        buffers.seq_lens[:num_requests] = lens.clamp_(max=self.max_model_len)
        buffers.seq_lens[num_requests:padded] = 0
        buffers.query_start_loc[: num_requests + 1] = self.arange_gpu[: num_requests + 1]
        buffers.query_start_loc[num_requests + 1 : padded + 1] = num_requests
        buffers.input_ids[:num_requests] = self.draft_tokens[:num_requests, 0]
        buffers.input_ids[num_requests:padded] = 0
