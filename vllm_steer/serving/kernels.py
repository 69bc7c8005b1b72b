"""The draft round's Triton kernels, for a GPU; the same in plain torch, for a CPU, is in injection.py.

Triton is imported with this module, so only what runs on a GPU may import it. Nothing here waits for the device: sizes
that change from round to round are plain integers, everything else is read where it lies.

Shape legend: B requests, T rows of the forward, H target hidden size, F FFN width (this rank's share), N max_num_seqs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton compiles an integer argument that is 1, or divides by 16, on its own. These change with every round.
_VARIES = ["num_requests", "num_rows"]


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _steered_activation_kernel(
    gate_up, deltas, entry, out, row_stride, entry_stride, width,
    GELU: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up + row * row_stride + column, mask=mask).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + column, mask=mask).to(tl.float32)
    at = tl.load(entry + row).to(tl.int64)
    if at > 0:
        up += tl.load(deltas + at * entry_stride + column, mask=mask).to(tl.float32)
    if TANH:
        gate = 0.5 * gate * (1 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    elif GELU:
        gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        gate = gate * tl.sigmoid(gate)
    tl.store(out + row * width + column, gate * up, mask=mask)


def steered_activation(gate_up: Tensor, deltas: Tensor, entry: Tensor, form: str) -> Tensor:
    """act(gate) * (up + deltas[entry[row]]) for every row, in one launch, computed in float32.

    Args:
        gate_up: [T, 2F], the gate first; its rows may be strided.
        deltas: [N + 1, F], entry 0 stands for "not steered" and is not read.
        entry: [>= T] int32.
        form: "silu", "gelu" or "gelu_tanh".

    Returns [T, F] of gate_up's dtype.
    """
    rows, width = gate_up.shape[0], deltas.shape[-1]
    out = torch.empty(rows, width, device=gate_up.device, dtype=gate_up.dtype)
    block = min(1024, triton.next_power_of_2(width))
    if rows:
        _steered_activation_kernel[(rows, triton.cdiv(width, block))](
            gate_up, deltas, entry, out, gate_up.stride(0), deltas.stride(0), width,
            GELU=form == "gelu", TANH=form == "gelu_tanh", BLOCK=block,
        )  # fmt: skip
    return out


@triton.jit
def _gather_kernel(
    low, mid, high, low_stride, mid_stride, high_stride, start, rejected, out, hidden, factor, BLOCK: tl.constexpr
):
    request, part = tl.program_id(0), tl.program_id(1)
    last = tl.load(start + request + 1).to(tl.int64) - 1 - tl.load(rejected + request).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    if part == 0:
        state = tl.load(low + last * low_stride + column, mask=mask).to(tl.float32)
    elif part == 1:
        state = tl.load(mid + last * mid_stride + column, mask=mask).to(tl.float32)
    else:
        state = tl.load(high + last * high_stride + column, mask=mask).to(tl.float32)
    tl.store(out + (request * 3 + part).to(tl.int64) * hidden + column, state * factor, mask=mask)


def gather_states(parts: Sequence[Tensor], start: Tensor, rejected: Tensor, out: Tensor, factor: float) -> None:
    """Write `factor` times the target's three states at each request's last accepted row into out [B, 3H].

    `parts` are three [rows, H], `start` [B + 1] and `rejected` [>= B] integer: see `steer_window`.
    """
    low, mid, high = parts
    hidden = low.shape[-1]
    block = min(1024, triton.next_power_of_2(hidden))
    _gather_kernel[(out.shape[0], 3, triton.cdiv(hidden, block))](
        low, mid, high, low.stride(0), mid.stride(0), high.stride(0), start, rejected, out, hidden, factor, BLOCK=block
    )


@triton.jit
def _normalise_kernel(guide, weight, bias, out, tally, hidden, eps, factor, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    x = tl.load(guide + request * hidden + column, mask=mask, other=0.0).to(tl.float32)
    # inf - inf and nan - nan are not 0: what is left is 0 for a guide of finite numbers alone.
    finite = tl.sum(tl.where(x - x == 0, 0, 1)) == 0
    mean = tl.sum(x) / hidden
    centred = tl.where(mask, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / hidden + eps)
    y = centred * scale * tl.load(weight + column, mask=mask).to(tl.float32)
    y += tl.load(bias + column, mask=mask).to(tl.float32)
    tl.store(out + request * hidden + column, tl.where(finite, y, 0.0), mask=mask)
    if COUNT:
        norm = tl.sqrt(tl.sum(x * x)) / factor
        tl.atomic_add(tally, tl.where(finite, 1.0, 0.0).to(tl.float64))
        tl.atomic_add(tally + 1, tl.where(finite, norm, 0.0).to(tl.float64))
        tl.atomic_add(tally + 2, tl.where(finite, 0.0, 1.0).to(tl.float64))


def normalise_guides(
    guide: Tensor, weight: Tensor, bias: Tensor, out: Tensor, eps: float, factor: float, tally: Tensor | None
) -> None:
    """LayerNorm of guide [B, H] into out [B, H]; all zeros for a guide that holds a NaN or an infinity.

    tally [3] float64 gains the number of good guides, the sum of their norms over `factor`, and the number of others.
    """
    block = triton.next_power_of_2(guide.shape[-1])
    _normalise_kernel[(guide.shape[0],)](
        guide, weight, bias, out, out if tally is None else tally, guide.shape[-1], eps, factor,
        COUNT=tally is not None, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_VARIES, "offset"])
def _window_kernel(
    entry, start, rejected, seq_lens, table, counts, before, after,
    num_requests, num_rows, offset,
    STEERED: tl.constexpr, COUNT: tl.constexpr, WINDOW: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    start_row = tl.load(start + request).to(tl.int32)  # the runners' integers have 32 or 64 bits
    begin = start_row + request  # every request before this one gained a row
    end = num_rows
    newest = begin - 1
    oldest = begin
    if request < num_requests:
        length = tl.load(start + request + 1).to(tl.int32) - start_row
        reject = tl.load(rejected + request).to(tl.int32)
        seq_len = tl.load(seq_lens + request).to(tl.int32)
        end = begin + length + 1
        if STEERED:
            newest = begin + length - reject
            # Position p is in row p - (seq_len - length) + begin: the first row that is not of the prompt.
            answer = begin + tl.load(table + request) - (seq_len - length)
            oldest = tl.maximum(newest - WINDOW + 1, tl.maximum(begin, answer))
        if COUNT:
            previous = tl.load(table + num_requests + request)
            drafts = tl.load(table + 2 * num_requests + request)
            accepted = length - 1 - reject
            ours = (previous >= 0) & (drafts > 0) & (accepted >= 0) & (accepted <= drafts)
            ours = ours & (tl.load(before + tl.maximum(previous, 0)) == seq_len - length)
            one = tl.where(ours, 1.0, 0.0).to(tl.float64)
            tl.atomic_add(counts + tl.where(ours, offset + drafts * SIDE + accepted, 0), one)
            tl.store(after + request, seq_len - reject)
    for first in range(begin, end, BLOCK):
        row = first + tl.arange(0, BLOCK)
        steered = (row >= oldest) & (row <= newest)
        tl.store(entry + row, tl.where(steered, request + 1, 0), mask=row < end)


def steer_window(
    entry: Tensor,
    start: Tensor,
    rejected: Tensor,
    seq_lens: Tensor,
    table: Tensor,
    window: int,
    verified: tuple[Tensor, Tensor, Tensor, int, int] | None,
) -> None:
    """Write every row of entry for the first pass, rows past the batch included, and count blocks, in one launch.

    See `Injection.steer_window`. A `window` of 0 steers no row.
    """
    counts, before, after, offset, side = verified or (entry, entry, entry, 0, 0)
    requests = table.shape[1]
    _window_kernel[(requests + 1,)](
        entry, start, rejected, seq_lens, table, counts, before, after, requests, entry.shape[0], offset,
        STEERED=window > 0, COUNT=verified is not None, WINDOW=window, SIDE=side, BLOCK=1024,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARIES)
def _drafts_kernel(entry, num_requests, num_rows, EACH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(entry + row, tl.where(row < num_requests * EACH, row // EACH + 1, 0), mask=row < num_rows)


def steer_drafts(entry: Tensor, requests: int, each: int = 1) -> None:
    """The `each` rows of request i are steered with entry i + 1 for i < requests, no other."""
    _drafts_kernel[(triton.cdiv(entry.shape[0], 1024),)](entry, requests, entry.shape[0], EACH=each, BLOCK=1024)


@triton.jit
def _pages_kernel(addresses, words, source, to, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    layer = tl.program_id(1)
    old = tl.load(source + pair).to(tl.int64)
    new = tl.load(to + pair).to(tl.int64)
    size = tl.load(words + layer)
    word = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if old != new:
        cache = tl.load(addresses + layer).to(tl.pointer_type(tl.int32))
        mask = word < size
        tl.store(cache + new * size + word, tl.load(cache + old * size + word, mask=mask), mask=mask)


def copy_pages(addresses: Tensor, words: Tensor, most: int, source: Tensor, to: Tensor) -> None:
    """Copy page source[i] to page to[i], both [n] integer, in every layer, in one launch.

    Args:
        addresses: [layers] int64, where each layer's KV cache begins.
        words: [layers] int64, four-byte words of a page in each.
        most: the largest of `words`.
    """
    grid = (len(source), len(addresses), triton.cdiv(most, 4096))
    _pages_kernel[grid](addresses, words, source, to, BLOCK=4096)
