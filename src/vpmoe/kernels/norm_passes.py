"""The passes of `kernels.norms` over the residual stream, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpmoe.kernels.sums import sum_parts

ROWS, WARPS = 2, 4  # of a program
BACKWARD_ROWS, BACKWARD_WARPS, BACKWARD_PROGRAMS = 2, 4, 528


@triton.jit
def _forward_kernel(
    stream, update, bias, gain, stream_out, normed_out, num_rows, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, UPDATE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    at = row[:, None] * D + c[None, :]
    inside = (row < num_rows)[:, None] & (c < D)[None, :]
    x = tl.load(stream + at, inside, other=0.0).to(tl.float32)
    if UPDATE:
        x += tl.load(update + at, inside, other=0.0).to(tl.float32)
        if BIAS:
            x += tl.load(bias + c, c < D, other=0.0).to(tl.float32)[None, :]
        rounded = x.to(stream_out.dtype.element_ty)
        tl.store(stream_out + at, rounded, inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    x = x * scale[:, None] * tl.load(gain + c, c < D, other=0.0).to(tl.float32)[None, :]
    tl.store(normed_out + at, x.to(normed_out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    stream, gain, d_stream, d_normed, more, most, d_out, sums, num_rows, steps, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, READERS: tl.constexpr, BIAS: tl.constexpr,
    SUMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    gains = tl.load(gain + c, c < D, other=0.0).to(tl.float32)[None, :]
    of_gain = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * D + c[None, :]
        inside = (row < num_rows)[:, None] & (c < D)[None, :]
        x = tl.load(stream + at, inside, other=0.0).to(tl.float32)
        d = tl.load(d_normed + at, inside, other=0.0).to(tl.float32)
        if READERS > 1:
            d += tl.load(more + at, inside, other=0.0).to(tl.float32)
        if READERS > 2:
            d += tl.load(most + at, inside, other=0.0).to(tl.float32)
        kept = tl.load(d_stream + at, inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * scale
        of_gain += tl.sum(d * x, 0)
        d = d * gains
        mean = (tl.sum(d * x, 1) / D)[:, None]
        total = ((d - x * mean) * scale + kept).to(d_out.dtype.element_ty)
        tl.store(d_out + at, total, inside)
        if BIAS:
            of_bias += tl.sum(total.to(tl.float32), 0)
    sums += tl.program_id(0).to(tl.int64) * SUMS
    tl.store(sums + c, of_gain, c < D)
    if BIAS:
        tl.store(sums + D + c, of_bias, c < D)


def forward(
    stream: Tensor,
    update: Tensor | None,
    bias: Tensor | None,
    gain: Tensor,
    eps: float,
    outs: tuple[Tensor, Tensor],
) -> None:
    """Write the stream with its update, if there is one, and its normed states.

    References:
        own; see `kernels.norms.add_norm`.
    """
    dim = gain.numel()
    rows = stream.numel() // dim
    _forward_kernel[(triton.cdiv(rows, ROWS),)](
        stream, update, bias, gain, *outs, rows, eps, dim, triton.next_power_of_2(dim),
        update is not None, bias is not None, ROWS, num_warps=WARPS,
    )  # fmt: skip


def backward(
    stream: Tensor,
    gain: Tensor,
    d_stream: Tensor,
    d_normed: list[Tensor],
    eps: float,
    outs: tuple[Tensor, Tensor],
) -> None:
    """Write the gradient of the stream, and those of the gain and, if there is room, of the bias.

    References:
        own; see `kernels.norms.add_norm`.
    """
    dim, (out, small) = gain.numel(), outs
    rows = stream.numel() // dim
    steps = triton.cdiv(rows, BACKWARD_PROGRAMS * BACKWARD_ROWS)
    programs = triton.cdiv(rows, steps * BACKWARD_ROWS)
    parts = torch.empty(programs, small.numel(), dtype=torch.float32, device=small.device)
    d_stream, *readers = (d.contiguous() for d in (d_stream, *d_normed))
    missing = [None] * (3 - len(readers))
    _backward_kernel[(programs,)](
        stream, gain, d_stream, *readers, *missing, out, parts, rows, steps, eps,
        dim, triton.next_power_of_2(dim), len(readers), small.numel() > dim, small.numel(),
        BACKWARD_ROWS, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    sum_parts(parts, small)
