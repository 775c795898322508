"""Skewed KL: a little of one model is mixed into the other, so that no ratio explodes."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.losses.distillation import DistillationConfig
from vpmoe.losses.divergences import skewed_forward_kl, skewed_reverse_kl


class SkewedForwardKLConfig(DistillationConfig):
    """KL(teacher || a teacher + (1 - a) student)."""

    kind: Literal["skewed_forward_kl"] = "skewed_forward_kl"
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Share a of the teacher in the mixture."""

    @property
    def kernel(self) -> tuple[str, float]:
        """Its name in `kernels.divergences`."""
        return "skewed_forward_kl", self.skew

    def divergence(
        self, teacher: Float[Tensor, "rows classes"], student: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        """`skewed_forward_kl` with this share."""
        return skewed_forward_kl(teacher, student, skew=self.skew)


class SkewedReverseKLConfig(DistillationConfig):
    """KL(student || (1 - a) teacher + a student)."""

    kind: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Share a of the student in the mixture."""

    @property
    def kernel(self) -> tuple[str, float]:
        """Its name in `kernels.divergences`."""
        return "skewed_reverse_kl", self.skew

    def divergence(
        self, teacher: Float[Tensor, "rows classes"], student: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        """`skewed_reverse_kl` with this share."""
        return skewed_reverse_kl(teacher, student, skew=self.skew)
