"""KL(teacher || student), by default with one more class for all that was not stored."""

from typing import Literal

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from vpmoe.losses.distillation import DistillationConfig
from vpmoe.losses.divergences import forward_kl
from vpmoe.losses.prior_tail import PriorDistillation
from vpmoe.losses.rows import RowLoss

Tail = Literal["bucket", "prior", "renormalized", "unnormalized", "renormalized_both"]


class ForwardKLConfig(DistillationConfig):
    """The student learns to cover what the teacher finds likely."""

    kind: Literal["forward_kl"] = "forward_kl"
    tail: Tail = "bucket"
    """Mass without entry: a class of its own, or what `prior`, `renormalized` and so on say.

    `prior` shares it among all other ids by how often each is a label, which the store's codec must
    have known (adaptive with tail = prior): the student learns from a whole distribution.
    `renormalized` makes the teacher's entries sum to one, which leaves a student over-confident;
    `unnormalized` drops the tail's term, so that values may be negative; `renormalized_both` is
    refused.
    """

    @model_validator(mode="after")
    def _pulls_on_the_mass(self) -> "ForwardKLConfig":
        if self.tail == "renormalized_both":
            raise ValueError(
                "tail = renormalized_both compares shapes only: its gradient on the student's "
                "mass outside the entries is zero, and that mass stays wherever it is; use bucket"
            )
        if self.against == "hidden" and self.tail != "bucket":
            raise ValueError(
                f"tail = {self.tail} is about stored entries, and against = hidden knows the "
                "whole distribution; leave tail out"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        """What a batch must bring."""
        return PriorDistillation.needs if self.tail == "prior" else super().needs

    def build(self) -> RowLoss:
        """The loss."""
        return PriorDistillation(self) if self.tail == "prior" else super().build()

    @property
    def kernel(self) -> tuple[str, float]:
        """Its name in `kernels.divergences`."""
        return "forward_kl", 0.0

    def divergence(
        self, teacher: Float[Tensor, "rows classes"], student: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        """KL(teacher || student)."""
        return forward_kl(teacher, student)

    def between_targets(
        self,
        teacher: Float[Tensor, "rows entries"],
        teacher_tail: Float[Tensor, " rows"],
        student: Float[Tensor, "rows entries"],
        student_tail: Float[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """The same over entries, the tail as `tail` says."""
        if self.tail == "bucket":
            return super().between_targets(teacher, teacher_tail, student, student_tail)
        return forward_kl_without_tail(teacher, student, tail=self.tail)


def forward_kl_without_tail(
    teacher: Float[Tensor, "rows entries"], student: Float[Tensor, "rows entries"], *, tail: Tail
) -> Float[Tensor, " rows"]:
    """Sum of t ln(t / p) over the entries alone, of the distributions that `tail` makes of them.

    Gradient by the logits, with ~ for renormalised: `renormalized` p - t~; `unnormalized`
    m_T p - t with m_T the stored mass; `renormalized_both` p~ - t~ on the entries and exactly 0
    elsewhere, which is why no config may ask for it.

    References:
        own; the names of three choices that other tools make without saying so.
    """
    if tail != "unnormalized":
        teacher = teacher - teacher.logsumexp(dim=1, keepdim=True)
    if tail == "renormalized_both":
        student = student - student.logsumexp(dim=1, keepdim=True)
    return forward_kl(teacher, student)
