"""What a chunk of float32 logits says: log-probabilities, and the largest entries in exact order.

One read of the logits finds log-sum-exp, label and the largest entry of every block of columns;
the K largest entries lie in the K first blocks (`vpmoe.teachers.distribution.likeliest` says why),
which are a small part of a vocabulary. An entry and its column travel as one ordered integer, so
that equal entries come in the order of their columns whatever sorts them.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64
from torch import Tensor

STRIDE = 8192  # logits of a row that a program looks at together
BLOCK = 64  # columns that one largest entry speaks for
_BLOCKS_AT_ONCE = 8


@triton.jit
def _key(z, column):
    """Larger for a larger logit, and among equal ones for a lower column."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (order << 32) | (0xFFFFFFFF - column.to(tl.int64))


@triton.jit
def _read_kernel(
    logits, tokens, logprobs, lse, peaks, vocab, num_blocks,
    PEAKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: log-sum-exp by a running maximum, and a key per block."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * vocab
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, vocab, STRIDE):
        at = first + tl.arange(0, STRIDE)
        z = tl.load(begin + at, at < vocab, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
        peak = higher
        if PEAKS:
            highest = tl.max(tl.reshape(z, (STRIDE // BLOCK, BLOCK)), 1)
            block = first // BLOCK + tl.arange(0, STRIDE // BLOCK)
            tl.store(peaks + row * num_blocks + block, _key(highest, block), block < num_blocks)
    norm = peak + tl.log(total)
    chosen = tl.load(begin + tl.load(tokens + row))
    tl.store(lse + row, norm)
    tl.store(logprobs + row, chosen - norm)


@triton.jit
def _candidates_kernel(logits, chosen, keys, vocab, k, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of all entries of some of a row's chosen blocks."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    key = tl.load(chosen + row * k + place, place < k, other=0)
    block = 0xFFFFFFFF - (key & 0xFFFFFFFF)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = (place < k)[:, None] & (column < vocab)
    z = tl.load(logits + row * vocab + column, known, other=float("-inf"))
    out = keys + (row * k + place[:, None]) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out, _key(z, column), (place < k)[:, None])


def read_logits(
    logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"]
) -> tuple[Float32[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """Log-probability of one column per row, and each row's log-sum-exp.

    References:
        own.
    """
    logprobs, lse, _ = _read(logits, tokens, with_peaks=False)
    return logprobs, lse


def read_likeliest(
    logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"], k: int
) -> tuple[Float32[Tensor, " rows"], Int64[Tensor, "rows top"], Float32[Tensor, "rows top"]]:
    """Log-probability of one column per row, and the K likeliest columns with theirs.

    Args:
        logits: Contiguous.
        tokens: Column asked about in each row.
        k: Between 1 and the number of columns.

    References:
        own; `vpmoe.teachers.distribution.likeliest` is the reference.
    """
    rows, vocab = logits.shape
    logprobs, lse, peaks = _read(logits, tokens, with_peaks=True)
    assert peaks is not None
    blocks = min(k, peaks.shape[1])
    chosen = peaks.topk(blocks, dim=1, sorted=False).values
    keys = torch.empty((rows, blocks * BLOCK), dtype=torch.int64, device=logits.device)
    if rows:
        grid = (rows, triton.cdiv(blocks, _BLOCKS_AT_ONCE))
        _candidates_kernel[grid](
            logits, chosen, keys, vocab, blocks, AT_ONCE=_BLOCKS_AT_ONCE, BLOCK=BLOCK, num_warps=4
        )
    best = keys.topk(k, dim=1).values
    order = best >> 32
    bits = torch.where(order < 0, order ^ 0x7FFF_FFFF, order).to(torch.int32)
    return logprobs, 0xFFFF_FFFF - (best & 0xFFFF_FFFF), bits.view(torch.float32) - lse[:, None]


def _read(
    logits: Float32[Tensor, "rows vocab"], tokens: Int64[Tensor, " rows"], *, with_peaks: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logprobs)
    blocks, peaks = triton.cdiv(vocab, BLOCK), None
    if with_peaks:
        peaks = torch.empty((rows, blocks), dtype=torch.int64, device=logits.device)
    if rows:
        _read_kernel[(rows,)](
            logits, tokens, logprobs, lse, peaks, vocab, blocks,
            PEAKS=with_peaks, STRIDE=STRIDE, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return logprobs, lse, peaks
