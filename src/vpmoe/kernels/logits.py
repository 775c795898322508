"""Log-probabilities of labels and their gradient on one GPU, in place of a chunk of bf16 logits.

Two reads and one write of the logits; nothing else of their size exists.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK = 8192  # logits of a row that a program looks at together


@triton.jit
def _logprob_kernel(logits, labels, logprobs, lse, vocab, BLOCK: tl.constexpr):
    """One program per row: log-sum-exp in one pass, by a running maximum."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * vocab
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(begin + at, at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
        peak = higher
    norm = peak + tl.log(total)
    chosen = tl.load(begin + tl.load(labels + row)).to(tl.float32)
    tl.store(lse + row, norm)
    tl.store(logprobs + row, chosen - norm)


@triton.jit
def _gradient_kernel(logits, labels, lse, slopes, vocab, BLOCK: tl.constexpr):
    """Logits become slope * (onehot - softmax)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + row * vocab + at
    z = tl.load(here, at < vocab, other=float("-inf")).to(tl.float32)
    p = tl.exp(z - tl.load(lse + row))
    onehot = tl.where(at == tl.load(labels + row), 1.0, 0.0)
    gradient = tl.load(slopes + row) * (onehot - p)
    tl.store(here, gradient.to(tl.bfloat16), at < vocab)


def label_logprobs(
    logits: Float[Tensor, "rows vocab"], labels: Int64[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Log-probability of each row's label, and each row's log-sum-exp, float32.

    References:
        own; `losses.chunked.label_row_function` is the reference.
    """
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logprobs)
    if rows:
        _logprob_kernel[(rows,)](logits, labels, logprobs, lse, vocab, BLOCK=BLOCK, num_warps=8)
    return logprobs, lse


def label_gradient_(
    logits: Float[Tensor, "rows vocab"],
    labels: Int64[Tensor, " rows"],
    lse: Float[Tensor, " rows"],
    slopes: Float[Tensor, " rows"],
) -> Float[Tensor, "rows vocab"]:
    """The logits' memory, now holding slope times the gradient of each label's log-probability.

    References:
        own; d log p_y / dz = onehot(y) - softmax(z).
    """
    rows, vocab = logits.shape
    if rows:
        grid = (rows, triton.cdiv(vocab, BLOCK))
        _gradient_kernel[grid](logits, labels, lse, slopes, vocab, BLOCK=BLOCK, num_warps=8)
    return logits
