"""Divergences of two distributions given by log-probs, in plain differentiable PyTorch.

Classes may be single tokens, or a tail that stands for all others. A class of probability 0 has
log-probability -inf on either side; it adds nothing and sends no gradient, not even NaN.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Logprobs = Float[Tensor, "*rows classes"]
Values = Float[Tensor, "*rows"]

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log-probs of the teacher, of the student) -> one value per row, nats."""


def _mean(logprobs: Tensor, of: Tensor, minus: Tensor) -> Tensor:
    """Sum of p (of - minus) over classes with p > 0."""
    live = logprobs > -torch.inf
    difference = torch.where(live, of, 0.0) - torch.where(live, minus, 0.0)
    return (logprobs.exp() * difference).sum(dim=-1)


def _mixture(left: Tensor, right: Tensor, share: float) -> Tensor:
    """Log of share x left + (1 - share) x right; -inf where both are."""
    dead = (left == -torch.inf) & (right == -torch.inf)
    zero = torch.zeros((), dtype=left.dtype, device=left.device)
    mixed = torch.logaddexp(
        math.log(share) + torch.where(dead, zero, left),
        math.log1p(-share) + torch.where(dead, zero, right),
    )
    return torch.where(dead, -torch.inf, mixed)


def forward_kl(teacher: Logprobs, student: Logprobs) -> Values:
    r"""KL(t || p) = :math:`\sum t \ln(t / p)`: the student must cover what the teacher does.

    Gradient by the logits: p - t.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), arXiv:1503.02531.
    """
    return _mean(teacher, teacher, student)


def reverse_kl(teacher: Logprobs, student: Logprobs) -> Values:
    r"""KL(p || t): the student must stay where the teacher is; infinite where t is 0 and p is not.

    Gradient by the logits: p (u - E_p u) with u = ln(p / t).

    References:
        Gu et al., "MiniLLM" (ICLR 2024), arXiv:2306.08543. Difference: over given text.
    """
    return _mean(student, student, teacher)


def generalized_jsd(teacher: Logprobs, student: Logprobs, *, beta: float) -> Values:
    r"""b KL(t || m) + (1 - b) KL(p || m) with m = b t + (1 - b) p; b = 1/2 is Jensen-Shannon's.

    Between 0 and ln 2. It goes to 0 with b and with 1 - b, b = .01 is not nearly a forward KL.
    Gradient by the logits: (1 - b) p (u - E_p u) with u = ln(p / m).

    References:
        Agarwal et al., "On-Policy Distillation of Language Models" (ICLR 2024), arXiv:2306.13649.
        Difference: b is inside (0, 1); the ends are kinds of their own.
    """
    mixture = _mixture(teacher, student, beta)
    return beta * _mean(teacher, teacher, mixture) + (1 - beta) * _mean(student, student, mixture)


def skewed_forward_kl(teacher: Logprobs, student: Logprobs, *, skew: float) -> Values:
    """KL(t || m) with m = a t + (1 - a) p: never above -ln a, however far the student is.

    Gradient by the logits: -(1 - a) p (u - E_p u) with u = t / m.

    References:
        Ko et al., "DistiLLM" (ICML 2024), arXiv:2402.03898.
    """
    return _mean(teacher, teacher, _mixture(teacher, student, skew))


def skewed_reverse_kl(teacher: Logprobs, student: Logprobs, *, skew: float) -> Values:
    """KL(p || m) with m = (1 - a) t + a p: never above -ln a, even where the teacher is 0.

    Gradient by the logits: p (u - E_p u) with u = ln(p / m) - a p / m.

    References:
        Ko et al., "DistiLLM" (ICML 2024), arXiv:2402.03898.
    """
    return _mean(student, student, _mixture(student, teacher, skew))
