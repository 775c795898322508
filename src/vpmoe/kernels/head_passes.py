"""The passes of `kernels.heads` over a layer's projections, forward and backward.

A program holds some tokens and goes through their heads one by one. Roles are the tuples of
`kernels.heads.Role`; a vector is handled as its two halves, whose numbers a rotation pairs.
"""

import triton
import triton.language as tl
from torch import Tensor

from vpmoe.kernels.heads import HeadShape
from vpmoe.kernels.sums import sum_parts

TOKENS, WARPS = 8, 4  # of a program
# A warp of its own needs no barriers; tokens of further programs follow in the same ones.
BACKWARD_TOKENS, BACKWARD_WARPS, BACKWARD_PROGRAMS = 4, 1, 65536


@triton.jit
def _halves(at, inside, HALF: tl.constexpr):
    """Both halves of a vector per token, float32."""
    c = tl.arange(0, HALF)
    first = tl.load(at[:, None] + c[None, :], inside[:, None], other=0.0).to(tl.float32)
    second = tl.load(at[:, None] + HALF + c[None, :], inside[:, None], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(at, inside, x1, x2, HALF: tl.constexpr):
    c = tl.arange(0, HALF)
    tl.store(at[:, None] + c[None, :], x1.to(at.dtype.element_ty), inside[:, None])
    tl.store(at[:, None] + HALF + c[None, :], x2.to(at.dtype.element_ty), inside[:, None])


@triton.jit
def _pair(at, HALF: tl.constexpr):
    """Both halves of one vector, as rows."""
    c = tl.arange(0, HALF)
    first = tl.load(at + c).to(tl.float32)[None, :]
    return first, tl.load(at + HALF + c).to(tl.float32)[None, :]


@triton.jit
def _mixture(row, inside, small, h, r, ROLE: tl.constexpr):
    """How much of vector r is in head h, over the rank."""
    at = h * ROLE[1] + r
    a = tl.load(row + ROLE[3] + at, inside, other=0.0).to(tl.float32)
    return (a + tl.load(small + ROLE[5] + at).to(tl.float32)) / ROLE[1]


@triton.jit
def _head(row, inside, small, h, ROLE: tl.constexpr, HALF: tl.constexpr):
    """Head h before its norm, bias added."""
    RANK: tl.constexpr = ROLE[1]
    if RANK == 0:
        x1, x2 = _halves(row + ROLE[2] + h * 2 * HALF, inside, HALF)
    else:
        x1 = tl.zeros((row.shape[0], HALF), tl.float32)
        x2 = tl.zeros((row.shape[0], HALF), tl.float32)
        for r in tl.static_range(RANK):
            a = _mixture(row, inside, small, h, r, ROLE)[:, None]
            b1, b2 = _halves(row + ROLE[2] + r * 2 * HALF, inside, HALF)
            x1, x2 = x1 + a * b1, x2 + a * b2
    bias1, bias2 = _pair(small + ROLE[4] + h * 2 * HALF, HALF)
    return x1 + bias1, x2 + bias2


@triton.jit
def _turns(cosines, sines, token, inside, HALF: tl.constexpr):
    at = token[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos = tl.load(cosines + at, inside[:, None], other=0.0)
    return cos, tl.load(sines + at, inside[:, None], other=0.0)


@triton.jit
def _turned_heads(
    row, token, inside, small, cosines, sines, out, eps,
    ROLE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Queries or keys of the program's tokens."""
    gain1, gain2 = _pair(small + ROLE[6], HALF)
    if TURN:
        cos, sin = _turns(cosines, sines, token, inside, HALF)
    for h in range(ROLE[0]):
        x1, x2 = _head(row, inside, small, h, ROLE, HALF)
        if NORM:
            scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
            x1, x2 = x1 * scale * gain1, x2 * scale * gain2
        if TURN:
            x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
        _store_halves(out + (token * ROLE[0] + h) * 2 * HALF, inside, x1, x2, HALF)


@triton.jit
def _forward_kernel(
    rows, small, cosines, sines, first, mixing, q_out, k_out, v_out, num_tokens, eps,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, TURN: tl.constexpr, MIXED: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    row = rows + token * ROW
    _turned_heads(
        row, token, inside, small, cosines, sines, q_out, eps, Q, HALF, NORM, TURN
    )  # fmt: skip
    _turned_heads(
        row, token, inside, small, cosines, sines, k_out, eps, K, HALF, NORM, TURN
    )  # fmt: skip
    for h in range(V[0]):
        x1, x2 = _head(row, inside, small, h, V, HALF)
        at = (token * V[0] + h) * 2 * HALF
        if MIXED:
            own = tl.load(mixing)
            f1, f2 = _halves(first + at, inside, HALF)
            x1, x2 = own * x1 + (1 - own) * f1, own * x2 + (1 - own) * f2
        _store_halves(v_out + at, inside, x1, x2, HALF)


@triton.jit
def _zeros(COUNT: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """As many empty sums."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((TOKENS, HALF), tl.float32),)
    return sums


@triton.jit
def _add(at, value, started):
    """Onto what the program's earlier tokens left there."""
    tl.store(at, tl.load(at, started, other=0.0) + value)


@triton.jit
def _add_vector(at, value, started, HALF: tl.constexpr):
    c = tl.arange(0, HALF)
    tl.store(at + c, tl.load(at + c, (c >= 0) & started, other=0.0) + value)


@triton.jit
def _head_gradient(
    row, d_row, inside, small, sums, started, h, d1, d2, into1, into2,
    ROLE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """From the gradient of head h to its bias, its vectors and mixtures; returns the vectors'."""
    bias = sums + ROLE[4] + h * 2 * HALF
    _add_vector(bias, tl.sum(d1, 0), started, HALF)
    _add_vector(bias + HALF, tl.sum(d2, 0), started, HALF)
    RANK: tl.constexpr = ROLE[1]
    if RANK == 0:
        _store_halves(d_row + ROLE[2] + h * 2 * HALF, inside, d1, d2, HALF)
    new1, new2 = (), ()
    for r in tl.static_range(RANK):
        b1, b2 = _halves(row + ROLE[2] + r * 2 * HALF, inside, HALF)
        d_mixture = tl.sum(d1 * b1 + d2 * b2, 1) / ROLE[1]
        at = h * ROLE[1] + r
        tl.store(d_row + ROLE[3] + at, d_mixture.to(d_row.dtype.element_ty), inside)
        _add(sums + ROLE[5] + at, tl.sum(d_mixture, 0), started)
        a = _mixture(row, inside, small, h, r, ROLE)[:, None]
        new1 = new1 + (into1[r] + a * d1,)
        new2 = new2 + (into2[r] + a * d2,)
    return new1, new2


@triton.jit
def _store_vectors(d_row, inside, into1, into2, ROLE: tl.constexpr, HALF: tl.constexpr):
    RANK: tl.constexpr = ROLE[1]
    for r in tl.static_range(RANK):
        _store_halves(d_row + ROLE[2] + r * 2 * HALF, inside, into1[r], into2[r], HALF)


@triton.jit
def _turned_gradient(
    row, d_row, d_out, d_head, token, inside, small, cosines, sines, sums, started, eps, angle,
    ROLE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Back from queries or keys; returns the gradient of each token's angles, added to `angle`."""
    gain1, gain2 = _pair(small + ROLE[6], HALF)
    if TURN:
        cos, sin = _turns(cosines, sines, token, inside, HALF)
    g1, g2 = tl.zeros((TOKENS, HALF), tl.float32), tl.zeros((TOKENS, HALF), tl.float32)
    RANK: tl.constexpr = ROLE[1]
    into1, into2 = _zeros(RANK, TOKENS, HALF), _zeros(RANK, TOKENS, HALF)
    for h in range(ROLE[0]):
        d1, d2 = _halves(d_out + h * d_head, inside, HALF)
        if TURN:
            d1, d2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
        x1, x2 = _head(row, inside, small, h, ROLE, HALF)
        if NORM:
            scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
            x1, x2 = x1 * scale, x2 * scale
            g1, g2 = g1 + d1 * x1, g2 + d2 * x2
        if TURN:
            if NORM:
                angle += d2 * (x1 * gain1) - d1 * (x2 * gain2)
            else:
                angle += d2 * x1 - d1 * x2
        if NORM:
            d1, d2 = d1 * gain1, d2 * gain2
            mean = (tl.sum(d1 * x1 + d2 * x2, 1) / (2 * HALF))[:, None]
            d1, d2 = (d1 - x1 * mean) * scale, (d2 - x2 * mean) * scale
        into1, into2 = _head_gradient(
            row, d_row, inside, small, sums, started, h, d1, d2, into1, into2, ROLE, HALF
        )  # fmt: skip
    _store_vectors(d_row, inside, into1, into2, ROLE, HALF)
    _add_vector(sums + ROLE[6], tl.sum(g1, 0), started, HALF)
    _add_vector(sums + ROLE[6] + HALF, tl.sum(g2, 0), started, HALF)
    return angle


@triton.jit
def _value_gradient(
    row, d_row, d_out, d_head, token, inside, small, first, d_first, mixing, sums, started,
    ROLE: tl.constexpr, HALF: tl.constexpr, MIXED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Back from values; returns each token's part in the gradient of lambda."""
    RANK: tl.constexpr = ROLE[1]
    into1, into2 = _zeros(RANK, TOKENS, HALF), _zeros(RANK, TOKENS, HALF)
    d_mixing = tl.zeros((TOKENS, HALF), tl.float32)
    for h in range(ROLE[0]):
        d1, d2 = _halves(d_out + h * d_head, inside, HALF)
        if MIXED:
            own = tl.load(mixing)
            at = (token * ROLE[0] + h) * 2 * HALF
            x1, x2 = _head(row, inside, small, h, ROLE, HALF)
            f1, f2 = _halves(first + at, inside, HALF)
            d_mixing += d1 * (x1 - f1) + d2 * (x2 - f2)
            _store_halves(d_first + at, inside, d1 * (1 - own), d2 * (1 - own), HALF)
            d1, d2 = d1 * own, d2 * own
        into1, into2 = _head_gradient(
            row, d_row, inside, small, sums, started, h, d1, d2, into1, into2, ROLE, HALF
        )  # fmt: skip
    _store_vectors(d_row, inside, into1, into2, ROLE, HALF)
    return tl.sum(d_mixing, 1)


@triton.jit
def _rows_of(base, token, seq, strides):
    """Where the first head of each token begins in a [batch, seq, heads, dim] tensor."""
    return base + (token // seq) * strides[0] + (token % seq) * strides[1]


@triton.jit
def _backward_kernel(
    rows, small, cosines, sines, positions, first, mixing, dq, dk, dv, d_rows, d_first, sums,
    num_tokens, steps, seq, dq_strides, dk_strides, dv_strides, eps,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr, SUMS: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, TURN: tl.constexpr, MIXED: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of rows and first values, and the program's sums."""
    sums += tl.program_id(0).to(tl.int64) * SUMS
    USED: tl.constexpr = V[3] + V[0] * V[1]
    for step in range(steps):
        started = step > 0
        tile = tl.program_id(0).to(tl.int64) * steps + step
        token = tile * TOKENS + tl.arange(0, TOKENS)
        inside = token < num_tokens
        row, d_row = rows + token * ROW, d_rows + token * ROW
        angle = tl.zeros((TOKENS, HALF), tl.float32)
        angle = _turned_gradient(
            row, d_row, _rows_of(dq, token, seq, dq_strides), dq_strides[2], token, inside, small,
            cosines, sines, sums, started, eps, angle, Q, HALF, NORM, TURN, TOKENS,
        )  # fmt: skip
        angle = _turned_gradient(
            row, d_row, _rows_of(dk, token, seq, dk_strides), dk_strides[2], token, inside, small,
            cosines, sines, sums, started, eps, angle, K, HALF, NORM, TURN, TOKENS,
        )  # fmt: skip
        if TURN:
            place = tl.load(positions + token, inside, other=0).to(tl.float32)
            _add_vector(sums + V[6], tl.sum(angle * place[:, None], 0), started, HALF)
        d_mixing = _value_gradient(
            row, d_row, _rows_of(dv, token, seq, dv_strides), dv_strides[2], token, inside, small,
            first, d_first, mixing, sums, started, V, HALF, MIXED, TOKENS,
        )  # fmt: skip
        if MIXED:
            _add(sums + V[6] + HALF, tl.sum(d_mixing, 0), started)
        if ROW > USED:
            rest = USED + tl.arange(0, 64)[None, :]
            zeros = tl.zeros((TOKENS, 64), d_rows.dtype.element_ty)
            tl.store(d_row[:, None] + rest, zeros, inside[:, None] & (rest < ROW))
        tl.debug_barrier()  # the next tokens' threads read these sums


def forward(
    rows: Tensor,
    small: Tensor,
    tables: tuple[Tensor | None, Tensor | None],
    residual: tuple[Tensor | None, Tensor | None],
    shape: HeadShape,
    eps: float,
    outs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write queries, keys and values.

    References:
        own; see `kernels.heads.heads`.
    """
    tokens = rows.shape[0] * rows.shape[1]
    _forward_kernel[(triton.cdiv(tokens, TOKENS),)](
        rows, small, *tables, *residual, *outs, tokens, eps,
        *map(tuple, shape.roles), shape.row, shape.dim // 2, shape.has_norm,
        tables[0] is not None, residual[0] is not None, TOKENS, num_warps=WARPS,
    )  # fmt: skip


def backward(
    d_outs: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    small: Tensor,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    residual: tuple[Tensor | None, Tensor | None],
    shape: HeadShape,
    eps: float,
    outs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Write gradients of rows, small weights, frequencies and lambda, first values.

    References:
        own; see `kernels.heads.heads`.
    """
    d_rows, d_small, d_wide, d_first = outs
    tokens = rows.shape[0] * rows.shape[1]
    steps = triton.cdiv(tokens, BACKWARD_PROGRAMS * BACKWARD_TOKENS)
    programs = triton.cdiv(tokens, steps * BACKWARD_TOKENS)
    parts = d_wide.new_empty(programs, shape.small + d_wide.numel())
    d_outs = tuple(d if d.stride(-1) == 1 else d.contiguous() for d in d_outs)
    _backward_kernel[(programs,)](
        rows, small, *tables, *residual, *d_outs, d_rows, d_first, parts,
        tokens, steps, rows.shape[1], *(d.stride()[:3] for d in d_outs), eps,
        *map(tuple, shape.roles), shape.row, parts.shape[1], shape.dim // 2, shape.has_norm,
        tables[0] is not None, residual[0] is not None, BACKWARD_TOKENS, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    sum_parts(parts, d_small, d_wide)
