"""Attention of one new token per conversation on one GPU: its heads, its key, what it gathers."""

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from vpmoe.kernels.decode import ROWS
from vpmoe.kernels.overlap import fetch_early, follow, overlap

BLOCK = 128  # keys that a program looks at together at most
TILE = 1 << 14  # numbers in the heads of those keys at most, so that all blocks under way fit
WIDE = 64  # query heads from which on half of that: their products take a buffer more
STAGES = 4  # blocks under way
EARLY = 128  # slots of a ring that are asked for while the projection still runs


@triton.jit
def _given(pointer, at, mask, GIVEN: tl.constexpr):
    """Some entries of a tensor, zeros where there is none."""
    if GIVEN:
        found = tl.load(pointer + at, mask, other=0.0).to(tl.float32)
    else:
        found = tl.zeros(mask.shape, tl.float32)
    return found


@triton.jit
def _halves(row, mixture, vectors, head, lane, real, RANK: tl.constexpr, H: tl.constexpr):
    """Both halves of some heads: products of factors where there is a rank, else plain columns."""
    HALF: tl.constexpr = H // 2
    if RANK > 0:
        first = tl.zeros((head.shape[0], HALF), tl.float32)
        second = tl.zeros((head.shape[0], HALF), tl.float32)
        for r in tl.static_range(RANK):
            at = row + vectors + r * H + lane
            weight = tl.load(row + mixture + head * RANK + r, real, other=0.0).to(tl.float32)
            first += weight[:, None] * tl.load(at).to(tl.float32)[None, :]
            second += weight[:, None] * tl.load(at + HALF).to(tl.float32)[None, :]
        first /= RANK
        second /= RANK
    else:
        at = row + vectors + head[:, None] * H + lane[None, :]
        first = tl.load(at, real[:, None], other=0.0).to(tl.float32)
        second = tl.load(at + HALF, real[:, None], other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _parameters(
    bias, gamma, at, mask, lane, HALF: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Bias and gain of some heads, as halves."""
    b1, b2 = _given(bias, at, mask, BIAS), _given(bias, at + HALF, mask, BIAS)
    g1, g2 = _given(gamma, lane, lane >= 0, NORM), _given(gamma, lane + HALF, lane >= 0, NORM)
    return b1, b2, g1[None, :], g2[None, :]


@triton.jit
def _prepare(
    first, second, b1, b2, g1, g2, c, s, eps,
    H: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Bias, normalisation and rotation of heads given as halves, in that order, to bf16."""
    first += b1
    second += b2
    if NORM:
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / H
        scale = (1.0 / tl.sqrt(mean + eps))[:, None]
        first, second = first * scale * g1, second * scale * g2
    if ROTATE:
        first, second = first * c - second * s, second * c + first * s
    return first.to(tl.bfloat16), second.to(tl.bfloat16)


@triton.jit
def _mixed(
    v1, v2, share, kept, at, mask, HALF: tl.constexpr, MIX: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """Values mixed with the first layer's, which are kept if this is it; to bf16."""
    first1, first2 = v1.to(tl.bfloat16).to(tl.float32), v2.to(tl.bfloat16).to(tl.float32)
    if KEEP:
        tl.store(kept + at, first1.to(tl.bfloat16), mask)
        tl.store(kept + at + HALF, first2.to(tl.bfloat16), mask)
    elif MIX:
        first1 = _given(kept, at, mask, True)
        first2 = _given(kept, at + HALF, mask, True)
    if MIX:
        v1 = share * v1 + (1.0 - share) * first1
        v2 = share * v2 + (1.0 - share) * first2
    return v1.to(tl.bfloat16), v2.to(tl.bfloat16)


@triton.jit
def _fetch_ring(
    keys, values, held,
    KV: tl.constexpr, H: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Have the beginning of a ring brought to the L2, in lines of 128 bytes."""
    slot = tl.minimum(tl.arange(0, EARLY), tl.maximum(held - 1, 0))
    at = slot[:, None] * (KV * H) + (tl.arange(0, (H + 63) // 64) * 64)[None, :]
    fetch_early(keys + at, PDL)
    fetch_early(values + at, PDL)


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
def _sunk(peak, total, out1, out2, sink):
    """The sums once the sink has competed."""
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
    G: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per conversation and key head: its heads, its new key, and what it sees."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    HALF: tl.constexpr = H // 2
    K: tl.constexpr = (RQ if RQ > 0 else N) * H  # where the vectors of keys begin
    V: tl.constexpr = K + (R if RQ > 0 else KV) * H
    MIXED: tl.constexpr = V + R * H  # where the mixtures begin
    MIXED_K: tl.constexpr = MIXED + N * RQ
    lane, group = tl.arange(0, HALF), tl.arange(0, G)
    real, whole = group < N // KV, lane >= 0
    head, own = h * (N // KV) + group, h + tl.arange(0, 1)
    always = own >= 0
    at, at_own = head[:, None] * H + lane[None, :], own[:, None] * H + lane[None, :]
    all_real, all_own = real[:, None] & whole[None, :], always[:, None] & whole[None, :]
    # All that the kernel before does not write is read while it still runs.
    place = tl.load(places + b).to(tl.int32)
    keys, values = keys + b * SIZE * KV * H, values + b * SIZE * KV * H
    if EARLY > 0:
        _fetch_ring(keys + h * H, values + h * H, tl.minimum(place, SIZE), KV, H, EARLY, PDL)
    qb1, qb2, qg1, qg2 = _parameters(q_bias, q_gamma, at, all_real, lane, HALF, BIAS, NORM)
    kb1, kb2, kg1, kg2 = _parameters(k_bias, k_gamma, at_own, all_own, lane, HALF, BIAS, NORM)
    vb1, vb2 = _given(v_bias, at_own, all_own, BIAS), _given(v_bias, at_own + HALF, all_own, BIAS)
    c = _given(cosines, b * HALF + lane, whole, ROTATE)[None, :]
    s = _given(sines, b * HALF + lane, whole, ROTATE)[None, :]
    share = _given(value_lambda, own * 0, always, MIX)[:, None]
    slope, sink = _given(slopes, head, real, SLOPES), _given(sinks, head, real, SINKS)
    follow(PDL)
    row = proj + b * WIDTH
    q1, q2 = _halves(row, MIXED, 0, head, lane, real, RQ, H)
    k1, k2 = _halves(row, MIXED_K, K, own, lane, always, R, H)
    v1, v2 = _halves(row, MIXED_K + KV * R, V, own, lane, always, R, H)
    kept = first_values + b * KV * H
    v1, v2 = _mixed(v1 + vb1, v2 + vb2, share, kept, at_own, all_own, HALF, MIX, KEEP)
    q1, q2 = _prepare(q1, q2, qb1, qb2, qg1, qg2, c, s, eps, H, NORM, ROTATE)
    k1, k2 = _prepare(k1, k2, kb1, kb2, kg1, kg2, c, s, eps, H, NORM, ROTATE)
    fresh = place % SIZE * (KV * H) + at_own
    _put(keys + fresh, k1, k2, always, HALF)
    _put(values + fresh, v1, v2, always, HALF)
    peak, total, out1, out2 = _gather(
        q1, q2, k1, k2, v1, v2, keys + h * H, values + h * H, place, slope, lane,
        KV, H, SIZE, WINDOW, BLOCK,
    )  # fmt: skip
    if SINKS:
        total, out1, out2 = _sunk(peak, total, out1, out2, sink)
    _put(out + b * N * H + at, out1 / total[:, None], out2 / total[:, None], real, HALF)


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
        G=group, BLOCK=min(BLOCK, (TILE if group < WIDE else TILE // 2) // dim), EARLY=EARLY,
        num_warps=4, num_stages=STAGES, **overlap(),
    )  # fmt: skip
