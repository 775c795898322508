"""A divergence over the whole vocabulary, from the teacher's final states and its head.

A chunk's teacher logits are one more product, made and dropped with the student's: [rows, vocab]
never exists for either.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vpmoe.losses.base import LossInputs
from vpmoe.losses.chunked import STUDENT_LOGPROBS, RowFunction, RowResult
from vpmoe.losses.divergences import Divergence, forward_kl

EXACT_NEEDS = frozenset({"teacher_hidden", "teacher_head"})


@dataclass(frozen=True)
class ExactForm:
    """What is compared, and how much of the label's cross-entropy is mixed in.

    Attributes:
        divergence: Of log-probs over the whole vocabulary.
        kernel: Kind and share by which GPU code knows the divergence; None if it does not.
        temperature: Divides both models' logits; the divergence is multiplied by its square.
        label_weight: Share of cross-entropy.
    """

    divergence: Divergence
    kernel: tuple[str, float] | None
    temperature: float = 1.0
    label_weight: float = 0.0


def exact_row_function(inputs: LossInputs, form: ExactForm) -> RowFunction:
    r"""Row function of (1 - w) T^2 D(t_T, p_T) - w ln p(y) over the whole vocabulary.

    Nothing is unseen, so the reported forward KL is the true one and its bound is 0.

    Args:
        inputs: The rows that the chunks are taken from.
        form: Which divergence.

    References:
        own; gradients are listed in docs/losses.md.
    """
    assert inputs.teacher_hidden is not None and inputs.teacher_head is not None
    hidden, head = inputs.teacher_hidden, inputs.teacher_head.to(inputs.teacher_hidden.dtype)

    def function(logits: Tensor, rows: slice, coefficients: Tensor | None) -> RowResult:
        teacher, labels = hidden[rows] @ head.T, inputs.labels[rows]
        narrow = logits.dtype == teacher.dtype == torch.bfloat16
        if logits.is_cuda and narrow and form.kernel is not None:
            result = _on_gpu(logits, teacher, labels, form, coefficients)
        else:
            wide = torch.promote_types(logits.dtype, torch.float32)
            result = _reference(logits.to(wide), teacher.to(wide), labels, form, coefficients)
        ones = torch.ones_like(result.values)
        masses = {"teacher_mass": ones, "student_mass": ones, "unseen_kl_at_most": 0 * ones}
        return RowResult(result.values, result.extras | masses, result.grad_logits)

    return function


def _reference(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    form: ExactForm,
    coefficients: Tensor | None,
) -> RowResult:
    """Dense log-probs of the chunk, and autograd."""
    with torch.set_grad_enabled(coefficients is not None):
        leaf = logits.detach().requires_grad_(coefficients is not None)
        student = leaf.log_softmax(dim=1)
        chosen = student.gather(1, labels[:, None]).squeeze(1)
        cool = (leaf / form.temperature).log_softmax(dim=1)
        cool_teacher = (teacher / form.temperature).log_softmax(dim=1)
        values = form.temperature**2 * form.divergence(cool_teacher, cool)
        values = (1 - form.label_weight) * values - form.label_weight * chosen
        grad = None
        if coefficients is not None:
            (grad,) = torch.autograd.grad((coefficients * values).sum(), leaf)
    kl = forward_kl(teacher.log_softmax(dim=1), student.detach())
    extras = {STUDENT_LOGPROBS: chosen.detach(), "kl_at_least": kl}
    return RowResult(values.detach(), extras, grad)


def _on_gpu(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    form: ExactForm,
    coefficients: Tensor | None,
) -> RowResult:
    """The same in kernels that never widen a chunk."""
    # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
    from vpmoe.kernels.divergences import divergence, divergence_gradient_

    assert form.kernel is not None
    kind, share = form.kernel
    weight, scale = form.label_weight, (1 - form.label_weight) * form.temperature**2
    chosen = logits.gather(1, labels[:, None]).squeeze(1).float()
    options = {"kind": kind, "share": share, "power": 1 / form.temperature}
    values, norms, (norm, kl) = divergence(logits, teacher, **options)
    chosen = chosen - norm
    extras = {STUDENT_LOGPROBS: chosen, "kl_at_least": kl}
    values = scale * values - weight * chosen
    if coefficients is None:
        return RowResult(values, extras, None)
    slopes = coefficients * (scale / form.temperature)
    grad = divergence_gradient_(
        logits, teacher, labels, norms, slopes, -weight * coefficients, **options
    )
    return RowResult(values, extras, grad)
