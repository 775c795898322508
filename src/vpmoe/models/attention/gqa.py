"""Grouped-query attention."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.models.attention.base import Attention, AttentionShape, Projection, QueriesKeysValues
from vpmoe.models.mlp import Linear
from vpmoe.models.positions import GrapeAConfig, PositionConfig


class GqaConfig(Config):
    """Ordinary projections, with several query heads per key head."""

    kind: Literal["gqa"] = "gqa"
    position: PositionConfig = GrapeAConfig()
    """How the layer sees order."""
    window_size: int | None = Field(default=None, gt=0)
    """Keys a query sees, itself included; absent for the whole document."""

    def build(self, shape: AttentionShape) -> Attention:
        """The layer's module."""
        return Gqa(shape)


class Gqa(Attention):
    """Queries, keys and values by one linear map each.

    References:
        Ainslie et al., "GQA" (2023), arXiv:2305.13245.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__(shape)
        dim, bias = shape.hidden_size, shape.bias
        self.q_proj = Linear(dim, shape.num_heads * shape.head_dim, bias=bias)
        self.k_proj = Linear(dim, shape.num_kv_heads * shape.head_dim, bias=bias)
        self.v_proj = Linear(dim, shape.num_kv_heads * shape.head_dim, bias=bias)

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Where queries, keys and values come from."""
        return (
            Projection(self.q_proj, self.q_proj.bias),
            Projection(self.k_proj, self.k_proj.bias),
            Projection(self.v_proj, self.v_proj.bias),
        )

    def project(self, hidden: Float[Tensor, "batch seq dim"]) -> QueriesKeysValues:
        """Queries, keys and values of each token, biases added."""
        per_head = (-1, self.shape.head_dim)
        return (
            self.q_proj(hidden).unflatten(-1, per_head),
            self.k_proj(hidden).unflatten(-1, per_head),
            self.v_proj(hidden).unflatten(-1, per_head),
        )
