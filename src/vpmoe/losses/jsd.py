"""Generalised Jensen-Shannon divergence: between forward and reverse KL, and bounded."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.losses.distillation import DistillationConfig
from vpmoe.losses.divergences import generalized_jsd


class GeneralizedJSDConfig(DistillationConfig):
    """Both models are compared with a mixture of them."""

    kind: Literal["generalized_jsd"] = "generalized_jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Share of the teacher in the mixture; the ends are forward_kl and reverse_kl."""

    @property
    def kernel(self) -> tuple[str, float]:
        """Its name in `kernels.divergences`."""
        return "generalized_jsd", self.beta

    def divergence(
        self, teacher: Float[Tensor, "rows classes"], student: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        """`generalized_jsd` with this share."""
        return generalized_jsd(teacher, student, beta=self.beta)
