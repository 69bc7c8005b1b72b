"""The GPU form of the injection: one Triton kernel that reads its row count on the device (graph-safe)."""

from __future__ import annotations

from torch import Tensor
from vllm.triton_utils import tl, triton


@triton.jit
def _inject_kernel(
    gate_up,  # [T, 2F]
    deltas,  # [N + 1, L, F] from layer's first element
    rows,
    requests,
    count,
    row_stride,
    entry_stride,
    width,  # F
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0)
    if entry < tl.load(count):
        request = tl.load(requests + entry)
        if request > 0:  # unused entries all name row 0: adding zeros there would race with its own delta
            row = tl.load(rows + entry)
            column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            mask = column < width
            delta = tl.load(deltas + request * entry_stride + column, mask=mask)
            at = gate_up + row * row_stride + width + column
            tl.store(at, tl.load(at, mask=mask) + delta, mask=mask)


def inject(gate_up: Tensor, deltas: Tensor, rows: Tensor, requests: Tensor, count: Tensor, layer: int) -> None:
    """gate_up[rows[i], F:] += deltas[requests[i], layer] for i < count. Rows of steered entries are distinct."""
    gate_up = gate_up.view(-1, gate_up.shape[-1])
    width = deltas.shape[-1]
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows.shape[0], triton.cdiv(width, block))
    _inject_kernel[grid](
        gate_up, deltas[:, layer], rows, requests, count, gate_up.stride(0), deltas.stride(0), width, BLOCK=block
    )
