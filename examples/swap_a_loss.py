"""Another loss: focal cross-entropy, which cares less about labels that are easy already.

A loss is one file: a config with its `kind`, and what each row costs. In the package it would be in
`src/vpmoe/losses/`; the one line to add is its config in the union of `losses/__init__.py`.
"""

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.losses import LossInputs, span_means, span_scales
from vpmoe.losses.rows import LabelLoss


class FocalConfig(Config):
    """Cross-entropy times (1 - p) ** gamma."""

    kind: Literal["focal"] = "focal"
    gamma: float = Field(default=2.0, ge=0)
    """How much easy labels are discounted; 0 is plain cross-entropy."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def build(self) -> LabelLoss:
        """The loss."""
        return Focal(self.gamma)


class Focal(LabelLoss):
    """Lin et al., "Focal Loss" (2017), arXiv:1708.02002."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def row_losses(
        self, student_logprobs: Float[Tensor, " rows"], rows: LossInputs
    ) -> Float[Tensor, " rows"]:
        """Chunking, spans, counts and metrics are the base class's; this line is all there is."""
        return -((1 - student_logprobs.exp()) ** self.gamma) * student_logprobs


if __name__ == "__main__":
    torch.manual_seed(0)
    span_ids = torch.tensor([0, 1, 1, 1, 2, 2], dtype=torch.uint8)
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8)
    inputs = LossInputs(hidden, head, torch.arange(6), span_ids, span_ids > 0)
    scales = span_scales(torch.tensor([0.0, 1.0, 1.0]), span_ids.bincount(minlength=3))
    for gamma in (0.0, 2.0):
        output = FocalConfig(gamma=gamma).build()(inputs, scales)
        _, reasoning, final = span_means(output.sums)["loss"].tolist()
        print(f"gamma {gamma}: reasoning {reasoning:.4f}, final {final:.4f} nats")
    output.total.backward()
    print(f"gradient norm {hidden.grad.norm():.4f}")
