"""Losses on stored targets on one GPU, in place of a chunk of bf16 logits.

Two reads and one write of the logits, as for cross-entropy. The entries' logits are taken out
first, so that what is left is the tail, exactly; their gradients are put in last.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int64
from torch import Tensor

BLOCK = 8192  # logits of a row that a program looks at together
LEAST = -1e30  # below every logit; its exponential is 0, and differences of it are no NaN


@triton.jit
def _cover_kernel(logits, ids, used, vocab, entries, WIDTH: tl.constexpr):
    """One program per row: -inf at its entries."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    live = (k < entries) & (tl.load(used + row * entries + k, k < entries, other=0) != 0)
    at = tl.load(ids + row * entries + k, live, other=0)
    tl.store(logits + row * vocab + at, tl.full((WIDTH,), float("-inf"), tl.bfloat16), live)


@triton.jit
def _read_kernel(
    logits, rest, cool_rest, least, vocab, power, LEAST: tl.constexpr, COOL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: log-sum-exps by running maxima, and the smallest logit left."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * vocab
    peak = tl.full((), LEAST, tl.float32)
    total = tl.zeros((), tl.float32)
    cool_total = tl.zeros((), tl.float32)
    low = tl.full((), float("inf"), tl.float32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(begin + at, at < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher), 0)
        if COOL:
            shrunk = cool_total * tl.exp(power * (peak - higher))
            cool_total = shrunk + tl.sum(tl.exp(power * (z - higher)), 0)
        low = tl.minimum(low, tl.min(tl.where(z > LEAST, z, float("inf")), 0))
        peak = higher
    tl.store(rest + row, peak + tl.log(total))
    tl.store(least + row, low)
    if COOL:
        tl.store(cool_rest + row, power * peak + tl.log(cool_total))


@triton.jit
def _write_kernel(
    logits, labels, label, tail, cool_rest, full, norm, vocab, power, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits become tail * exp(power z - cool_rest) + full * exp(z - norm) + label at the label."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = logits + row * vocab + at
    z = tl.load(here, at < vocab, other=float("-inf")).to(tl.float32)
    gradient = tl.load(tail + row) * tl.exp(power * z - tl.load(cool_rest + row))
    if FULL:
        gradient += tl.load(full + row) * tl.exp(z - tl.load(norm + row))
    gradient += tl.where(at == tl.load(labels + row), tl.load(label + row), 0.0)
    tl.store(here, gradient.to(tl.bfloat16), at < vocab)


@triton.jit
def _uncover_kernel(logits, ids, used, values, vocab, entries, WIDTH: tl.constexpr):
    """One program per row: the entries' gradients."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    live = (k < entries) & (tl.load(used + row * entries + k, k < entries, other=0) != 0)
    at = tl.load(ids + row * entries + k, live, other=0)
    value = tl.load(values + row * entries + k, live, other=0.0)
    tl.store(logits + row * vocab + at, value.to(tl.bfloat16), live)


def read_targets(
    logits: Float[Tensor, "rows vocab"],
    ids: Int64[Tensor, "rows entries"],
    used: Bool[Tensor, "rows entries"],
    labels: Int64[Tensor, " rows"],
    *,
    power: float,
) -> tuple[Tensor, ...]:
    """Logits of labels and entries, log-sum-exps of the rest at both temperatures, its least logit.

    The logits of the entries are -inf afterwards.

    References:
        own; `losses.targets.read_reference` is the reference.
    """
    rows, vocab = logits.shape
    label = logits.gather(1, labels[:, None]).squeeze(1).float()
    entries = logits.gather(1, ids).float().masked_fill_(~used, -torch.inf)
    rest, cool_rest, least = torch.empty(3, rows, device=logits.device).unbind()
    if rows:
        count = ids.shape[1]
        _cover_kernel[(rows,)](
            logits,
            ids,
            used.view(torch.uint8),
            vocab,
            count,
            WIDTH=triton.next_power_of_2(count),
            num_warps=1,
        )
        _read_kernel[(rows,)](
            logits, rest, cool_rest, least, vocab, power,
            LEAST=LEAST, COOL=power != 1, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return label, entries, rest, rest if power == 1 else cool_rest, least


def write_targets_(
    logits: Float[Tensor, "rows vocab"],
    ids: Int64[Tensor, "rows entries"],
    used: Bool[Tensor, "rows entries"],
    labels: Int64[Tensor, " rows"],
    entries: Float[Tensor, "rows entries"],
    label: Float[Tensor, " rows"],
    tail: Float[Tensor, " rows"],
    cool_rest: Float[Tensor, " rows"],
    full: Float[Tensor, " rows"],
    norm: Float[Tensor, " rows"],
    *,
    power: float,
) -> Float[Tensor, "rows vocab"]:
    """The logits' memory, now holding the gradient that `losses.targets.Writing` describes.

    References:
        own; `losses.targets.write_reference` is the reference.
    """
    rows, vocab = logits.shape
    if not rows:
        return logits
    entries = (entries + (ids == labels[:, None]) * label[:, None]).contiguous()
    if power == 1:  # one exponential: both distributions are multiples of each other here
        tail = tail + full * (cool_rest - norm).exp()
    cool_rest = cool_rest.clamp_min(LEAST).contiguous()
    _write_kernel[(rows, triton.cdiv(vocab, BLOCK))](
        logits, labels, label.contiguous(), tail.contiguous(), cool_rest, full.contiguous(),
        norm.contiguous(), vocab, power, FULL=power != 1, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    count = ids.shape[1]
    _uncover_kernel[(rows,)](
        logits,
        ids,
        used.view(torch.uint8),
        entries,
        vocab,
        count,
        WIDTH=triton.next_power_of_2(count),
        num_warps=1,
    )
    return logits
