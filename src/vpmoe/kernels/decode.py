"""One token per conversation through a layer, on one GPU: few launches, static shapes, no host.

A step of decoding reads every weight it touches once and computes next to nothing: these kernels
are made for memory bandwidth and few launches. A layer is: normalise, joint projection, heads with
attention, output projection, normalise, router, experts. Nothing depends on the host, so that a
CUDA graph holds a whole step.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from vpmoe.kernels.overlap import fetch_early, follow, overlap

ROWS = 16  # tokens of a tile: the least that the matrix units take
BLOCK = 128  # keys that a program looks at together
COLUMNS = 16  # of a program of `linear`
TALL = 64  # the most rows of one
DEPTH = 128  # of a tile of a product
STAGES = 4  # tiles under way


@triton.jit
def _norm_kernel(
    parts, stream, gamma, normed, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per row: the stream takes its parts in, and is normalised."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(stream + row * D + d, inside, other=0.0).to(tl.float32)
    for p in tl.static_range(PARTS):
        x += tl.load(parts + (row * PARTS + p) * D + d, inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        rounded = x.to(tl.bfloat16)
        tl.store(stream + row * D + d, rounded, inside)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    gain = tl.load(gamma + d, inside, other=0.0).to(tl.float32)
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
    follow(PDL)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * K + ks[None, :], inside[:, None], other=0.0)
        b = tl.load(weight + n[None, :] * K + ks[:, None], kept[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
    if BIAS:
        acc += tl.load(bias + n, kept, other=0.0).to(tl.float32)[None, :]
    at = m[:, None] * N + n[None, :]
    both = inside[:, None] & kept[None, :]
    if RESIDUAL:
        acc += tl.load(residual + at, both, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), both)


@triton.jit
def _half(row, mixture, vectors, head, lane, real, RANK: tl.constexpr, H: tl.constexpr):
    """Half of some heads: a product of factors where there is a rank, plain columns otherwise."""
    if RANK > 0:
        found = tl.zeros((head.shape[0], lane.shape[0]), tl.float32)
        for r in tl.static_range(RANK):
            weight = tl.load(row + mixture + head * RANK + r, real, other=0.0).to(tl.float32)
            found += weight[:, None] * tl.load(row + vectors + r * H + lane).to(tl.float32)[None, :]
        found /= RANK
    else:
        at = row + vectors + head[:, None] * H + lane[None, :]
        found = tl.load(at, real[:, None], other=0.0).to(tl.float32)
    return found


@triton.jit
def _prepare(
    first, second, bias, gamma, head, lane, real, cosines, sines, eps,
    H: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Bias, normalisation and rotation of heads given as halves, in that order."""
    if BIAS:
        at = bias + head[:, None] * H + lane[None, :]
        first += tl.load(at, real[:, None], other=0.0).to(tl.float32)
        second += tl.load(at + H // 2, real[:, None], other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / H
        scale = (1.0 / tl.sqrt(mean + eps))[:, None]
        first = first * scale * tl.load(gamma + lane).to(tl.float32)[None, :]
        second = second * scale * tl.load(gamma + H // 2 + lane).to(tl.float32)[None, :]
    if ROTATE:
        c, s = tl.load(cosines + lane)[None, :], tl.load(sines + lane)[None, :]
        first, second = first * c - second * s, second * c + first * s
    return first, second


@triton.jit
def _gather(
    q1, q2, k1, k2, v1, v2, keys, values, place, slope, lane,
    KV: tl.constexpr, H: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Running softmax over a ring, opened by the new token itself: peak, total and sums."""
    HALF: tl.constexpr = H // 2
    scale: tl.constexpr = H**-0.5
    peak = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
    peak = (peak + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)) * scale
    total = tl.full((q1.shape[0],), 1.0, tl.float32)
    out1 = tl.zeros((q1.shape[0], HALF), tl.float32) + v1.to(tl.float32)
    out2 = tl.zeros((q1.shape[0], HALF), tl.float32) + v2.to(tl.float32)
    held = tl.minimum(place, SIZE)
    for begin in range(0, held, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        distance = (place - 1 - slot + SIZE) % SIZE + 1
        seen = slot < held
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        at = slot * (KV * H)
        keys1 = tl.load(keys + at[None, :] + lane[:, None], seen[None, :], other=0.0)
        keys2 = tl.load(keys + at[None, :] + HALF + lane[:, None], seen[None, :], other=0.0)
        score = tl.dot(q2, keys2, tl.dot(q1, keys1)) * scale
        score -= slope[:, None] * distance[None, :].to(tl.float32)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        weight = weight.to(tl.bfloat16)
        values1 = tl.load(values + at[:, None] + lane[None, :], seen[:, None], other=0.0)
        values2 = tl.load(values + at[:, None] + HALF + lane[None, :], seen[:, None], other=0.0)
        out1 = tl.dot(weight, values1, out1 * shrink[:, None])
        out2 = tl.dot(weight, values2, out2 * shrink[:, None])
        peak = higher
    return peak, total, out1, out2


@triton.jit
def _sunk(peak, total, out1, out2, sinks, head, real):
    """The sums once the sink has competed."""
    sink = tl.load(sinks + head, real, other=0.0).to(tl.float32)
    higher = tl.maximum(peak, sink)
    shrink = tl.exp(peak - higher)
    total = total * shrink + tl.exp(sink - higher)
    return total, out1 * shrink[:, None], out2 * shrink[:, None]


@triton.jit
def _put(at, first, second, real, HALF: tl.constexpr):
    """Heads given as halves, to memory."""
    tl.store(at, first.to(tl.bfloat16), real[:, None])
    tl.store(at + HALF, second.to(tl.bfloat16), real[:, None])


@triton.jit
def _attend_kernel(
    proj, q_bias, k_bias, v_bias, q_gamma, k_gamma, cosines, sines, value_lambda, first_values,
    sinks, slopes, places, keys, values, out, eps,
    WIDTH: tl.constexpr, N: tl.constexpr, KV: tl.constexpr, H: tl.constexpr,
    RQ: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr, MIX: tl.constexpr,
    KEEP: tl.constexpr, SINKS: tl.constexpr, SLOPES: tl.constexpr,
    G: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per conversation and key head: its heads, its new key, and what it sees."""
    follow(PDL)
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    HALF: tl.constexpr = H // 2
    K: tl.constexpr = (RQ if RQ > 0 else N) * H  # where the vectors of keys begin
    V: tl.constexpr = K + (R if RQ > 0 else KV) * H
    MIXED: tl.constexpr = V + R * H  # where the mixtures begin
    MIXED_V: tl.constexpr = MIXED + N * RQ + KV * R
    row = proj + b * WIDTH
    lane = tl.arange(0, HALF)
    group = tl.arange(0, G)
    real = group < N // KV
    head = h * (N // KV) + group
    own = h + tl.arange(0, 1)
    always = own >= 0
    q1 = _half(row, MIXED, 0, head, lane, real, RQ, H)
    q2 = _half(row, MIXED, HALF, head, lane, real, RQ, H)
    k1 = _half(row, MIXED + N * RQ, K, own, lane, always, R, H)
    k2 = _half(row, MIXED + N * RQ, K + HALF, own, lane, always, R, H)
    v1 = _half(row, MIXED_V, V, own, lane, always, R, H)
    v2 = _half(row, MIXED_V, V + HALF, own, lane, always, R, H)
    c, s = cosines + b * HALF, sines + b * HALF
    q1, q2 = _prepare(q1, q2, q_bias, q_gamma, head, lane, real, c, s, eps, H, BIAS, NORM, ROTATE)
    k1, k2 = _prepare(k1, k2, k_bias, k_gamma, own, lane, always, c, s, eps, H, BIAS, NORM, ROTATE)
    v1, v2 = _prepare(v1, v2, v_bias, k_gamma, own, lane, always, c, s, eps, H, BIAS, False, False)
    first = first_values + (b * KV + own)[:, None] * H + lane[None, :]
    if KEEP:
        _put(first, v1, v2, always, HALF)
    if MIX:
        share = tl.load(value_lambda).to(tl.float32)
        v1 = share * v1 + (1.0 - share) * tl.load(first).to(tl.float32)
        v2 = share * v2 + (1.0 - share) * tl.load(first + HALF).to(tl.float32)
    q1, q2, k1, k2 = q1.to(tl.bfloat16), q2.to(tl.bfloat16), k1.to(tl.bfloat16), k2.to(tl.bfloat16)
    v1, v2 = v1.to(tl.bfloat16), v2.to(tl.bfloat16)
    place = tl.load(places + b).to(tl.int32)
    fresh = ((b * SIZE + place % SIZE) * KV + own)[:, None] * H + lane[None, :]
    _put(keys + fresh, k1, k2, always, HALF)
    _put(values + fresh, v1, v2, always, HALF)
    slope = tl.zeros((G,), tl.float32)
    if SLOPES:
        slope = tl.load(slopes + head, real, other=0.0)
    ring = (b * SIZE * KV + h) * H
    peak, total, out1, out2 = _gather(
        q1, q2, k1, k2, v1, v2, keys + ring, values + ring, place, slope, lane,
        KV, H, SIZE, WINDOW, BLOCK,
    )  # fmt: skip
    if SINKS:
        total, out1, out2 = _sunk(peak, total, out1, out2, sinks, head, real)
    at = out + (b * N + head)[:, None] * H + lane[None, :]
    _put(at, out1 / total[:, None], out2 / total[:, None], real, HALF)


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
        num_warps=4, **overlap(),
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


class Heads(NamedTuple):
    """What a layer's attention does between its two projections.

    Attributes:
        num_heads: Query heads.
        q_rank: Rank of the queries' factors; 0 for plain columns.
        rank: Of keys and values.
        window_size: Keys a query sees, itself included; None for all.
        biases: Of queries, keys and values, where they are added to products of factors.
        gammas: Of QK-norm for queries and keys, or None.
        rotation: Cosines and sines [rows, half], or None.
        value_lambda: How values mix with the first layer's, or None.
        sinks: Logit of each head's sink, or None.
        slopes: Penalty per token of distance, or None.
        eps: Of QK-norm.
    """

    num_heads: int
    q_rank: int
    rank: int
    window_size: int | None
    biases: tuple[Tensor, Tensor, Tensor] | None
    gammas: tuple[Tensor, Tensor] | None
    rotation: tuple[Tensor, Tensor] | None
    value_lambda: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None
    eps: float


def attend_cached(
    projected: Float[Tensor, "rows columns"],
    heads: Heads,
    places: Int[Tensor, " rows"],
    keys: Float[Tensor, "rows slots kv_heads head_dim"],
    values: Float[Tensor, "rows slots kv_heads head_dim"],
    first_values: Float[Tensor, "rows kv_heads head_dim"],
    out: Float[Tensor, "rows width"],
    *,
    keep_values: bool,
) -> None:
    """Heads of one new token per conversation, written to its ring, and what they gather from it.

    Args:
        projected: [vectors or plain columns of q, k, v | mixtures of q, k, v], biases added.
        heads: What to do with it.
        places: Place of the new token in its conversation.
        keys: Ring of the layer; the new key goes to slot `place mod slots`.
        values: The same for values.
        first_values: The first layer's values before mixing.
        out: What the heads gather.
        keep_values: Write this layer's own values to `first_values`.

    References:
        own; `models.attention.sink.attend_reference` and the modules before it are the reference.
        Dao et al., "FlashAttention" (2022), arXiv:2205.14135, for the running softmax.
    """
    rows, size, kv_heads, dim = keys.shape
    biases = heads.biases or (None, None, None)
    gammas = heads.gammas or (None, None)
    cosines, sines = heads.rotation or (None, None)
    group = max(ROWS, triton.next_power_of_2(heads.num_heads // kv_heads))
    _attend_kernel[(rows, kv_heads)](
        projected, *biases, *gammas, cosines if cosines is not None else projected,
        sines if sines is not None else projected, heads.value_lambda, first_values,
        heads.sinks, heads.slopes, places, keys, values, out, heads.eps,
        WIDTH=projected.shape[1], N=heads.num_heads, KV=kv_heads, H=dim,
        RQ=heads.q_rank, R=heads.rank, SIZE=size, WINDOW=heads.window_size or 0,
        BIAS=heads.biases is not None, NORM=heads.gammas is not None,
        ROTATE=heads.rotation is not None, MIX=heads.value_lambda is not None, KEEP=keep_values,
        SINKS=heads.sinks is not None, SLOPES=heads.slopes is not None,
        G=group, BLOCK=BLOCK, num_warps=4, num_stages=2, **overlap(),
    )  # fmt: skip
