"""Gradients of the experts' stacked matrices: products over each expert's rows.

An expert's rows are cut into chunks of bounded length, so that one hot expert does not keep the
rest of the GPU waiting. A chunk that is a whole expert writes its result; the others write partial
sums, which a second kernel adds in the chunks' order: the result never depends on the schedule.
Where the parameter has a float32 `main_grad` (Megatron-Core's gradient buffer), the kernels add to
it instead of writing a bf16 gradient that someone else would have to add.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vpmoe.kernels.dispatch import MOST_PARTIALS, DispatchPlan

COLUMNS = 16  # of the product that sums dy over rows; tensor cores take no fewer

# Fastest on an H200 of those tried.
UP = {"BK": 64, "num_warps": 4, "num_stages": 5}
DOWN = {"BK": 64, "num_warps": 8, "num_stages": 5}


class Rows(NamedTuple):
    """What the backward pass left of each (token, slot) pair, sorted by expert.

    Attributes:
        units: [R, F] bf16, expert weight times relu(z)².
        d_z: [R, F] bf16.
        weights: [R] bf16, expert weights.
    """

    units: Tensor
    d_z: Tensor
    weights: Tensor


@triton.jit
def _up_kernel(
    d_z, x, order, chunk_expert, chunk_begin, chunk_end, first_partial, partials, out,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, A: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dW1 [F, BN] of a chunk: dz^T x."""
    chunk = tl.program_id(0) // (D // BN)
    e = tl.load(chunk_expert + chunk)
    if e < 0:
        return
    begin, end = tl.load(chunk_begin + chunk), tl.load(chunk_end + chunk)
    is_partial = chunk < tl.load(first_partial + E)
    f = tl.arange(0, F)
    n = tl.program_id(0) % (D // BN) * BN
    ns = n + tl.arange(0, BN)
    acc = tl.zeros((F, BN), tl.float32)
    for row in range(begin, end, BK):
        rows = row + tl.arange(0, BK)
        inside = rows < end
        token = (tl.load(order + rows, inside, other=0) // A).to(tl.int64)
        at = rows[:, None].to(tl.int64) * F + f[None, :]
        a = tl.load(d_z + at, inside[:, None], other=0.0)
        b = tl.load(x + token[:, None] * D + ns[None, :], inside[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc)
    at = f[:, None] * D + ns[None, :]
    if is_partial:
        tl.store(partials + chunk.to(tl.int64) * (F * D) + at, acc)
    elif not ACCUMULATE:
        out.store([e * F, n], acc.to(tl.bfloat16))
    elif begin < end:
        # No other program adds here: this is a load, a sum and a store that nobody waits for.
        tl.atomic_add(out + e.to(tl.int64) * (F * D) + at, acc, sem="relaxed")


@triton.jit
def _down_kernel(
    dy, units, weights, order, chunk_expert, chunk_begin, chunk_end, first_partial,
    partials, bias_partials, out, bias_out,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dW2 [BN, F] of a chunk: dy^T units; and db2: dy^T weights, the same product once more."""
    chunk = tl.program_id(0) // (D // BN)
    e = tl.load(chunk_expert + chunk)
    if e < 0:
        return
    begin, end = tl.load(chunk_begin + chunk), tl.load(chunk_end + chunk)
    is_partial = chunk < tl.load(first_partial + E)
    f = tl.arange(0, F)
    n = tl.program_id(0) % (D // BN) * BN
    ns = n + tl.arange(0, BN)
    column = tl.arange(0, COLUMNS)
    acc = tl.zeros((BN, F), tl.float32)
    sums = tl.zeros((BN, COLUMNS), tl.float32)
    for row in range(begin, end, BK):
        rows = row + tl.arange(0, BK)
        inside = rows < end
        token = (tl.load(order + rows, inside, other=0) // A).to(tl.int64)
        a = tl.load(dy + token[:, None] * D + ns[None, :], inside[:, None], other=0.0)
        at = rows[:, None].to(tl.int64) * F + f[None, :]
        b = tl.load(units + at, inside[:, None], other=0.0)
        c = tl.load(weights + rows[:, None] + 0 * column[None, :], inside[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc)
        sums = tl.dot(tl.trans(a), c, sums)
    bias = tl.sum(sums, 1) / COLUMNS  # all columns are alike
    at = ns[:, None] * F + f[None, :]
    if is_partial:
        tl.store(partials + chunk.to(tl.int64) * (F * D) + at, acc)
        tl.store(bias_partials + chunk * D + ns, bias)
    else:
        tl.store(bias_out + e * D + ns, bias.to(bias_out.dtype.element_ty))
        if not ACCUMULATE:
            out.store([e * D + n, 0], acc.to(tl.bfloat16))
        elif begin < end:
            tl.atomic_add(out + e.to(tl.int64) * (F * D) + at, acc, sem="relaxed")


@triton.jit
def _add_up_kernel(
    partials, chunk_expert, first_partial, out,
    E: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """The partial sums of an expert that was cut, in their order; its first chunk's program."""
    chunk = tl.program_id(1)
    if chunk < tl.load(first_partial + E):
        e = tl.load(chunk_expert + chunk).to(tl.int64)
        if chunk == tl.load(first_partial + e):
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            acc = tl.zeros((BLOCK,), tl.float32)
            for partial in range(chunk, tl.load(first_partial + e + 1)):
                acc += tl.load(partials + partial * SIZE + at, at < SIZE, other=0.0)
            if ACCUMULATE:
                acc += tl.load(out + e * SIZE + at, at < SIZE, other=0.0)
            tl.store(out + e * SIZE + at, acc.to(out.dtype.element_ty), at < SIZE)


def _columns(dim: int) -> int:
    """Width of a program's part of the model dimension."""
    return 128 if dim % 128 == 0 else 64


def _target(weight: Tensor) -> tuple[Tensor, bool]:
    """Where a gradient goes: added to the parameter's float32 `main_grad`, or a new tensor."""
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != torch.float32:
        return torch.empty_like(weight), False
    assert buffer.shape == weight.shape and buffer.is_contiguous()
    weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    return buffer, True


def _writable(out: Tensor, rows: int, columns: int, accumulate: bool) -> Tensor | TensorDescriptor:
    """A pointer to add to, or what the copy engine writes blocks to."""
    if accumulate:
        return out
    return TensorDescriptor.from_tensor(out.view(-1, out.shape[2]), [rows, columns])


def _add_up(partials: Tensor, plan: DispatchPlan, out: Tensor, accumulate: bool) -> None:
    size = partials.shape[1]
    _add_up_kernel[(triton.cdiv(size, 4096), MOST_PARTIALS)](
        partials, plan.chunk_expert, plan.first_partial, out,
        E=out.shape[0], SIZE=size, BLOCK=4096, ACCUMULATE=accumulate, num_warps=8,
    )  # fmt: skip


def up_gradient(x: Tensor, rows: Rows, w1: Tensor, plan: DispatchPlan, slots: int) -> Tensor | None:
    """dW1 in its dtype, or None where it was added to `w1.main_grad`."""
    (experts, width, dim), block = w1.shape, _columns(w1.shape[2])
    out, accumulate = _target(w1)
    partials = torch.empty(MOST_PARTIALS, width * dim, dtype=torch.float32, device=x.device)
    _up_kernel[(plan.chunk_expert.numel() * (dim // block),)](
        rows.d_z, x, plan.order, *plan.chunks, partials,
        _writable(out, width, block, accumulate),
        E=experts, D=dim, F=width, A=slots, BN=block, ACCUMULATE=accumulate, **UP,
    )  # fmt: skip
    _add_up(partials, plan, out.view(experts, -1), accumulate)
    return None if accumulate else out


def down_gradient(
    dy: Tensor, rows: Rows, w2: Tensor, b2: Tensor, plan: DispatchPlan, slots: int
) -> tuple[Tensor | None, Tensor]:
    """dW2, or None where it was added to `w2.main_grad`; and db2."""
    (experts, dim, width), block = w2.shape, _columns(w2.shape[1])
    out, accumulate = _target(w2)
    bias = torch.empty_like(b2)
    partials = torch.empty(MOST_PARTIALS, width * dim, dtype=torch.float32, device=dy.device)
    bias_partials = torch.empty(MOST_PARTIALS, dim, dtype=torch.float32, device=dy.device)
    _down_kernel[(plan.chunk_expert.numel() * (dim // block),)](
        dy, rows.units, rows.weights, plan.order, *plan.chunks, partials, bias_partials,
        _writable(out, block, width, accumulate), bias,
        E=experts, D=dim, F=width, A=slots, COLUMNS=COLUMNS, BN=block, ACCUMULATE=accumulate,
        **DOWN,
    )  # fmt: skip
    _add_up(partials, plan, out.view(experts, -1), accumulate)
    _add_up(bias_partials, plan, bias, False)
    return None if accumulate else out, bias
