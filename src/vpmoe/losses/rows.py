"""What all losses on rows of logits share: from rows to sums."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import LossInputs, LossOutput, StatelessLoss, output_of
from vpmoe.losses.chunked import (
    STUDENT_LOGPROBS,
    Direction,
    RowFunction,
    chunked_loss,
    label_metrics,
    label_row_function,
)


class RowLoss(StatelessLoss, ABC):
    """A loss with a row function of its own.

    Args:
        chunk_rows: Rows whose logits are held together; any value gives the same result.
    """

    def __init__(self, *, chunk_rows: int = CHUNK_ROWS) -> None:
        self.chunk_rows = chunk_rows

    @abstractmethod
    def row_function(self, rows: LossInputs) -> RowFunction:
        """What is done with a chunk of the rows' logits."""

    def parts(self, rows: LossInputs) -> tuple[RowFunction, Direction | None]:
        """The row function, and the direction that its gradients may have besides."""
        return self.row_function(rows), None

    def row_metrics(
        self,
        student_logprobs: Float[Tensor, " rows"],
        extras: dict[str, Tensor],
        rows: LossInputs,
    ) -> dict[str, Tensor]:
        """Numbers of each row to be summed per span: the row function's extras as they are."""
        del student_logprobs, rows
        return extras

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        inputs.require(self.needs)
        rows = inputs.trained()
        row_function, direction = self.parts(rows)
        result = chunked_loss(
            rows.hidden,
            rows.head_weight,
            rows.coefficients(span_scales),
            row_function,
            chunk_rows=self.chunk_rows,
            direction=direction,
        )
        extras = dict(result.extras)
        logprobs = extras.pop(STUDENT_LOGPROBS)
        metrics = label_metrics(logprobs, rows) | self.row_metrics(logprobs, extras, rows)
        return output_of(result.total, result.values, metrics, rows)


class LabelLoss(RowLoss, ABC):
    """A loss on the label's log-probability: subclasses write `row_losses`, all else is here."""

    @abstractmethod
    def row_losses(
        self, student_logprobs: Float[Tensor, " rows"], rows: LossInputs
    ) -> Float[Tensor, " rows"]:
        """Loss of each row, differentiable in `student_logprobs`; no row depends on another."""

    def row_function(self, rows: LossInputs) -> RowFunction:
        """What is done with a chunk of logits."""
        return label_row_function(rows, self.row_losses)
