"""Span-normalised cross-entropy: the objective of stage 1, and the anchor of stage 3."""

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import LossInputs
from vpmoe.losses.rows import LabelLoss


class CrossEntropyConfig(Config):
    """Negative log-likelihood of the labels."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    chunk_rows: int = Field(default=CHUNK_ROWS, gt=0)
    """Rows whose logits are held together; any value gives the same result."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def build(self) -> LabelLoss:
        """The loss."""
        return CrossEntropy(chunk_rows=self.chunk_rows)


class CrossEntropy(LabelLoss):
    """Negative log-likelihood of the labels, in nats."""

    needs = CrossEntropyConfig.needs

    def row_losses(
        self, student_logprobs: Float[Tensor, " rows"], rows: LossInputs
    ) -> Float[Tensor, " rows"]:
        """Minus log p of each label."""
        return -student_logprobs
