"""The place in vLLM's draft model where a delta is added: between the merged gate and up projection and its activation.

Shape legend: T rows of the forward, F FFN width (this rank's share), N = max_num_seqs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_steer.common.errors import SteeringError

# vLLM's activations that compute act(x[:d]) * x[d:]. Others interleave the halves or swap them.
GATE_FIRST = ("SiluAndMul", "GeluAndMul")


@dataclass
class CpuRows:
    """Which rows the eager forward on a CPU steers, in the form that costs it least.

    No CPU kernel reads an index per row without a copy, and torch's general one costs most.
    """

    rows: Tensor | None = None  # as listed; None: `count` consecutive ones from `first`
    entries: Tensor | None = None  # one for each row; None: entries 1, 2, ... or, where `alone`, entry 1 for all
    first: int = 0
    count: int = 0
    alone: bool = False

    def add(self, gate_up: Tensor, deltas: Tensor) -> None:
        """Add deltas [N + 1, F] to the up half of gate_up [..., 2F], in place."""
        if not self.count:
            return
        width = deltas.shape[-1]
        up = gate_up.view(-1, gate_up.shape[-1]).narrow(1, width, width)
        if self.rows is not None:
            assert self.entries is not None
            up.index_add_(0, self.rows, deltas.index_select(0, self.entries))
        elif self.entries is not None:
            up.narrow(0, self.first, self.count).add_(deltas.index_select(0, self.entries))
        else:
            up.narrow(0, self.first, self.count).add_(deltas.narrow(0, 1, 1 if self.alone else self.count))


class SteeredActivation(nn.Module):
    """Wraps an MLP's `act_fn`: act(gate) * (up + deltas[entry[row]])."""

    def __init__(self, act_fn: nn.Module, deltas: Tensor, entry: Tensor, cpu_rows: CpuRows):
        """`deltas` [N + 1, F] is this layer's view of all, `entry` [>= T] int32 says which of them each row gets."""
        super().__init__()
        self.act_fn = act_fn
        self.form = _form(act_fn)
        self.deltas: Tensor
        self.entry: Tensor
        self.register_buffer("deltas", deltas, persistent=False)
        self.register_buffer("entry", entry, persistent=False)
        self._cpu_rows = cpu_rows

    def forward(self, gate_up: Tensor) -> Tensor:
        """The activation [..., F] of gate_up [..., 2F].

        Compiled it is plain tensor code, which inductor fuses into one kernel and which is the same for every layer.
        """
        if torch.compiler.is_compiling():
            gate, up = gate_up.chunk(2, -1)
            return _gate(gate, self.form) * (up + self.deltas[self.entry[: gate_up.shape[-2]]])
        if gate_up.device.type == "cpu":
            self._cpu_rows.add(gate_up, self.deltas)
            return self.act_fn(gate_up)
        from vllm_steer.serving import kernels

        flat = gate_up.view(-1, gate_up.shape[-1])
        if flat.shape[-1] != 2 * self.deltas.shape[-1] or flat.shape[0] > self.entry.shape[0]:
            raise SteeringError(
                f"the drafter's MLP got rows and columns {tuple(gate_up.shape)}, steering has room for "
                f"{self.entry.shape[0]} rows of {2 * self.deltas.shape[-1]}: this is a fault of vllm-steer, report it"
            )
        out = kernels.steered_activation(flat, self.deltas, self.entry, self.form)
        return out.view(*gate_up.shape[:-1], -1)


def _form(act_fn: nn.Module) -> str:
    if type(act_fn).__name__ == "SiluAndMul":
        return "silu"
    return "gelu_tanh" if getattr(act_fn, "approximate", "none") == "tanh" else "gelu"


def _gate(x: Tensor, form: str) -> Tensor:
    if form == "silu":
        return nn.functional.silu(x)
    return nn.functional.gelu(x, approximate="tanh" if form == "gelu_tanh" else "none")


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """The MLPs of a vLLM language model in layer order: merged gate_up_proj, an activation that multiplies gate first.

    Only the MLP of the layer itself counts: not a vision tower's, and not an expert's. Raises SteeringError when a
    layer has two.
    """
    found: dict[int, nn.Module] = {}
    for name, module in getattr(model, "language_model", model).named_modules():
        match = re.search(r"(?:^|\.)layers\.(\d+)\.[^.]+$", name)
        if match is None or not hasattr(module, "gate_up_proj"):
            continue
        if type(getattr(module, "act_fn", None)).__name__ in GATE_FIRST:
            layer = int(match.group(1))
            if layer in found:
                raise SteeringError(
                    f"layer {layer} of vLLM's {type(model).__name__} has two MLPs: it cannot be steered"
                )
            found[layer] = module
    return [found[i] for i in sorted(found)]


def require_width(mlp: nn.Module, width: int) -> None:
    """Raise SteeringError unless the merged projection of this rank writes 2 * width columns."""
    projection: Any = mlp.gate_up_proj
    columns = getattr(projection, "output_size_per_partition", None)
    if columns is None and isinstance(weight := getattr(projection, "weight", None), Tensor):
        columns = weight.shape[0]
    if columns != 2 * width:
        raise SteeringError(
            f"the drafter's merged gate_up_proj writes {columns} columns on this rank, the steering needs {2 * width}: "
            "this drafter cannot be steered in vLLM"
        )
