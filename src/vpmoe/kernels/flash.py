"""Tiles of attention over packed rows: two products and a softmax that never leaves the chip.

What a query sees is one range of keys, from `first[query]` to itself: a document's start or a
window's, whichever is later. A tile of queries therefore visits a range of blocks that two numbers
give, with no table; a tile of keys visits the queries up to `last[key]`. A tile stacks several
heads of one key head, so that a block of keys is loaded once for all of them. The sink is the
softmax's first term: the log-sum-exp contains it, and the backward pass needs no other trace of it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """How one kernel cuts its work.

    Attributes:
        heads: Query heads of one key head that share a tile.
        queries: Queries of a tile, for each of them.
        keys: Keys of a block.
        warps: Warps of a program.
        stages: Blocks in flight.
    """

    heads: int
    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _scores(
    products, query, key, begin, slope, scale,
    ALIBI: tl.constexpr,
):  # fmt: skip
    """Logits in units of log 2 of a tile; -inf where a query does not see a key.

    `query`, `begin` and `slope` broadcast against `key` into the tile's shape, either way round.
    """
    scores = products * (scale * LOG2_E)
    if ALIBI:
        scores -= (slope * LOG2_E) * (query - key).to(tl.float32)
    return tl.where((key <= query) & (key >= begin), scores, float("-inf"))


@triton.jit
def _forward_kernel(
    q, k, v, sinks, slopes, first, out, lse,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, seq, scale,
    N: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SINK: tl.constexpr,
    ALIBI: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % (N // HEADS)
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // (N // HEADS)  # long ranges first
    row = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, HEADS * QUERIES)
    head = tile * HEADS + member // QUERIES
    query = block * QUERIES + member % QUERIES
    d = tl.arange(0, D)
    inside = query < seq
    at = row * q_row + query.to(tl.int64) * q_token + head * q_head
    a = tl.load(q + at[:, None] + d[None, :], inside[:, None], other=0.0)
    begin = tl.load(first + row * seq + query, inside, other=0)
    slope = tl.load(slopes + head) if ALIBI else 0.0 * head
    if SINK:
        top = tl.load(sinks + head) * LOG2_E
        total = tl.full((HEADS * QUERIES,), 1.0, tl.float32)
    else:
        top = tl.full((HEADS * QUERIES,), -1e30, tl.float32)
        total = tl.zeros((HEADS * QUERIES,), tl.float32)
    acc = tl.zeros((HEADS * QUERIES, D), tl.float32)
    ks = k + row * k_row + (tile * HEADS // GROUP) * k_head
    vs = v + row * v_row + (tile * HEADS // GROUP) * v_head
    start = tl.load(first + row * seq + block * QUERIES) // KEYS * KEYS
    stop = tl.minimum(block * QUERIES + QUERIES, seq)
    for place in tl.range(start, stop, KEYS):
        key = place + tl.arange(0, KEYS)
        there = (key < seq)[:, None]
        b = tl.load(ks + key.to(tl.int64)[:, None] * k_token + d[None, :], there, other=0.0)
        products = tl.dot(a, tl.trans(b))
        scores = _scores(
            products, query[:, None], key[None, :], begin[:, None], slope[:, None], scale, ALIBI
        )
        new = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        c = tl.load(vs + key.to(tl.int64)[:, None] * v_token + d[None, :], there, other=0.0)
        acc = tl.dot(p.to(c.dtype), c, acc)
        top = new
    acc = acc / total[:, None]
    at = (row * seq + query) * (N * D) + head * D
    tl.store(out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), inside[:, None])
    tl.store(lse + (row * N + head) * seq + query, top + tl.log2(total), inside)


@triton.jit
def _backward_queries_kernel(
    q, k, v, sinks, slopes, first, out, d_out, lse, delta, dq, d_sinks,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, seq, scale,
    N: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SINK: tl.constexpr,
    ALIBI: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of queries; on the way each query's <dO, O> and each tile's part of the sinks'."""
    tile = tl.program_id(0) % (N // HEADS)
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // (N // HEADS)
    row = tl.program_id(1).to(tl.int64)
    member = tl.arange(0, HEADS * QUERIES)
    head = tile * HEADS + member // QUERIES
    query = block * QUERIES + member % QUERIES
    d = tl.arange(0, D)
    inside = query < seq
    here = (row * seq + query) * (N * D) + head * D
    do = tl.load(d_out + here[:, None] + d[None, :], inside[:, None], other=0.0)
    o = tl.load(out + here[:, None] + d[None, :], inside[:, None], other=0.0)
    mean = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    of_head = (row * N + head) * seq + query
    tl.store(delta + of_head, mean, inside)
    log_total = tl.load(lse + of_head, inside, other=0.0)
    if SINK:
        share = tl.exp2(tl.load(sinks + head) * LOG2_E - log_total) * mean
        share = tl.where(inside, -share, 0.0)
        part = tl.sum(tl.reshape(share, (HEADS, QUERIES)), 1)
        blocks = tl.num_programs(0) // (N // HEADS)
        at = (row * blocks + block) * N + tile * HEADS + tl.arange(0, HEADS)
        tl.store(d_sinks + at, part)
    at = row * q_row + query.to(tl.int64) * q_token + head * q_head
    a = tl.load(q + at[:, None] + d[None, :], inside[:, None], other=0.0)
    begin = tl.load(first + row * seq + query, inside, other=0)
    slope = tl.load(slopes + head) if ALIBI else 0.0 * head
    acc = tl.zeros((HEADS * QUERIES, D), tl.float32)
    ks = k + row * k_row + (tile * HEADS // GROUP) * k_head
    vs = v + row * v_row + (tile * HEADS // GROUP) * v_head
    start = tl.load(first + row * seq + block * QUERIES) // KEYS * KEYS
    stop = tl.minimum(block * QUERIES + QUERIES, seq)
    for place in tl.range(start, stop, KEYS):
        key = place + tl.arange(0, KEYS)
        there = (key < seq)[:, None]
        b = tl.load(ks + key.to(tl.int64)[:, None] * k_token + d[None, :], there, other=0.0)
        c = tl.load(vs + key.to(tl.int64)[:, None] * v_token + d[None, :], there, other=0.0)
        products = tl.dot(a, tl.trans(b))
        scores = _scores(
            products, query[:, None], key[None, :], begin[:, None], slope[:, None], scale, ALIBI
        )
        p = tl.exp2(scores - log_total[:, None])
        dp = tl.dot(do, tl.trans(c))
        ds = p * (dp - mean[:, None])
        acc = tl.dot(ds.to(b.dtype), b, acc)
    at = (row * seq + query) * (N * D) + head * D
    tl.store(dq + at[:, None] + d[None, :], (acc * scale).to(dq.dtype.element_ty), inside[:, None])


@triton.jit
def _backward_keys_kernel(
    q, k, v, slopes, first, last, d_out, lse, delta, dk, dv,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, seq, scale,
    N: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ALIBI: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; the heads of a key head are added up in one program."""
    kv_heads: tl.constexpr = N // GROUP
    kv_head = tl.program_id(0) % kv_heads
    place = tl.program_id(0) // kv_heads * KEYS
    row = tl.program_id(1).to(tl.int64)
    key = place + tl.arange(0, KEYS)
    d = tl.arange(0, D)
    there = key < seq
    at = row * k_row + key.to(tl.int64) * k_token + kv_head * k_head
    b = tl.load(k + at[:, None] + d[None, :], there[:, None], other=0.0)
    at = row * v_row + key.to(tl.int64) * v_token + kv_head * v_head
    c = tl.load(v + at[:, None] + d[None, :], there[:, None], other=0.0)
    acc_k = tl.zeros((KEYS, D), tl.float32)
    acc_v = tl.zeros((KEYS, D), tl.float32)
    member = tl.arange(0, HEADS * QUERIES)
    start = place // QUERIES * QUERIES
    stop = tl.load(last + row * seq + tl.minimum(place + KEYS, seq) - 1) + 1
    span = (stop - start + QUERIES - 1) // QUERIES  # blocks of queries, for each set of heads
    for step in tl.range(0, span * (GROUP // HEADS)):
        head = kv_head * GROUP + member // QUERIES
        query = start + member % QUERIES
        if GROUP == HEADS:
            query += step * QUERIES
        else:
            head += step // span * HEADS
            query += step % span * QUERIES
        inside = query < seq
        of_q = row * q_row + query.to(tl.int64) * q_token + head * q_head
        a = tl.load(q + of_q[:, None] + d[None, :], inside[:, None], other=0.0)
        of_out = (row * seq + query) * (N * D) + head * D
        do = tl.load(d_out + of_out[:, None] + d[None, :], inside[:, None], other=0.0)
        of_head = (row * N + head) * seq + query
        log_total = tl.load(lse + of_head, inside, other=0.0)
        mean = tl.load(delta + of_head, inside, other=0.0)
        begin = tl.load(first + row * seq + query, inside, other=seq)
        slope = tl.load(slopes + head) if ALIBI else 0.0 * head
        products = tl.dot(b, tl.trans(a))
        scores = _scores(
            products, query[None, :], key[:, None], begin[None, :], slope[None, :], scale, ALIBI
        )
        p = tl.exp2(scores - log_total[None, :])
        acc_v = tl.dot(p.to(do.dtype), do, acc_v)
        dp = tl.dot(c, tl.trans(do))
        ds = p * (dp - mean[None, :])
        acc_k = tl.dot(ds.to(a.dtype), a, acc_k)
    to = (row * seq + key) * (kv_heads * D) + kv_head * D
    to = to[:, None] + d[None, :]
    tl.store(dk + to, (acc_k * scale).to(dk.dtype.element_ty), there[:, None])
    tl.store(dv + to, acc_v.to(dv.dtype.element_ty), there[:, None])


# Fastest on an H200 of those tried, for windows of 128 and for whole documents alike.
FORWARD = Tiles(4, 16, 32, 4, 2)
QUERIES = Tiles(4, 16, 32, 4, 2)
KEYS = Tiles(4, 8, 64, 4, 3)


def _strides(*tensors: Tensor) -> list[int]:
    for tensor in tensors:
        assert tensor.stride(-1) == 1, tensor.stride()
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _tiles(tiles: Tiles, group: int) -> dict[str, int]:
    """A launch's settings; a tile stacks no more heads than a key head has."""
    heads = min(tiles.heads, group & -group)
    return {
        "HEADS": heads,
        "QUERIES": tiles.queries * tiles.heads // heads,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, sinks: Tensor | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What queries gather, and the base-2 log-sum-exp of each, its sink included."""
    batch, seq, heads, dim = q.shape
    group = heads // k.shape[2]
    out = torch.empty(batch, seq, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, seq, dtype=torch.float32, device=q.device)
    tiles = _tiles(FORWARD, group)
    grid = (triton.cdiv(seq, tiles["QUERIES"]) * (heads // tiles["HEADS"]), batch)
    _forward_kernel[grid](
        q, k, v, sinks, slopes, first, out, lse, *_strides(q, k, v), seq, dim**-0.5,
        N=heads, GROUP=group, D=dim, SINK=sinks is not None, ALIBI=slopes is not None, **tiles,
    )  # fmt: skip
    return out, lse


def backward_queries(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, sinks: Tensor | None, slopes: Tensor | None,
    out: Tensor, lse: Tensor, d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of queries, <dO, O> of each query, gradient of sinks (empty without them)."""
    batch, seq, heads, dim = q.shape
    group = heads // k.shape[2]
    delta, dq = torch.empty_like(lse), torch.empty_like(out)
    tiles = _tiles(QUERIES, group)
    blocks = triton.cdiv(seq, tiles["QUERIES"])
    d_sinks = lse.new_empty(batch * blocks, heads if sinks is not None else 0)
    _backward_queries_kernel[(blocks * (heads // tiles["HEADS"]), batch)](
        q, k, v, sinks, slopes, first, out, d_out, lse, delta, dq, d_sinks, *_strides(q, k, v),
        seq, dim**-0.5,
        N=heads, GROUP=group, D=dim, SINK=sinks is not None, ALIBI=slopes is not None, **tiles,
    )  # fmt: skip
    return dq, delta, d_sinks.sum(0)


def backward_keys(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, slopes: Tensor | None,
    lse: Tensor, delta: Tensor, d_out: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of keys and values."""
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tiles = _tiles(KEYS, heads // kv_heads)
    _backward_keys_kernel[(triton.cdiv(seq, tiles["KEYS"]) * kv_heads, batch)](
        q, k, v, slopes, first, last, d_out, lse, delta, dk, dv, *_strides(q, k, v), seq,
        dim**-0.5,
        N=heads, GROUP=heads // kv_heads, D=dim, ALIBI=slopes is not None, **tiles,
    )  # fmt: skip
    return dk, dv
