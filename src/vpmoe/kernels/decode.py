"""One token per conversation through a layer, on one GPU: few launches, static shapes, no host.

A step of decoding reads every weight it touches once and computes next to nothing: these kernels
are made for memory bandwidth and few launches. A layer is: normalise, joint projection, heads with
attention, output projection, normalise, router, experts. Nothing depends on the host, so that a
CUDA graph holds a whole step.
"""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from vpmoe.kernels.overlap import fetch_early, follow, overlap

ROWS = 16  # tokens of a tile: the least that the matrix units take
COLUMNS = 16  # of a program of `linear`
TALL = 64  # the most rows of one
DEPTH = 128  # of a tile of a product
STAGES = 6  # tiles under way


@triton.jit
def _norm_kernel(
    parts, stream, gamma, normed, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: the stream takes its parts in, and is normalised."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    gain = tl.load(gamma + d, inside, other=0.0).to(tl.float32)  # beside the kernel before
    follow(PDL)
    x = tl.load(stream + row * D + d, inside, other=0.0).to(tl.float32)
    for p in tl.static_range(PARTS):
        x += tl.load(parts + (row * PARTS + p) * D + d, inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        rounded = x.to(tl.bfloat16)
        tl.store(stream + row * D + d, rounded, inside)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(normed + row * D + d, (x * scale * gain).to(tl.bfloat16), inside)


@triton.jit
def _linear_kernel(
    x, weight, bias, residual, out, rows,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    LINES: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    kept, inside = n < N, m < rows
    line = tl.arange(0, LINES) * 64  # of 128 bytes
    fetch_early(weight + tl.minimum(n, N - 1)[:, None] * K + tl.minimum(line, K - 64)[None, :], PDL)
    acc = tl.zeros((BM, BN), tl.float32)
    if BIAS:
        acc += tl.load(bias + n, kept, other=0.0).to(tl.float32)[None, :]
    follow(PDL)
    at = m[:, None] * N + n[None, :]
    both = inside[:, None] & kept[None, :]
    if RESIDUAL:  # read before the products, which would otherwise end in a wait for memory
        acc += tl.load(residual + at, both, other=0.0).to(tl.float32)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * K + ks[None, :], inside[:, None], other=0.0)
        b = tl.load(weight + n[None, :] * K + ks[:, None], kept[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(out + at, acc.to(out.dtype.element_ty), both)


def normalise(
    stream: Float[Tensor, "rows dim"],
    gamma: Float[Tensor, " dim"],
    parts: Float[Tensor, "rows parts dim"] | None,
    out: Float[Tensor, "rows dim"],
    *,
    eps: float,
) -> None:
    """Add the parts to the stream, in place, and write its normed states.

    References:
        own; `models.norm.rms_norm` is the reference.
    """
    rows, dim = stream.shape
    _norm_kernel[(rows,)](
        parts, stream, gamma, out, eps,
        D=dim, BLOCK=triton.next_power_of_2(dim), PARTS=0 if parts is None else parts.shape[1],
        num_warps=8, **overlap(),
    )  # fmt: skip


def linear(
    x: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "columns dim"],
    bias: Float[Tensor, " columns"] | None,
    out: Float[Tensor, "rows columns"],
    *,
    residual: Float[Tensor, "rows columns"] | None = None,
) -> None:
    """out = x weight^T + bias + residual; `out` may be the residual.

    References:
        own.
    """
    (rows, dim), columns = x.shape, weight.shape[0]
    tall = max(ROWS, min(TALL, triton.next_power_of_2(rows)))
    _linear_kernel[(triton.cdiv(columns, COLUMNS), triton.cdiv(rows, tall))](
        x, weight, bias, residual, out, rows,
        N=columns, K=dim, BM=tall, BN=COLUMNS, BK=depth_of(dim, DEPTH),
        LINES=triton.next_power_of_2(dim // 64),
        BIAS=bias is not None, RESIDUAL=residual is not None,
        num_warps=4, num_stages=STAGES, **overlap(),
    )  # fmt: skip


def depth_of(dim: int, most: int) -> int:
    """Depth of a tile of a product over `dim`: a power of two that divides it.

    References:
        own.
    """
    return min(most, dim & -dim)
