"""KL(student || teacher) on given text: the student learns to stay where the teacher is."""

import math
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.losses.distillation import DistillationConfig
from vpmoe.losses.divergences import reverse_kl


class ReverseKLConfig(DistillationConfig):
    """The student gives up what the teacher finds unlikely."""

    kind: Literal["reverse_kl"] = "reverse_kl"
    least_tail: float = Field(default=1e-6, gt=0, lt=1)
    """Smallest teacher mass without entry: a store's tail of 0 would make the loss infinite."""

    @property
    def kernel(self) -> tuple[str, float]:
        """Its name in `kernels.divergences`."""
        return "reverse_kl", 0.0

    def divergence(
        self, teacher: Float[Tensor, "rows classes"], student: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        """KL(student || teacher)."""
        return reverse_kl(teacher, student)

    def between_targets(
        self,
        teacher: Float[Tensor, "rows entries"],
        teacher_tail: Float[Tensor, " rows"],
        student: Float[Tensor, "rows entries"],
        student_tail: Float[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """The same over entries and a tail that is never empty."""
        tail = teacher_tail.clamp_min(math.log(self.least_tail))
        return super().between_targets(teacher, tail, student, student_tail)
