"""Tensor-product attention: queries, keys and values as low-rank products per token."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from vpmoe.config import Config
from vpmoe.models.attention.base import Attention, AttentionShape, Projection, QueriesKeysValues
from vpmoe.models.mlp import Linear
from vpmoe.models.positions import GrapeMConfig, PositionConfig


class TpaConfig(Config):
    """Each token's heads are a small mixture of a few shared vectors."""

    kind: Literal["tpa"] = "tpa"
    rank: int = Field(default=2, gt=0)
    """Vectors that a token's key heads, and its value heads, are mixed from."""
    q_rank: int = Field(default=4, gt=0)
    """Vectors that a token's query heads are mixed from."""
    position: PositionConfig = GrapeMConfig()
    """How the layer sees order."""
    window_size: int | None = Field(default=128, gt=0)
    """Keys a query sees, itself included; absent for the whole document."""

    def build(self, shape: AttentionShape) -> Attention:
        """The layer's module."""
        return Tpa(shape, rank=self.rank, q_rank=self.q_rank)


def contract(
    mixture: Float[Tensor, "batch seq heads_rank"],
    vectors: Float[Tensor, "batch seq rank_dim"],
    *,
    rank: int,
) -> Float[Tensor, "batch seq heads dim"]:
    """Heads as products of a token's mixture and vectors, divided by the rank.

    Args:
        mixture: One coefficient per head and rank, heads outermost.
        vectors: One vector per rank, ranks outermost; shared by all heads.
        rank: How many vectors there are.

    References:
        Zhang et al., "Tensor Product Attention Is All You Need" (2025), arXiv:2501.06425.
        Difference: bias, QK-norm and rotation come after the product, not on its factors.
    """
    heads = mixture.unflatten(-1, (-1, rank))  # (B, T, N, R)
    of_rank = vectors.unflatten(-1, (rank, -1))  # (B, T, R, H)
    return (heads @ of_rank) / rank


class Tpa(Attention):
    """Heads contracted from factors; the attention that follows is an ordinary grouped one.

    The mixtures have biases: with constant mixtures grouped-query attention is a special case, so a
    trained layer can be converted without changing what it computes.

    References:
        Zhang et al., "Tensor Product Attention Is All You Need" (2025), arXiv:2501.06425.
    """

    def __init__(self, shape: AttentionShape, *, rank: int, q_rank: int) -> None:
        super().__init__(shape)
        self.rank, self.q_rank = rank, q_rank
        dim, heads, kv_heads = shape.hidden_size, shape.num_heads, shape.num_kv_heads
        self.q_a = Linear(dim, heads * q_rank, bias=shape.bias)
        self.k_a = Linear(dim, kv_heads * rank, bias=shape.bias)
        self.v_a = Linear(dim, kv_heads * rank, bias=shape.bias)
        self.q_b = Linear(dim, q_rank * shape.head_dim, bias=False)
        self.k_b = Linear(dim, rank * shape.head_dim, bias=False)
        self.v_b = Linear(dim, rank * shape.head_dim, bias=False)
        self.q_bias = self.k_bias = self.v_bias = None
        if shape.bias:
            self.q_bias = nn.Parameter(torch.zeros(heads * shape.head_dim))
            self.k_bias = nn.Parameter(torch.zeros(kv_heads * shape.head_dim))
            self.v_bias = nn.Parameter(torch.zeros(kv_heads * shape.head_dim))

    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Where queries, keys and values come from."""
        return (
            Projection(self.q_b, self.q_bias, self.q_a, self.q_rank),
            Projection(self.k_b, self.k_bias, self.k_a, self.rank),
            Projection(self.v_b, self.v_bias, self.v_a, self.rank),
        )

    def project(self, hidden: Float[Tensor, "batch seq dim"]) -> QueriesKeysValues:
        """Queries, keys and values of each token, biases added."""
        queries = contract(self.q_a(hidden), self.q_b(hidden), rank=self.q_rank)
        keys = contract(self.k_a(hidden), self.k_b(hidden), rank=self.rank)
        values = contract(self.v_a(hidden), self.v_b(hidden), rank=self.rank)
        if self.q_bias is not None and self.k_bias is not None and self.v_bias is not None:
            queries = queries + self.q_bias.view(queries.shape[2:])
            keys = keys + self.k_bias.view(keys.shape[2:])
            values = values + self.v_bias.view(values.shape[2:])
        return queries, keys, values
