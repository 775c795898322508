"""Divergences of two models over the whole vocabulary, in place of a chunk of bf16 logits.

Up to three reads of both models' logits and one write of the student's; nothing else of their size
exists.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK = 4096  # logits of a row, of each model, that a program looks at together
LEAST = -1e30
TINY = 1e-37  # in place of a mixture that has underflowed; what multiplies its logarithm is 0
KINDS = (
    "forward_kl",
    "reverse_kl",
    "generalized_jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
)


@triton.jit
def _norms_kernel(
    student, teacher, norms, vocab, rows, power, LEAST: tl.constexpr, COOL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: log-sum-exps of both models, and KL(teacher || student)."""
    row = tl.program_id(0).to(tl.int64)
    peak_s = tl.full((), LEAST, tl.float32)
    peak_t = tl.full((), LEAST, tl.float32)
    total_s = tl.zeros((), tl.float32)
    total_t = tl.zeros((), tl.float32)
    cool_s = tl.zeros((), tl.float32)
    cool_t = tl.zeros((), tl.float32)
    moment = tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < vocab
        zs = tl.load(student + row * vocab + at, inside, other=float("-inf")).to(tl.float32)
        zt = tl.load(teacher + row * vocab + at, inside, other=float("-inf")).to(tl.float32)
        high_s = tl.maximum(peak_s, tl.max(zs, 0))
        high_t = tl.maximum(peak_t, tl.max(zt, 0))
        total_s = total_s * tl.exp(peak_s - high_s) + tl.sum(tl.exp(zs - high_s), 0)
        mass = tl.exp(zt - high_t)
        shrink = tl.exp(peak_t - high_t)
        total_t = total_t * shrink + tl.sum(mass, 0)
        moment = moment * shrink + tl.sum(tl.where(inside, mass * (zt - zs), 0.0), 0)
        if COOL:
            cool_s = cool_s * tl.exp(power * (peak_s - high_s))
            cool_s += tl.sum(tl.exp(power * (zs - high_s)), 0)
            cool_t = cool_t * tl.exp(power * (peak_t - high_t))
            cool_t += tl.sum(tl.exp(power * (zt - high_t)), 0)
        peak_s = high_s
        peak_t = high_t
    norm_s = peak_s + tl.log(total_s)
    norm_t = peak_t + tl.log(total_t)
    tl.store(norms + row, norm_s)
    tl.store(norms + rows + row, moment / total_t - norm_t + norm_s)
    if COOL:
        norm_s = power * peak_s + tl.log(cool_s)
        norm_t = power * peak_t + tl.log(cool_t)
    tl.store(norms + 2 * rows + row, norm_s)
    tl.store(norms + 3 * rows + row, norm_t)


@triton.jit
def _compare(ls, lt, share, KIND: tl.constexpr, TINY: tl.constexpr):
    """What a token adds to the value; u, whose mean under p the gradient subtracts; p and t."""
    p = tl.exp(ls)
    t = tl.exp(lt)
    if KIND == 0:
        value = t * (lt - ls)
        u = t / p
    elif KIND == 1:
        u = ls - lt
        value = p * u
    elif KIND == 2:
        lm = tl.log(tl.maximum(share * t + (1 - share) * p, TINY))
        u = ls - lm
        value = share * t * (lt - lm) + (1 - share) * p * u
    elif KIND == 3:
        m = tl.maximum(share * t + (1 - share) * p, TINY)
        u = t / m
        value = t * (lt - tl.log(m))
    else:
        m = tl.maximum((1 - share) * t + share * p, TINY)
        u = ls - tl.log(m)
        value = p * u
        u -= share * p / m
    return value, u, p, t


@triton.jit
def _values_kernel(
    student, teacher, norms, values, centers, vocab, rows, power, share, KIND: tl.constexpr,
    TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: the divergence, and the mean of u under the student."""
    row = tl.program_id(0).to(tl.int64)
    norm_s = tl.load(norms + 2 * rows + row)
    norm_t = tl.load(norms + 3 * rows + row)
    total = tl.zeros((), tl.float32)
    center = tl.zeros((), tl.float32)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < vocab
        zs = tl.load(student + row * vocab + at, inside, other=0.0).to(tl.float32)
        zt = tl.load(teacher + row * vocab + at, inside, other=0.0).to(tl.float32)
        value, u, p, _ = _compare(power * zs - norm_s, power * zt - norm_t, share, KIND, TINY)
        total += tl.sum(tl.where(inside, value, 0.0), 0)
        if KIND != 0:
            center += tl.sum(tl.where(inside, p * u, 0.0), 0)
    tl.store(values + row, total)
    tl.store(centers + row, center)


@triton.jit
def _gradient_kernel(
    student, teacher, labels, norms, centers, slopes, full, label, vocab, rows, power, share,
    KIND: tl.constexpr, COOL: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Student logits become their gradient: of the divergence, and of the label's log-prob."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    here = student + row * vocab + at
    zs = tl.load(here, inside, other=0.0).to(tl.float32)
    zt = tl.load(teacher + row * vocab + at, inside, other=0.0).to(tl.float32)
    ls = power * zs - tl.load(norms + 2 * rows + row)
    lt = power * zt - tl.load(norms + 3 * rows + row)
    _, u, p, t = _compare(ls, lt, share, KIND, TINY)
    if KIND == 0:
        gradient = p - t
    elif KIND == 2:
        gradient = (1 - share) * p * (u - tl.load(centers + row))
    elif KIND == 3:
        gradient = (share - 1) * p * (u - tl.load(centers + row))
    else:
        gradient = p * (u - tl.load(centers + row))
    gradient *= tl.load(slopes + row)
    if COOL:
        p = tl.exp(zs - tl.load(norms + row))
    gradient += tl.load(full + row) * p
    gradient += tl.where(at == tl.load(labels + row), tl.load(label + row), 0.0)
    tl.store(here, gradient.to(tl.bfloat16), inside)


def divergence(
    student: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows vocab"],
    *,
    kind: str,
    share: float,
    power: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, what `divergence_gradient_` needs again, and [2, rows]: log-sum-exp and forward KL.

    Args:
        student: Logits.
        teacher: Logits.
        kind: One of `KINDS`.
        share: Of the mixture, where there is one.
        power: Multiplies both models' logits in the values; the last result is of power 1.

    References:
        own; `losses.exact.exact_row_function` has the reference.
    """
    rows, vocab = student.shape
    norms = torch.empty(5, rows, device=student.device)
    values = torch.empty(rows, device=student.device)
    if rows:
        _norms_kernel[(rows,)](
            student, teacher, norms, vocab, rows, power,
            LEAST=LEAST, COOL=power != 1, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        if kind == KINDS[0] and power == 1:
            values.copy_(norms[1])
        else:
            _values_kernel[(rows,)](
                student, teacher, norms, values, norms[4], vocab, rows, power, share,
                KIND=KINDS.index(kind), TINY=TINY, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
    return values, norms, norms[:2]


def divergence_gradient_(
    student: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows vocab"],
    labels: Int64[Tensor, " rows"],
    norms: Float[Tensor, "5 rows"],
    slopes: Float[Tensor, " rows"],
    label: Float[Tensor, " rows"],
    *,
    kind: str,
    share: float,
    power: float,
) -> Float[Tensor, "rows vocab"]:
    """The student's logits' memory, now holding the gradient.

    It is slopes x d value / d (power x logits) + label x d log p(label) / d logits.

    References:
        own; `losses.exact.exact_row_function` has the reference.
    """
    rows, vocab = student.shape
    if rows:
        _gradient_kernel[(rows, triton.cdiv(vocab, BLOCK))](
            student, teacher, labels, norms, norms[4], slopes.contiguous(), (-label).contiguous(),
            label.contiguous(), vocab, rows, power, share,
            KIND=KINDS.index(kind), COOL=power != 1, TINY=TINY, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return student
