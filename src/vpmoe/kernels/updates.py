"""The element-wise halves of an optimizer step on one GPU: one pass over a parameter each."""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

BLOCK = 2048


@triton.jit
def _momentum_kernel(
    gradient, momentum, active, out, numel, decay, scale,
    PER_SLICE: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(gradient + at, inside, other=0.0).to(tl.float32) * scale
    m = tl.load(momentum + at, inside, other=0.0).to(tl.float32)
    rate = 1.0 - decay
    if ACTIVE:
        rate = rate * tl.load(active + at // PER_SLICE, inside, other=0.0)
    m += rate * (g - m)
    tl.store(momentum + at, m.to(momentum.dtype.element_ty), inside)
    tl.store(out + at, (g + decay * (m - g)).to(out.dtype.element_ty), inside)


@triton.jit
def _move_kernel(
    value, param, direction, factor, active, numel, lr, decay,
    COLS: tl.constexpr, PER_SLICE: tl.constexpr, BY_ROW: tl.constexpr, ACTIVE: tl.constexpr,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value times (1 - lr·decay) minus lr · factor · direction, and its rounded copy."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    kept = 1.0 - lr * decay
    if ACTIVE:
        kept = 1.0 - lr * decay * tl.load(active + at // PER_SLICE, inside, other=0.0)
    group = at // COLS if BY_ROW else at // PER_SLICE * COLS + at % COLS
    step = tl.load(direction + at, inside, other=0.0).to(tl.float32)
    step *= tl.load(factor + group, inside, other=0.0)
    v = tl.load(value + at, inside, other=0.0) * kept - lr * step
    tl.store(value + at, v, inside)
    if COPY:
        tl.store(param + at, v.to(param.dtype.element_ty), inside)


@triton.jit
def _adamw_kernel(
    value, param, gradient, exp_avg, exp_avg_sq, active, numel, scale,
    beta1, beta2, eps, kept, rate, root,
    ACTIVE: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    if ACTIVE:
        inside = inside & (tl.load(active + at, inside, other=0) != 0)
    g = tl.load(gradient + at, inside, other=0.0).to(tl.float32) * scale
    m = tl.load(exp_avg + at, inside, other=0.0)
    s = tl.load(exp_avg_sq + at, inside, other=0.0)
    m += (1.0 - beta1) * (g - m)
    s = beta2 * s + (1.0 - beta2) * g * g
    v = tl.load(value + at, inside, other=0.0) * kept - rate * m / (tl.sqrt(s) / root + eps)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, s, inside)
    tl.store(value + at, v, inside)
    if COPY:
        tl.store(param + at, v.to(param.dtype.element_ty), inside)


@triton.jit
def _row_squares_kernel(matrices, out, num_rows, COLS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = row < num_rows
    x = tl.load(matrices + row[:, None] * COLS + col[None, :], inside[:, None], other=0.0)
    x = x.to(tl.float32)
    tl.store(out + row, tl.sum(x * x, 1), inside)


@triton.jit
def _factors_kernel(
    squares, second_moment, active, out, rate, cols, scale, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVE: tl.constexpr,
):  # fmt: skip
    """One matrix: v after this step, and what multiplies each row of the update."""
    row = tl.arange(0, BLOCK)
    inside = row < ROWS
    at = tl.program_id(0).to(tl.int64) * ROWS + row
    moves = 1.0
    if ACTIVE:
        moves = tl.load(active + tl.program_id(0))
    total = tl.load(squares + at, inside, other=0.0)
    v = tl.load(second_moment + at, inside, other=1.0)
    v += rate * moves * (total / cols - v)
    tl.store(second_moment + at, v, inside)
    inverse = 1.0 / tl.sqrt(v + eps)
    norm = tl.sqrt(tl.sum(total, 0))
    new_norm = tl.sqrt(tl.sum(total * inverse * inverse, 0))
    factor = inverse * (moves * scale * norm / tl.maximum(new_norm, eps))
    tl.store(out + at, factor, inside)


@triton.jit
def _quintic_kernel(
    gram, square, scale, out, numel, a, b, c,
    SIZE: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(gram + at, inside, other=0.0).to(tl.float32)
    p = b * g + c * tl.load(square + at, inside, other=0.0)
    p += tl.where(at // SIZE % SIZE == at % SIZE, a, 0.0)
    if SCALE:
        p *= tl.load(scale + at // (SIZE * SIZE), inside, other=0.0)
    tl.store(out + at, p.to(out.dtype.element_ty), inside)


def _grid(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), BLOCK),)


def look_ahead(
    gradient: Float[Tensor, "stack rows cols"],
    momentum: Float[Tensor, "stack rows cols"],
    active: Float[Tensor, "stack 1 1"] | None,
    *,
    decay: float,
    scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "stack rows cols"]:
    """Nesterov's direction, of scale times the gradient, in `dtype`; the momentum moves in place.

    Momenta of slices that are not active stay as they are.

    References:
        own; the first lines of `optim.normuon.normuon_update` are the reference.
    """
    out = torch.empty_like(gradient, dtype=dtype)
    _momentum_kernel[_grid(gradient)](
        gradient, momentum, active, out, gradient.numel(), decay, scale,
        PER_SLICE=gradient[0].numel(), ACTIVE=active is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out


def move_(
    value: Float[Tensor, "stack rows cols"],
    param: Float[Tensor, "stack rows cols"] | None,
    direction: Float[Tensor, "stack rows cols"],
    factor: Float[Tensor, "stack kept_rows kept_cols"],
    active: Float[Tensor, "stack 1 1"] | None,
    *,
    lr: float,
    decay: float,
) -> None:
    """Value after one update, in place, with its rounded copy in `param` where there is one.

    References:
        own; the last lines of `optim.normuon.MatrixBucket.step` are the reference.
    """
    _move_kernel[_grid(value)](
        value, param, direction, factor, active,
        value.numel(), lr, decay, COLS=value.shape[2], PER_SLICE=value[0].numel(),
        BY_ROW=factor.shape[2] == 1, ACTIVE=active is not None, COPY=param is not None,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def adamw_(
    value: Float[Tensor, "*shape"],
    param: Float[Tensor, "*shape"] | None,
    gradient: Float[Tensor, "*shape"],
    moments: tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]],
    active: Bool[Tensor, "*shape"] | None = None,
    *,
    betas_and_eps: tuple[float, float, float],
    lr_and_decay: tuple[float, float],
    step: int,
    gradient_scale: float = 1.0,
) -> None:
    """Value and both moments after one step of AdamW, in place, and the rounded copy in `param`.

    Where `active` is false, nothing changes.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019),
        arXiv:1711.05101; `optim.adamw.adamw_update` is the reference.
    """
    beta1, beta2, eps = betas_and_eps
    lr, decay = lr_and_decay
    _adamw_kernel[_grid(value)](
        value, param, gradient, *moments, None if active is None else active.view(torch.uint8),
        value.numel(), gradient_scale, beta1, beta2, eps,
        1 - lr * decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5,
        ACTIVE=active is not None, COPY=param is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def row_squares(
    matrices: Float[Tensor, "stack rows cols"],
) -> Float[Tensor, "stack rows 1"]:
    """Sum of squares of each row, float32; columns must be a power of two.

    References:
        own.
    """
    stack, rows, cols = matrices.shape
    out = torch.empty(stack, rows, 1, dtype=torch.float32, device=matrices.device)
    block = max(1, 4096 // cols)
    _row_squares_kernel[(triton.cdiv(stack * rows, block),)](
        matrices, out, stack * rows, COLS=cols, ROWS=block
    )
    return out


def row_factors_(
    squares: Float[Tensor, "stack rows 1"],
    second_moment: Float[Tensor, "stack rows 1"],
    active: Float[Tensor, "stack 1 1"] | None,
    *,
    cols: int,
    rate: float,
    scale: float,
    eps: float,
) -> Float[Tensor, "stack rows 1"]:
    """What multiplies each row of the orthogonalised update; v moves in place.

    Args:
        squares: Sum of squares of each row of the update.
        second_moment: v.
        active: 0 for slices whose v stays and whose factor is 0.
        cols: Numbers in a row.
        rate: 1 - beta2.
        scale: Multiplies all factors.
        eps: Added to v, and the smallest norm divided by.

    References:
        own; `optim.normuon.normuon_update` is the reference.
    """
    stack, rows, _ = squares.shape
    out = torch.empty_like(squares)
    _factors_kernel[(stack,)](
        squares, second_moment, active, out, rate, cols, scale, eps,
        ROWS=rows, BLOCK=triton.next_power_of_2(rows), ACTIVE=active is not None,
    )  # fmt: skip
    return out


def quintic(
    gram: Float[Tensor, "stack size size"],
    square: Float[Tensor, "stack size size"],
    scale: Float[Tensor, "stack 1 1"] | None,
    *,
    polynomial: tuple[float, float, float],
) -> Float[Tensor, "stack size size"]:
    """scale (a I + b G + c G^2) in G's dtype, rounded once, given G^2 in float32.

    References:
        own; `optim.polar_express` holds the reference.
    """
    out = torch.empty_like(gram)
    _quintic_kernel[_grid(gram)](
        gram, square, scale, out, gram.numel(), *polynomial,
        SIZE=gram.shape[1], SCALE=scale is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out
