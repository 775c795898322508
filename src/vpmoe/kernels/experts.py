"""Routed experts on one GPU: gather, up, ReLU², down, weighting and combination in few kernels.

Rows are (token, slot) pairs sorted by expert; a tile is up to `ROWS` rows of one expert. A tile
keeps its [rows, F] activations in registers between the two products, so that only the
pre-activations (for the backward pass) and the [rows, D] outputs touch memory. Tiles are listed in
a table of fixed size, so that no launch depends on the routing and a CUDA graph can hold it all.
Every product is a plain pipelined `tl.dot` loop: a reduction over the same tile inside such a loop
gave wrong sums on Triton 3.6, so sums over rows and columns are products, too, or lie outside.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vpmoe.kernels.dispatch import ROWS, DispatchPlan, plan_dispatch
from vpmoe.kernels.weight_gradients import COLUMNS, Rows, down_gradient, up_gradient

# Fastest on an H200 of those tried.
FORWARD = {"BK": 64, "BN": 64, "num_warps": 4, "num_stages": 3}
BACKWARD = {"BK": 64, "BN": 64, "num_warps": 4, "num_stages": 4}


@triton.jit
def _forward_kernel(
    x, w1, b1, w2, b2, weights, order, offsets, tile_expert, tile_row, z_out, y_out,
    D: tl.constexpr, F: tl.constexpr, A: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile's slots, weighted; `w1` and `w2` are descriptors of the stacks."""
    e = tl.load(tile_expert + tl.program_id(0))
    if e < 0:
        return
    rows = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < tl.load(offsets + e + 1)
    slot = tl.load(order + rows, inside, other=0).to(tl.int64)
    token = slot // A
    f = tl.arange(0, F)
    z = tl.zeros((ROWS, F), tl.float32)
    for k in range(0, D, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(x + token[:, None] * D + ks[None, :], inside[:, None], other=0.0)
        z = tl.dot(a, w1.load([e * F, k]).T, z)
    z += tl.load(b1 + e * F + f)[None, :].to(tl.float32)
    z16 = z.to(tl.bfloat16)
    tl.store(z_out + rows[:, None] * F + f[None, :], z16, inside[:, None])
    weight = tl.load(weights + slot, inside, other=0.0)
    r = tl.maximum(z16.to(tl.float32), 0.0)
    h = (r * r * weight[:, None]).to(tl.bfloat16)
    for n in range(0, D, BN):
        ns = n + tl.arange(0, BN)
        b = w2.load([e * D + n, 0]).T
        bias = tl.load(b2 + e * D + ns).to(tl.float32)
        y = tl.dot(h, b) + weight[:, None] * bias[None, :]
        y_out.store([tl.program_id(0) * ROWS, n], y.to(tl.bfloat16))


@triton.jit
def _backward_rows_kernel(
    dy, w1, w2, b2, weights, order, offsets, tile_expert, tile_row, z_in, units_out, dz_out,
    weights_out, dz_sums, dx_out, dweight,
    D: tl.constexpr, F: tl.constexpr, A: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's inputs and weights, and what the weight gradients are made of.

    dy·b2, a part of the weights' gradient, is one more small product of the same rows.
    """
    e = tl.load(tile_expert + tl.program_id(0))
    if e < 0:
        return
    rows = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = rows < tl.load(offsets + e + 1)
    slot = tl.load(order + rows, inside, other=0).to(tl.int64)
    token = slot // A
    f = tl.arange(0, F)
    column = tl.arange(0, COLUMNS)
    dh = tl.zeros((ROWS, F), tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, D, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(dy + token[:, None] * D + ks[None, :], inside[:, None], other=0.0)
        c = tl.load(b2 + e * D + ks[:, None] + 0 * column[None, :])
        dh = tl.dot(a, w2.load([e * D + k, 0]), dh)
        of_bias = tl.dot(a, c, of_bias)
    at = rows[:, None] * F + f[None, :]
    r = tl.maximum(tl.load(z_in + at, inside[:, None], other=0.0).to(tl.float32), 0.0)
    weight = tl.load(weights + slot, inside, other=0.0)
    tl.store(weights_out + rows, weight.to(tl.bfloat16), inside)
    tl.store(units_out + at, (r * r * weight[:, None]).to(tl.bfloat16), inside[:, None])
    slope = dh * r
    bias = tl.sum(of_bias, 1) / COLUMNS  # all columns are alike
    tl.store(dweight + slot, tl.sum(slope * r, 1) + bias, inside)
    dz = (slope * (2.0 * weight[:, None])).to(tl.bfloat16)
    tl.store(dz_out + at, dz, inside[:, None])
    tl.store(dz_sums + tl.program_id(0) * F + f, tl.sum(dz.to(tl.float32), 0))
    for n in range(0, D, BN):
        dx = tl.dot(dz, w1.load([e * F, n]))
        dx_out.store([tl.program_id(0) * ROWS, n], dx.to(tl.bfloat16))


@triton.jit
def _bias_gradient_kernel(
    partial, offsets, out,
    E: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program per expert: the sum of its tiles' sums, in the tiles' order."""
    e = tl.program_id(0)
    each = tl.arange(0, E)
    tiles = (tl.load(offsets + each + 1) - tl.load(offsets + each) + ROWS - 1) // ROWS
    begin = tl.sum(tl.where(each < e, tiles, 0), 0)
    end = begin + tl.sum(tl.where(each == e, tiles, 0), 0)
    f = tl.arange(0, F)
    acc = tl.zeros((F,), tl.float32)
    for tile in range(begin, end, BK):
        at = tile + tl.arange(0, BK)
        acc += tl.sum(tl.load(partial + at[:, None] * F + f[None, :], (at < end)[:, None], 0.0), 0)
    tl.store(out + e * F + f, acc.to(out.dtype.element_ty))


@triton.jit
def _combine_kernel(
    rows, place, residual, out, numel,
    A: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sum of each token's A rows, in slot order, in fp32, on top of the residual if any."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    acc = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        row = tl.load(place + at // D * A + a, inside, other=0).to(tl.int64)
        acc += tl.load(rows + row * D + at % D, inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + at, inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(tl.bfloat16), inside)


def _combine(
    rows: Tensor, plan: DispatchPlan, residual: Tensor | None, like: Tensor, slots: int
) -> Tensor:
    out = torch.empty_like(like)
    _combine_kernel[(triton.cdiv(out.numel(), 2048),)](
        rows, plan.place, residual, out, out.numel(),
        A=slots, D=out.shape[1], BLOCK=2048, RESIDUAL=residual is not None, num_warps=8,
    )  # fmt: skip
    return out


def _blocks(stack: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A stack of matrices as one tall matrix that the copy engine reads in such blocks."""
    return TensorDescriptor.from_tensor(stack.view(-1, stack.shape[2]), [rows, columns])


def _tall(rows: Tensor, columns: int) -> TensorDescriptor:
    """Rows of all tiles, which the copy engine writes in blocks of a tile."""
    return TensorDescriptor.from_tensor(rows, [ROWS, columns])


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, weights, plan, residual):
        tokens, dim = x.shape
        slots, width = weights.shape[1], w1.shape[1]
        z = torch.empty(tokens * slots, width, dtype=torch.bfloat16, device=x.device)
        y = x.new_empty(plan.tile_expert.numel() * ROWS, dim)
        _forward_kernel[(plan.tile_expert.numel(),)](
            x, _blocks(w1, width, FORWARD["BK"]), b1, _blocks(w2, FORWARD["BN"], width), b2,
            weights, *plan.tiles, z, _tall(y, FORWARD["BN"]),
            D=dim, F=width, A=slots, ROWS=ROWS, **FORWARD,
        )  # fmt: skip
        ctx.save_for_backward(x, b1, b2, weights, z, *plan)
        ctx.stacks = w1, w2  # the parameters themselves: what is saved may come back as a copy
        ctx.has_residual = residual is not None
        return _combine(y, plan, residual, x, slots)

    @staticmethod
    def backward(ctx: Any, dy):
        x, b1, b2, weights, z, *rest = ctx.saved_tensors
        w1, w2 = ctx.stacks
        plan = DispatchPlan(*rest)
        dy = dy.contiguous()
        tokens, dim = x.shape
        slots, (experts, width) = weights.shape[1], b1.shape
        rows = Rows(torch.empty_like(z), torch.empty_like(z), x.new_empty(tokens * slots))
        dz_sums = weights.new_empty(plan.tile_expert.numel(), width)
        dx_rows = x.new_empty(plan.tile_expert.numel() * ROWS, dim)
        dweight = torch.empty(tokens, slots, dtype=torch.float32, device=x.device)
        _backward_rows_kernel[(plan.tile_expert.numel(),)](
            dy, _blocks(w1, width, BACKWARD["BN"]), _blocks(w2, BACKWARD["BK"], width), b2, weights,
            *plan.tiles, z, *rows, dz_sums, _tall(dx_rows, BACKWARD["BN"]), dweight,
            D=dim, F=width, A=slots, COLUMNS=COLUMNS, ROWS=ROWS, **BACKWARD,
        )  # fmt: skip
        dw1 = dw2 = db2 = None
        if ctx.needs_input_grad[1]:
            dw1 = up_gradient(x, rows, w1, plan, slots)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dw2, db2 = down_gradient(dy, rows, w2, b2, plan, slots)
        db1 = torch.empty_like(b1)
        _bias_gradient_kernel[(experts,)](
            dz_sums, plan.offsets, db1, E=experts, F=width, ROWS=ROWS, BK=16
        )
        d_residual = dy if ctx.has_residual else None
        dx = _combine(dx_rows, plan, None, x, slots)
        return dx, dw1, db1, dw2, db2, dweight, None, d_residual


def routed_experts(
    x: Float[Tensor, "tokens dim"],
    w1: Float[Tensor, "experts width dim"],
    b1: Float[Tensor, "experts width"],
    w2: Float[Tensor, "experts dim width"],
    b2: Float[Tensor, "experts dim"],
    expert_weights: Float[Tensor, "tokens slots"],
    expert_ids: Int[Tensor, "tokens slots"],
    residual: Float[Tensor, "tokens dim"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """Weighted sum over each token's experts of `W2 relu(W1 x + b1)² + b2`.

    bf16 in and out, fp32 accumulation, exact gradients of everything but `expert_ids`. No token is
    dropped however skewed the routing.

    Args:
        x: Normed states, bf16.
        w1: Up projections, bf16.
        b1: Their biases, bf16.
        w2: Down projections, bf16.
        b2: Their biases, bf16.
        expert_weights: Router weights, fp32, with grad.
        expert_ids: Distinct experts of each token.
        residual: What the sum is added to, bf16; saves a pass over it.

    Returns:
        bf16 sum of the slots, in slot order: the result does not depend on the tiles' schedule.

    References:
        So et al., "Primer" (2021), arXiv:2109.08668, for ReLU². Dao AILab, "SonicMoE" (2025),
        arXiv:2512.14080, for the memory-bound regime of narrow experts. Difference: hand-written
        for width 128, biases included.
    """
    plan = plan_dispatch(expert_ids, num_experts=w1.shape[0])
    return _RoutedExperts.apply(x, w1, b1, w2, b2, expert_weights, plan, residual)
