"""What is known of the part of a distribution that was not stored, and of the error it may hide."""

import torch
from jaxtyping import Float
from torch import Tensor


def log1mexp(logprobs: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """ln(1 - e^x) for x <= 0, accurate at both ends; -inf at 0 and above.

    References:
        Maechler, "Accurately computing log(1 - exp(-|a|))" (2012), R package Rmpfr.
    """
    x = logprobs.clamp_max(0.0)
    near = x > -0.6931471805599453
    by_expm1 = (-torch.expm1(torch.where(near, x, -1.0))).log()
    by_log1p = torch.log1p(-torch.where(near, -1.0, x).exp())
    return torch.where(near, by_expm1, by_log1p)


def stored_tail(
    logprobs: Float[Tensor, "rows entries"], tail: Float[Tensor, " rows"] | None
) -> Float[Tensor, " rows"]:
    """Log of the teacher's mass that has no entry: as stored, else what the entries leave over.

    References:
        own.
    """
    return log1mexp(logprobs.logsumexp(dim=1)) if tail is None else tail


def tempered(
    logprobs: Float[Tensor, "rows entries"],
    tail: Float[Tensor, " rows"],
    *,
    temperature: float,
    vocab: int,
) -> tuple[Float[Tensor, "rows entries"], Float[Tensor, " rows"]]:
    r"""A stored distribution at another temperature: log-probs of entries and of the tail.

    With a = 1/T each entry becomes t^a. The tail's V - K probabilities are not known; taken as
    equal they become :math:`(V - K)^{1-a} r^a` together, which for T > 1 is the most they can be
    (x^a is concave), so the student is never asked for less tail than a softer teacher has. Both
    are divided by their sum, which at T = 1 only removes the store's rounding.

    Args:
        logprobs: Of the entries; -inf in unused places.
        tail: Log of the mass elsewhere.
        temperature: T.
        vocab: V, ids in all.

    References:
        own; the single-token tail of other tools leaves (V - K)^{1-a} out.

    Example:
        >>> stored = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([0.2]).log()
        >>> entries, tail = tempered(*stored, temperature=2.0, vocab=4)
        >>> [round(x, 4) for x in [*entries.exp()[0].tolist(), tail.exp().item()]]
        [0.3747, 0.2902, 0.3351]
    """
    power = 1 / temperature
    others = vocab - (logprobs > -torch.inf).sum(dim=1).to(logprobs.dtype)
    spread = (1 - power) * others.clamp_min(1).log()
    entries, tail = power * logprobs, power * tail + spread
    norm = torch.cat([entries, tail[:, None]], dim=1).logsumexp(dim=1)
    return entries - norm[:, None], tail - norm


def unseen_kl_bound(
    tail: Float[Tensor, " rows"],
    cap: Float[Tensor, " rows"],
    student_tail: Float[Tensor, " rows"],
    student_least: Float[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    r"""The most that KL(t || p) can exceed the KL over entries and tail bucket, in nats.

    The excess is :math:`r_T \, KL(\tilde t \| \tilde p)` of the two tails, each made to sum to one.
    No :math:`\tilde t` is above :math:`c = \min(1, cap / r_T)`, so
    :math:`\sum \tilde t \ln \tilde t \le \ln c`; and :math:`-\sum \tilde t \ln \tilde p \le
    -\ln \min \tilde p`. Together :math:`r_T (\ln c - \ln(p_{least} / r_S))`. Never below 0.

    Args:
        tail: ln r_T, the teacher's mass without entry.
        cap: Log of the largest probability that an id without entry may have: the smallest
            stored one, if the likeliest ids were stored.
        student_tail: ln r_S, the student's mass on the same ids.
        student_least: Log-probability of the unlikeliest of these ids under the student.

    References:
        own; derived in docs/losses.md.
    """
    live = tail > -torch.inf
    zero = torch.zeros((), dtype=tail.dtype, device=tail.device)
    per_mass = (cap - tail).clamp_max(0.0) + student_tail - student_least
    return torch.where(live, tail.exp() * torch.where(live, per_mass, zero).clamp_min(0.0), zero)
