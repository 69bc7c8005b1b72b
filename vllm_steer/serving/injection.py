"""Steering inside vLLM's batched draft forward: fixed buffers, one custom op, one wrapped module per MLP.

Shape legend: B requests in the batch, L steered layers, F FFN width (this rank's share), k draft length,
N = max_num_seqs, T tokens in the forward.

    deltas    [N + 1, L, F]   entry i + 1 belongs to batch row i; entry 0 is all zeros, for ever
    rows      [(k + 2) * N]   which rows of the forward are steered ...
    requests  [(k + 2) * N]   ... and with which entry of `deltas` (0: not at all)
    count     [3] int32       how many entries of rows / requests are in use; for the CPU: their form, their first row

The buffers keep shape and address for life, and nothing that torch.compile traces depends on their contents:
vLLM traces the drafter once, during profiling, when nothing is steered yet.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.steered import checkpoint
from vllm_steer.drafters.steered.module import Steering
from vllm_steer.serving.plan import Plan
from vllm_steer.serving.telemetry.block_counter import Blocks

logger = logging.getLogger("vllm.steer")

# Activations that compute act(x[:d]) * x[d:]: the up-projection is the upper half. Others interleave or swap.
GATE_FIRST = ("SiluAndMul", "GeluAndMul")

# Forms of a list of steered rows. A CPU has no kernel that reads an index per row, and its general one costs most:
LISTS = 0  # rows and entries as listed
SPAN = 1  # consecutive rows, entries as listed
EACH = 2  # rows 0, 1, ... with entries 1, 2, ...
ONE = 3  # consecutive rows, all with entry 1; the last three read no row numbers but the first

_library = torch.library.Library("vllm_steer", "DEF")
_library.define(
    "inject(Tensor(a!) gate_up, Tensor deltas, Tensor rows, Tensor requests, Tensor count, int layer) -> ()"
)


def _inject_cpu(gate_up: Tensor, deltas: Tensor, rows: Tensor, requests: Tensor, count: Tensor, layer: int) -> None:
    n, form, first = count.tolist()
    if n == 0:
        return
    width = deltas.shape[-1]
    up = gate_up.view(-1, 2 * width).narrow(1, width, width)
    entries = deltas.select(1, layer)
    if form == LISTS:
        up.index_add_(0, rows[:n], entries.index_select(0, requests[:n]))
    elif form == SPAN:
        up.narrow(0, first, n).add_(entries.index_select(0, requests[:n]))
    else:
        up.narrow(0, first, n).add_(entries.narrow(0, 1, n if form == EACH else 1))


def _inject_cuda(gate_up: Tensor, deltas: Tensor, rows: Tensor, requests: Tensor, count: Tensor, layer: int) -> None:
    from vllm_steer.serving.kernels import inject

    inject(gate_up, deltas, rows, requests, count, layer)


def _inject_fake(gate_up: Tensor, deltas: Tensor, rows: Tensor, requests: Tensor, count: Tensor, layer: int) -> None:
    return None


_library.impl("inject", _inject_cpu, "CPU")
_library.impl("inject", _inject_cuda, "CUDA")
torch.library.register_fake("vllm_steer::inject", _inject_fake, lib=_library)


class SteeredActivation(nn.Module):
    """Wraps an MLP's `act_fn`: adds the deltas to the upper half of gate_up, then applies it."""

    def __init__(self, act_fn: nn.Module, injection: Injection, layer: int):
        super().__init__()
        self.act_fn = act_fn
        self.layer = layer
        self.deltas: Tensor
        self.rows: Tensor
        self.requests: Tensor
        self.count: Tensor
        self.register_buffer("deltas", injection.deltas, persistent=False)
        self.register_buffer("rows", injection.rows, persistent=False)
        self.register_buffer("requests", injection.requests, persistent=False)
        self.register_buffer("count", injection.count, persistent=False)

    def forward(self, gate_up: Tensor) -> Tensor:
        """The activation [rows, F] of gate_up [rows, 2F], after each row's delta was added to its up half."""
        # Eager CPU: past the dispatcher, which costs as much as the addition.
        direct = gate_up.device.type == "cpu" and not torch.compiler.is_compiling()
        inject = _inject_cpu if direct else torch.ops.vllm_steer.inject
        inject(gate_up, self.deltas, self.rows, self.requests, self.count, self.layer)
        return self.act_fn(gate_up)


class Injection:
    """One engine's steering: the weights, the buffers, and the three moments of a draft round.

    A round is: `set_guides`, `steer_window` before the first pass, `steer_drafts` before the others, `off` after.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype, tp_rank: int = 0, tp_size: int = 1):
        steering = checkpoint.load_steering(plan.source, plan.revision)
        if steering.config.projection_size != plan.projection_size:
            raise SteeringError(f"{plan.source} changed while the server was starting: start it again")
        self.plan = plan
        self.scale = plan.scale  # multiplies every delta; at 0 no row is steered
        self.blocks: Blocks | None = None  # counts them, in the first rank
        self.config = steering.config
        self.steering = _shard(steering, tp_rank, tp_size).to(device=device, dtype=dtype)
        if device.type == "cpu":
            _multiply_like_vllm(self.steering)
        n, window = plan.max_num_seqs, plan.draft_length + 2
        width = self.config.drafter.intermediate_size // tp_size
        self.deltas = torch.zeros(n + 1, self.config.num_steered, width, device=device, dtype=dtype)
        self.rows = torch.zeros(window * n, device=device, dtype=torch.int64)
        self.requests = torch.zeros(window * n, device=device, dtype=torch.int64)
        self.count = torch.zeros(3, device=device, dtype=torch.int32)
        self._entries = torch.arange(1, n + 1, device=device)
        self._back = torch.arange(window, device=device)

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
            mlp.act_fn = SteeredActivation(mlp.act_fn, self, slot)
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
    def set_guides(self, states: Tensor) -> None:
        """states [B, 3H]: the target's states at each request's last accepted position -> its deltas."""
        if self.scale != 0:
            guide = self.steering.guide(states)
            self.deltas[1 : states.shape[0] + 1] = self.steering.deltas(guide) * self.scale
            if self.blocks is not None:
                self.blocks.guided(guide)

    @torch.inference_mode()
    def steer_window(self, newest: Tensor, position: Tensor, first_row: Tensor, prompt_len: Tensor) -> None:
        """Steer the first pass by the window rule: the newest token and the re-fed verified tokens before it.

        Args (all [B] integer, on the device):
            newest: row of each request's newest token in the forward.
            position: that token's position in its sequence.
            first_row: first row of the request in the forward.
            prompt_len: positions below this are prompt, never steered.
        """
        rows = newest[:, None] - self._back
        steered = (rows >= first_row[:, None]) & (position[:, None] - self._back >= prompt_len[:, None])
        requests = torch.where(steered, self._entries[: newest.shape[0], None], 0)
        if self.rows.device.type == "cpu" and self._steer_span(rows[steered], requests[steered]):
            return
        n = rows.numel()
        self.rows[:n] = torch.where(steered, rows, 0).flatten()
        self.requests[:n] = requests.flatten()
        self._use(n)

    def _steer_span(self, rows: Tensor, requests: Tensor) -> bool:
        """Name every row from the first steered to the last, unsteered ones with entry 0, if the buffers hold them."""
        if not rows.numel():
            self.off()
            return True
        first, n = int(rows.min()), int(rows.max() - rows.min()) + 1
        if n > self.rows.numel():  # a prompt lies between
            return False
        self.requests[:n] = 0
        self.requests[rows - first] = requests
        self._use(n, ONE if int(requests.max()) == 1 and rows.numel() == n else SPAN, first)
        return True

    def _use(self, n: int, form: int = LISTS, first: int = 0) -> None:
        for i, value in enumerate((n if self.scale != 0 else 0, form, first)):
            self.count[i].fill_(value)

    @torch.inference_mode()
    def steer_drafts(self, num_requests: int) -> None:
        """Steer the later passes: one row per request, in batch order."""
        self.requests[:num_requests] = self._entries[:num_requests]
        self.rows[:num_requests] = self._entries[:num_requests] - 1
        self._use(num_requests, EACH)

    def off(self) -> None:
        """No row is steered: profiling and dummy runs have rows of their own."""
        self.count.zero_()


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs of a vLLM model in layer order: merged gate_up_proj, and an activation that multiplies gate first."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        match = re.search(r"(?:^|\.)layers\.(\d+)\.", name + ".")
        act = getattr(module, "act_fn", None)
        if match and hasattr(module, "gate_up_proj") and type(act).__name__ in GATE_FIRST:
            found[int(match.group(1))] = module
    return [found[i] for i in sorted(found)]


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
