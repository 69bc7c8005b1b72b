"""Steering inside vLLM's batched draft forward: the weights, the fixed buffers, the moments of a draft round.

Shape legend: B requests in the batch, L steered layers, F FFN width (this rank's share), H target hidden size, k draft
length, N = max_num_seqs, R the most rows a forward can have.

    deltas  [N + 1, L, F]  entry i + 1 belongs to batch row i; entry 0 is all zeros, for ever
    entry   [R] int32      which entry of `deltas` steers each row of the forward; 0: none

Both keep shape and address for life, and no layer's number is in what torch.compile traces: each layer has its view
`deltas[:, l]` (activation.py). On a GPU a round is the launches of kernels.py and the products of fuse and project.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.config import SteeringConfig
from vllm_steer.drafters.steered.module import NORM_EPS, Steering
from vllm_steer.serving.activation import GATE_FIRST, CpuRows, SteeredActivation, gated_mlps, require_width
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.telemetry.block_counter import Blocks, Verified, count

logger = logging.getLogger("vllm.steer")

INITIAL = "initial"  # the name of the steering that an engine started with

# The fuse adds three states of which each may be near float16's end (outlier channels of the residual stream reach
# 1e4); the LayerNorm that follows takes the factor out again.
FLOAT16_FACTOR = 2.0**-6


class Placed(NamedTuple):
    """One rank's share of a steering, ready to be used."""

    steering: Steering
    config: SteeringConfig
    fuse_bias: Tensor  # [H], by the factor of the fuse


class Injection:
    """One engine's steering: the weights, the buffers, and the three moments of a draft round.

    A round is: `set_guides`, `steer_window` before the first pass, `steer_drafts` before the others, `off` after.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype, tp_rank: int = 0, tp_size: int = 1):
        steering = checkpoint.load_steering(plan.source, plan.revision)
        if steering.config.projection_size != plan.projection_size:
            raise SteeringError(f"{plan.source} changed while the server was starting: start it again")
        self.plan = plan
        self.blocks: Blocks | None = None  # counts them, in the first rank
        self.factor = FLOAT16_FACTOR if dtype == torch.float16 else 1.0
        self._eps = NORM_EPS * self.factor**2
        self._cpu = device.type == "cpu"
        self._tp = tp_rank, tp_size
        self._where = device, dtype
        self._scale = plan.scale
        self.take(self.place(steering), INITIAL)
        n, hidden = plan.max_num_seqs, self.config.target.hidden_size
        self.width = self.config.drafter.intermediate_size // tp_size
        self.deltas = torch.zeros(n + 1, self.config.num_steered, self.width, device=device, dtype=dtype)
        self.entry = torch.zeros(plan.max_rows, device=device, dtype=torch.int32)
        self._states = torch.zeros(n, 3 * hidden, device=device, dtype=dtype)
        self._guides = torch.zeros(n, hidden, device=device, dtype=dtype)
        self._normed = torch.zeros(n, hidden, device=device, dtype=dtype)
        self.none_rejected = torch.zeros(n, device=device, dtype=torch.int32)
        self._back = torch.arange(plan.draft_length + 2, device=device)
        self._cpu_rows = CpuRows()
        self._drafting = False  # `entry` is that of the later passes

    def place(self, steering: Steering) -> Placed:
        """This rank's share of a steering, on the device: all that can fail or run out of memory before `take`."""
        device, dtype = self._where
        placed = _shard(steering, *self._tp).to(device=device, dtype=dtype).requires_grad_(False)
        fuse_bias = placed.fuse.bias * self.factor
        if self._cpu:
            _multiply_like_vllm(placed)
        return Placed(placed, steering.config, fuse_bias)

    def take(self, placed: Placed, name: str) -> None:
        """Draft with this steering, of the same form as the last one, from the next round on."""
        self.steering, self.config, self._fuse_bias = placed
        self.adapter, self.scale = name, self._scale

    @property
    def scale(self) -> float:
        """Multiplies every delta; at 0 no row is steered."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value  # into the LayerNorm: the projection after it has no bias
        self._weight, self._bias = self.steering.norm.weight * value, self.steering.norm.bias * value

    def attach(self, model: nn.Module) -> None:
        """Wrap the activations of the steered layers. Raises SteeringError if an MLP is not of the known form."""
        mlps = gated_mlps(model)
        shape = self.config.drafter
        if len(mlps) != shape.num_hidden_layers:
            raise SteeringError(
                f"vLLM's {type(model).__name__} has {len(mlps)} MLPs with a merged gate_up_proj and an activation of "
                f"{', '.join(GATE_FIRST)}, the drafter has {shape.num_hidden_layers} layers: this family cannot be "
                "steered in vLLM; Llama, Qwen2, Qwen3, Mistral, Gemma, Granite and Phi-3 can"
            )
        for slot, layer in enumerate(self.config.steered_layers):
            mlp: Any = mlps[layer]
            require_width(mlp, self.width)
            mlp.act_fn = SteeredActivation(mlp.act_fn, self.deltas[:, slot], self.entry, self._cpu_rows)
        logger.info(
            "steering is on: target layers %s -> %d of %d drafter layers, %s, k=%d, scale %g, from %s",
            list(self.config.target_layer_ids),
            self.config.num_steered,
            shape.num_hidden_layers,
            self.config.rank_text,
            self.plan.draft_length,
            self.plan.scale,
            self.plan.source,
        )

    @torch.inference_mode()
    def set_guides(self, states: Sequence[Tensor], start: Tensor, rejected: Tensor) -> None:
        """Make this round's deltas from the target's states at each request's last accepted position.

        Args:
            states: the target's three states, low to high, each [rows, H].
            start: [B + 1] integer, on the device: first row of each request among them, and the end.
            rejected: [>= B] integer, on the device: rows at a request's end that the target rejected.
        """
        if self.scale == 0:
            return
        n = start.shape[0] - 1
        states_out, guides, normed = self._states[:n], self._guides[:n], self._normed[:n]
        out = self.deltas[1 : n + 1].flatten(1)
        if self._cpu:
            last = start[1:] - 1 - rejected[:n]
            torch.cat([each[last].to(out.dtype) for each in states], dim=-1, out=states_out)
            self._project(self._normalise(states_out * self.factor), out)
            return
        from vllm_steer.serving import kernels

        kernels.gather_states(states, start, rejected, states_out, self.factor)
        torch.addmm(self._fuse_bias, states_out, self.steering.fuse.weight.t(), out=guides)
        tally = None if self.blocks is None else self.blocks.guides
        kernels.normalise_guides(guides, self._weight, self._bias, normed, self._eps, self.factor, tally)
        self._project(normed, out)

    def _normalise(self, states: Tensor) -> Tensor:
        """What kernels.normalise_guides does, in plain torch."""
        guide = self.steering.fuse(states)
        if self.factor != 1:
            guide = guide - self.steering.fuse.bias + self._fuse_bias
        finite = torch.isfinite(guide).all(-1, keepdim=True)
        if self.blocks is not None:
            norms = torch.linalg.vector_norm(guide, dim=-1, dtype=torch.float32)[finite[:, 0]] / self.factor
            self.blocks.guides += torch.tensor([len(norms), float(norms.sum()), len(guide) - len(norms)])
        normed = nn.functional.layer_norm(guide, guide.shape[-1:], self._weight, self._bias, self._eps)
        return torch.where(finite, normed, 0)

    def _project(self, normed: Tensor, out: Tensor) -> None:
        """normed [B, H] -> out [B, L * F]. A row of zeros, as a broken guide has it, drafts unsteered."""
        project = self.steering.project
        if self._cpu:
            out.copy_(project(normed))
        elif isinstance(project, nn.Sequential):
            torch.mm(project[0](normed), self.steering.output.weight.t(), out=out)
        else:
            torch.mm(normed, project.weight.t(), out=out)

    @torch.inference_mode()
    def steer_window(
        self, start: Tensor, rejected: Tensor, seq_lens: Tensor, table: Tensor, verified: Verified | None = None
    ) -> None:
        """Steer the first pass by the window rule: the newest token and the re-fed verified tokens before it. Count the
        verified blocks on the way.

        The pass has one row more for each request than the target's had: request i begins at row start[i] + i, and its
        newest token follows its last accepted one.

        Args (all integer, on the device):
            start: [B + 1] first row of each request in the target's pass, and the end.
            rejected: [>= B] rows at a request's end that the target rejected.
            seq_lens: [>= B] length of each request up to its last row in the target's pass.
            table: [1 or 3, B] int32: length of each prompt, whose positions are never steered; to count, each
                request's row in the last round and its verified drafts.
            verified: where blocks are counted; None: nowhere.
        """
        n = start.shape[0] - 1
        self._drafting = False
        if not self._cpu:
            from vllm_steer.serving import kernels

            window = len(self._back) if self.scale != 0 else 0
            kernels.steer_window(self.entry, start, rejected, seq_lens, table, window, verified)
            return
        length, rejected, seq_lens = start[1:] - start[:-1], rejected[:n], seq_lens[:n]
        if verified is not None:
            count(verified, table[1], table[2], length, rejected, seq_lens)
        if self.scale == 0:
            self.off()
            return
        begin = start[:-1] + torch.arange(n)
        accepted = length - rejected
        position = seq_lens - length + accepted
        rows = (begin + accepted)[:, None] - self._back
        steered = (rows >= begin[:, None]) & (position[:, None] - self._back >= table[0][:, None])
        entries = torch.where(steered, torch.arange(1, n + 1)[:, None], 0)
        self._steer_on_cpu(rows[steered], entries[steered])

    def _steer_on_cpu(self, rows: Tensor, entries: Tensor) -> None:
        self.entry.zero_()
        self.entry[rows] = entries.int()
        if not rows.numel():
            self._set_cpu_rows(CpuRows())
            return
        first, end = int(rows.min()), int(rows.max()) + 1
        if end - first > 2 * rows.numel():  # a prompt lies between
            self._set_cpu_rows(CpuRows(rows=rows, entries=entries, count=rows.numel()))
        elif end - first == rows.numel() and int(entries.max()) == 1:
            self._set_cpu_rows(CpuRows(first=first, count=end - first, alone=True))
        else:
            self._set_cpu_rows(CpuRows(first=first, count=end - first, entries=self.entry[first:end].clone()))

    def _set_cpu_rows(self, rows: CpuRows) -> None:
        vars(self._cpu_rows).update(vars(rows))  # in place: every layer holds this one object

    @torch.inference_mode()
    def steer_drafts(self, num_requests: int, each: int = 1) -> None:
        """Steer the later passes: `each` rows per request, in batch order."""
        if self.scale == 0 or self._drafting:
            return
        self._drafting = True
        if not self._cpu:
            from vllm_steer.serving import kernels

            kernels.steer_drafts(self.entry, num_requests, each)
            return
        self.entry.zero_()
        count = num_requests * each
        entries = torch.arange(1, num_requests + 1, dtype=torch.int32).repeat_interleave(each)
        self.entry[:count] = entries
        alone, listed = num_requests == 1, each > 1 and num_requests > 1
        self._set_cpu_rows(CpuRows(count=count, entries=entries if listed else None, alone=alone))

    @torch.inference_mode()
    def off(self) -> None:
        """No row is steered: profiling and dummy runs have rows of their own."""
        self._drafting = False
        self.entry.zero_()
        self._set_cpu_rows(CpuRows())


def _multiply_like_vllm(steering: Steering) -> None:
    """Send the linear layers through vLLM's own CPU kernel: 1.6 times torch's speed at one request, 4 times at eight
    (full rank for Qwen2.5-Coder 1.5B / 0.5B, two cores)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in steering.modules():
        if isinstance(layer, nn.Linear):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            layer.forward = functools.partial(_cpu_linear, layer)  # type: ignore[method-assign]  # as vLLM does


def _cpu_linear(layer: Any, x: Tensor) -> Tensor:
    return layer.cpu_linear(x, layer.weight, layer.bias)


def _shard(steering: Steering, rank: int, size: int) -> Steering:
    """Keep this tensor-parallel rank's share of F, cut like the up-projection it is added to."""
    if size == 1:
        return steering
    width = steering.config.drafter.intermediate_size
    if width % size:
        raise SteeringError(f"the drafter's FFN width {width} does not divide by tensor_parallel_size {size}")
    weight = steering.output.weight.unflatten(0, (steering.config.num_steered, width))
    share = weight[:, rank * width // size : (rank + 1) * width // size].flatten(0, 1).contiguous()
    steering.output.weight = nn.Parameter(share, requires_grad=False)
    return steering
