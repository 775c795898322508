"""What losses on a teacher's distribution share: where it comes from, temperature, label mix."""

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import LossInputs
from vpmoe.losses.chunked import RowFunction
from vpmoe.losses.exact import EXACT_NEEDS, ExactForm, exact_row_function
from vpmoe.losses.rows import RowLoss
from vpmoe.losses.tails import stored_tail, tempered
from vpmoe.losses.targets import TARGET_NEEDS, StudentScores, TargetLoss


class DistillationConfig(Config):
    """The keys of every loss that compares distributions; a kind adds its divergence."""

    against: Literal["targets", "hidden"] = "targets"
    """What of the teacher is read: stored entries with a tail, or its states, which say all."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits; the divergence is multiplied by its square."""
    label_weight: float = Field(default=0.0, ge=0, lt=1)
    """Share of cross-entropy on the label in the loss; the divergence has the rest."""
    chunk_rows: int = Field(default=CHUNK_ROWS, gt=0)
    """Rows whose logits are held together; any value gives the same result."""

    @property
    def needs(self) -> frozenset[str]:
        """What a batch must bring."""
        return EXACT_NEEDS if self.against == "hidden" else TARGET_NEEDS

    @property
    def kernel(self) -> tuple[str, float] | None:
        """Kind and share by which GPU code knows the divergence; None if it does not."""
        return None

    @abstractmethod
    def divergence(
        self, teacher: Float[Tensor, "rows classes"], student: Float[Tensor, "rows classes"]
    ) -> Float[Tensor, " rows"]:
        """Distance of two distributions given by log-probs, differentiable in the student's."""

    def between_targets(
        self,
        teacher: Float[Tensor, "rows entries"],
        teacher_tail: Float[Tensor, " rows"],
        student: Float[Tensor, "rows entries"],
        student_tail: Float[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """The divergence where only some entries are known; all other ids are one more class."""
        return self.divergence(
            torch.cat([teacher, teacher_tail[:, None]], dim=1),
            torch.cat([student, student_tail[:, None]], dim=1),
        )

    def build(self) -> RowLoss:
        """The loss."""
        return ExactDistillation(self) if self.against == "hidden" else StoredDistillation(self)


class StoredDistillation(TargetLoss):
    """A divergence from a teacher's stored entries, mixed with cross-entropy on the label.

    (1 - w) T^2 D(t_T, p_T) - w ln p(y), both from one look at the logits.

    Args:
        config: The divergence and what is mixed into it.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), arXiv:1503.02531.
        Difference: entries and a tail in place of the whole distribution.
    """

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(temperature=config.temperature, chunk_rows=config.chunk_rows)
        self.config = config

    def row_function(self, rows: LossInputs) -> RowFunction:
        """What is done with a chunk of logits, given all rows at the loss's temperature."""
        assert rows.target_logprobs is not None  # `needs` was checked
        entries, tail = tempered(
            rows.target_logprobs,
            stored_tail(rows.target_logprobs, rows.target_tail),
            temperature=self.config.temperature,
            vocab=rows.head_weight.shape[0],
        )
        return super().row_function(replace(rows, target_logprobs=entries, target_tail=tail))

    def row_losses(self, student: StudentScores, rows: LossInputs) -> Float[Tensor, " rows"]:
        """Divergence and cross-entropy of each row, weighted."""
        values = self.divergences(student, rows)
        share, scale = self.config.label_weight, self.config.temperature**2
        if share or scale != 1:
            values = (1 - share) * scale * values
        return values - share * student.label if share else values

    def divergences(self, student: StudentScores, rows: LossInputs) -> Float[Tensor, " rows"]:
        """The divergence of each row."""
        assert rows.target_logprobs is not None and rows.target_tail is not None
        return self.config.between_targets(
            rows.target_logprobs, rows.target_tail, student.entries, student.tail
        )


class ExactDistillation(RowLoss):
    """The same divergence over the whole vocabulary, from the teacher's states and head.

    Args:
        config: The divergence and what is mixed into it.

    References:
        own; "Whole distributions" in docs/losses.md.
    """

    needs = EXACT_NEEDS

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__(chunk_rows=config.chunk_rows)
        self.form = ExactForm(
            config.divergence, config.kernel, config.temperature, config.label_weight
        )

    def row_function(self, rows: LossInputs) -> RowFunction:
        """What is done with a chunk of logits."""
        return exact_row_function(rows, self.form)
