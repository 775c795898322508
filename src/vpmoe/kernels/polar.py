"""Polar Express of narrow matrices on one GPU: one program per matrix, iterations in Gram space.

With A = X X^T of the smaller side, an iteration X <- P X, P = a I + b A + c A^2, maps A to P A P:
several iterations need only [K, K] products, which never leave the chip, and one product with X at
their end. Rounding A to bfloat16 drowns small singular values in time, so X and A are made anew
once, after the third iteration: four passes over a matrix instead of fifteen products.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

MIN_SMALL, MAX_SMALL = 64, 128  # of the smaller side: its square has to stay on the chip
CHUNK = 64  # of the longer side that is looked at together
FIRST, STEPS = 3, 5  # iterations before the matrix is made anew, and in all
WARPS, STAGES = 8, 3


@triton.jit
def _opening(gram, coefficients, COUNT: tl.constexpr):
    """Iterations while singular values are small: their product as d I + R, d and R.

    The identity's part is far larger than what is added to it, and is kept out of the rounding.
    """
    d = tl.load(coefficients)
    gram16 = gram.to(tl.bfloat16)
    r = tl.load(coefficients + 1) * gram + tl.load(coefficients + 2) * tl.dot(gram16, gram16)
    product = r
    a = d
    for step in tl.static_range(1, COUNT):
        r16 = r.to(tl.bfloat16)
        moved = a * gram + tl.dot(r16, gram16)
        gram = a * moved + tl.dot(moved.to(tl.bfloat16), r16)
        a = tl.load(coefficients + 3 * step)
        b = tl.load(coefficients + 3 * step + 1)
        c = tl.load(coefficients + 3 * step + 2)
        gram16 = gram.to(tl.bfloat16)
        r = b * gram + c * tl.dot(gram16, gram16)
        product16 = product.to(tl.bfloat16)
        product = a * product + d * r + tl.dot(r.to(tl.bfloat16), product16)
        d *= a
    return d, product


@triton.jit
def _closing(gram, coefficients, eye, COUNT: tl.constexpr):
    """Iterations while singular values are near one: their product."""
    a = tl.load(coefficients)
    gram16 = gram.to(tl.bfloat16)
    p = tl.load(coefficients + 1) * gram + tl.load(coefficients + 2) * tl.dot(gram16, gram16)
    p = tl.where(eye, p + a, p)
    product = p
    for step in tl.static_range(1, COUNT):
        p16 = p.to(tl.bfloat16)
        gram = tl.dot(tl.dot(p16, gram16).to(tl.bfloat16), p16)
        a = tl.load(coefficients + 3 * step)
        b = tl.load(coefficients + 3 * step + 1)
        c = tl.load(coefficients + 3 * step + 2)
        gram16 = gram.to(tl.bfloat16)
        p = b * gram + c * tl.dot(gram16, gram16)
        p = tl.where(eye, p + a, p)
        product = tl.dot(p.to(tl.bfloat16), product.to(tl.bfloat16))
    return product


@triton.jit
def _polar_kernel(
    x, squares, coefficients, safety, eps,
    LONG: tl.constexpr, SMALL: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr,
    TALL: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One matrix, in place; sums of squares of its rows beside it."""
    begin = x + tl.program_id(0).to(tl.int64) * (LONG * SMALL)
    i = tl.arange(0, SMALL)
    j = tl.arange(0, CHUNK)
    along: tl.constexpr = SMALL if TALL else 1
    across: tl.constexpr = 1 if TALL else LONG
    tile = begin + i[:, None] * across + j[None, :] * along
    eye = i[:, None] == i[None, :]
    gram = tl.zeros((SMALL, SMALL), tl.float32)
    for k in tl.range(0, LONG, CHUNK, num_stages=STAGES):
        part = tl.load(tile + k * along)
        gram = tl.dot(part, tl.trans(part), gram)
    norm = tl.sqrt(tl.sum(tl.sum(tl.where(eye, gram, 0.0), 1), 0))
    inverse = 1.0 / (norm * safety + eps)
    d, r = _opening(gram * (inverse * inverse), coefficients, FIRST)
    r16 = r.to(tl.bfloat16)
    gram = tl.zeros((SMALL, SMALL), tl.float32)
    for k in tl.range(0, LONG, CHUNK, num_stages=STAGES):
        part = tl.load(tile + k * along)
        part = ((d * part.to(tl.float32) + tl.dot(r16, part)) * inverse).to(tl.bfloat16)
        tl.store(tile + k * along, part)
        gram = tl.dot(part, tl.trans(part), gram)
    q16 = _closing(gram, coefficients + 3 * FIRST, eye, STEPS - FIRST).to(tl.bfloat16)
    tl.debug_barrier()  # what other threads have stored is read now
    rows = squares + tl.program_id(0).to(tl.int64) * (LONG if TALL else SMALL)
    total = tl.zeros((SMALL,), tl.float32)
    for k in tl.range(0, LONG, CHUNK, num_stages=1):
        part = tl.load(tile + k * along)
        part = tl.dot(q16, part).to(tl.bfloat16)
        tl.store(tile + k * along, part)
        wide = part.to(tl.float32)
        if TALL:
            tl.store(rows + k + j, tl.sum(wide * wide, 0))
        else:
            total += tl.sum(wide * wide, 1)
    if not TALL:
        tl.store(rows + i, total)


def polar_fits(rows: int, cols: int, *, steps: int) -> bool:
    """Whether `polar_` computes matrices of this shape: more steps need another renewal.

    References:
        own.
    """
    small, long = min(rows, cols), max(rows, cols)
    if steps != STEPS:
        return False
    return MIN_SMALL <= small <= MAX_SMALL and small & (small - 1) == 0 and long % CHUNK == 0


def polar_(
    matrices: Float[Tensor, "stack rows cols"],
    coefficients: Float[Tensor, "5 3"],
    *,
    safety: float,
    eps: float,
) -> Float[Tensor, "stack rows 1"]:
    """Sums of squares of the rows, float32; the matrices become nearly orthogonal, in place.

    Args:
        matrices: bf16, contiguous, of a shape that `polar_fits`.
        coefficients: a, b, c of each of five iterations, float32, on the same device.
        safety: The first matrix is divided by this times its norm.
        eps: Added to that divisor.

    References:
        Amsel et al., "The Polar Express" (2025), arXiv:2505.16932. Difference: iterations on Gram
        matrices, in two blocks; `optim.polar_express` is the reference.
    """
    stack, rows, cols = matrices.shape
    squares = torch.empty(stack, rows, 1, dtype=torch.float32, device=matrices.device)
    _polar_kernel[(stack,)](
        matrices, squares, coefficients, safety, eps,
        LONG=max(rows, cols), SMALL=min(rows, cols), STEPS=STEPS, FIRST=FIRST,
        TALL=rows > cols, CHUNK=CHUNK, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return squares
