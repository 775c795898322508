"""Random-sampling KD: cross-entropy against a few ids drawn from the teacher, right on average."""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import LossInputs
from vpmoe.losses.targets import TARGET_NEEDS, StudentScores, TargetLoss


class RandomSamplingConfig(Config):
    """Drawn ids and their weights stand for the teacher's whole distribution."""

    kind: Literal["random_sampling"] = "random_sampling"
    label_weight: float = Field(default=0.0, ge=0, lt=1)
    """Share of cross-entropy on the label in the loss; the drawn ids have the rest."""
    chunk_rows: int = Field(default=CHUNK_ROWS, gt=0)
    """Rows whose logits are held together; any value gives the same result."""

    needs: ClassVar[frozenset[str]] = TARGET_NEEDS

    def build(self) -> "RandomSampling":
        """The loss."""
        return RandomSampling(self)


class RandomSampling(TargetLoss):
    r""":math:`-\sum_i w_i \ln p_i` over drawn ids, mixed with cross-entropy on the label.

    Gradient by the logits: p - sum w e for weights that add up to one. Where the expectation of
    the weights is the teacher's distribution t, that of the gradient is p - t, the full forward
    KL's. The value is a cross-entropy: the teacher's own entropy, at least, is part of it.

    Args:
        config: What is mixed in.

    References:
        Anshumann et al., "Sparse Logit Sampling" (ACL 2025), arXiv:2503.16870. Difference: drawn
        ids come from a store, and unlike the paper's they need not be renormalised.
    """

    drawn = True

    def __init__(self, config: RandomSamplingConfig) -> None:
        super().__init__(chunk_rows=config.chunk_rows)
        self.label_weight = config.label_weight

    def row_losses(self, student: StudentScores, rows: LossInputs) -> Float[Tensor, " rows"]:
        """Weighted log-probs of each row's drawn ids, and of its label."""
        assert rows.target_logprobs is not None  # `needs` was checked
        live = rows.target_logprobs > -torch.inf
        drawn = rows.target_logprobs.exp() * torch.where(live, student.entries, 0.0)
        values = -(1 - self.label_weight) * drawn.sum(dim=1)
        return values - self.label_weight * student.label if self.label_weight else values
