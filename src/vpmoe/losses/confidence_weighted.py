"""Cross-entropy weighted by the teacher's confidence in each label: the objective of stage 2."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from vpmoe.config import Config
from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import TOKENS, LossInputs
from vpmoe.losses.rows import LabelLoss
from vpmoe.spans import NUM_SPANS


class ConfidenceWeightedConfig(Config):
    """Cross-entropy, louder where the teacher finds the label likelier than usual."""

    kind: Literal["confidence_weighted"] = "confidence_weighted"
    weight_temperature: float = Field(default=1.0, gt=0)
    """Divides the teacher's log-probability before it becomes a weight; large = plain CE."""
    min_weight: float = Field(default=0.25, gt=0)
    """Smallest weight of a token."""
    max_weight: float = Field(default=4.0, gt=0)
    """Largest weight of a token."""
    center_decay: float = Field(default=0.99, ge=0, lt=1)
    """Share of the running mean of the teacher's log-probability that each step keeps."""
    chunk_rows: int = Field(default=CHUNK_ROWS, gt=0)
    """Rows whose logits are held together; any value gives the same result."""

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logprobs"})

    @model_validator(mode="after")
    def _ordered(self) -> "ConfidenceWeightedConfig":
        if self.min_weight > self.max_weight:
            raise ValueError(
                f"min_weight {self.min_weight} is above max_weight {self.max_weight}; swap them"
            )
        return self

    def build(self) -> LabelLoss:
        """The loss, its running mean unset."""
        return ConfidenceWeighted(self)


def confidence_weights(
    teacher_logprobs: Float[Tensor, " rows"],
    centers: Float[Tensor, " rows"],
    *,
    temperature: float = 1.0,
    min_weight: float = 0.25,
    max_weight: float = 4.0,
) -> Float[Tensor, " rows"]:
    r"""Weight of each label, 1 where the teacher is as sure as it usually is.

    :math:`w = \exp(\mathrm{clamp}((\log q - m) / \tau, \ln lo, \ln hi))`. The weights do not
    average to 1 exactly; their mean is logged and never divided by.

    Args:
        teacher_logprobs: log q of each label, nats.
        centers: Usual value m of log q for the label's span; NaN = not known yet, weight 1.
        temperature: Divides the distance from the center.
        min_weight: Lower clip.
        max_weight: Upper clip.

    References:
        own; "Confidence-weighted cross-entropy" in docs/losses.md.

    Example:
        >>> from torch import tensor
        >>> w = confidence_weights(tensor([-0.1, -2.0, -5.0]), tensor([-1.0, -1.0, -1.0]))
        >>> [round(x, 6) for x in w.tolist()]
        [2.459603, 0.367879, 0.25]
    """
    surplus = ((teacher_logprobs - centers) / temperature).nan_to_num(nan=0.0)
    weights = surplus.clamp(math.log(min_weight), math.log(max_weight)).exp()
    return torch.where(centers.isnan(), 1.0, weights)


class ConfidenceWeighted(LabelLoss):
    """Cross-entropy times `confidence_weights`, with the running mean that centers them.

    The mean m of each span follows the teacher's mean log-probability over global batches:
    m <- d m + (1 - d) mean, after the optimizer step. The first batch that holds a span sets its m
    to that batch's mean; until then the span's labels weigh 1, so that no weight ever depends on
    how a batch was cut into micro-batches.

    Args:
        config: Clips, temperature and decay.

    References:
        own; "Confidence-weighted cross-entropy" in docs/losses.md.
    """

    needs = ConfidenceWeightedConfig.needs

    def __init__(self, config: ConfidenceWeightedConfig) -> None:
        super().__init__(chunk_rows=config.chunk_rows)
        self.config = config
        self.centers = torch.full((NUM_SPANS,), torch.nan)  # (S,) nats; NaN until seen

    def weights(self, rows: LossInputs) -> Float[Tensor, " rows"]:
        """Weight of each row's label."""
        assert rows.teacher_logprobs is not None  # `needs` was checked
        return confidence_weights(
            rows.teacher_logprobs,
            self._centers_of(rows.span_ids),
            temperature=self.config.weight_temperature,
            min_weight=self.config.min_weight,
            max_weight=self.config.max_weight,
        )

    def _centers_of(self, span_ids: UInt8[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        return self.centers.to(span_ids.device)[span_ids.long()]

    def row_losses(
        self, student_logprobs: Float[Tensor, " rows"], rows: LossInputs
    ) -> Float[Tensor, " rows"]:
        """Weight times minus log p of each label."""
        return -self.weights(rows) * student_logprobs

    def row_metrics(
        self,
        student_logprobs: Float[Tensor, " rows"],
        extras: dict[str, Tensor],
        rows: LossInputs,
    ) -> dict[str, Tensor]:
        """The weights, so that their mean is seen."""
        return {"weight": self.weights(rows)}

    def after_step(self, sums: Mapping[str, Tensor]) -> None:
        """Move the centers towards this global batch's mean of the teacher's log-probability."""
        counts = sums[TOKENS].cpu()
        means = (sums["teacher_logprob"].cpu() / counts.clamp_min(1)).float()
        decay = self.config.center_decay
        moved = decay * self.centers + (1 - decay) * means
        moved = torch.where(self.centers.isnan(), means, moved)
        self.centers = torch.where(counts > 0, moved, self.centers)

    def state_dict(self) -> dict[str, Tensor]:
        """The centers."""
        return {"centers": self.centers.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back the centers."""
        self.centers = state["centers"].clone().cpu()
