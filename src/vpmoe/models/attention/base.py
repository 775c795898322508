"""What every attention layer does around its projections, in one pinned order."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vpmoe.models.cache import LayerCache
from vpmoe.models.mlp import Linear
from vpmoe.models.norm import RmsNorm
from vpmoe.models.positions import Rotation, rotate

QueriesKeysValues = tuple[
    Float[Tensor, "batch seq heads head_dim"],
    Float[Tensor, "batch seq kv_heads head_dim"],
    Float[Tensor, "batch seq kv_heads head_dim"],
]


@dataclass(frozen=True)
class Projection:
    """Where one of queries, keys and values comes from.

    Attributes:
        vectors: Map from states to heads, or to the vectors that heads are mixed from.
        bias: Added to the heads.
        mixture: Map from states to each head's coefficients, heads outermost; None where `vectors`
            gives the heads themselves.
        rank: Vectors that heads are mixed from; 0 without mixture.
    """

    vectors: nn.Linear
    bias: Tensor | None
    mixture: nn.Linear | None = None
    rank: int = 0


def heads_reference(
    attention: "Attention",
    hidden: Float[Tensor, "batch seq dim"],
    rotation: Rotation | None,
    first_values: Float[Tensor, "batch seq kv_heads head_dim"] | None,
) -> QueriesKeysValues:
    """Queries, keys and values as attention takes them.

    Args:
        attention: The layer, with its projections, biases, norms and lambda.
        hidden: Normed states.
        rotation: What queries and keys are turned by, or None.
        first_values: The first layer's values, which layers with a lambda mix in.

    References:
        own; see `Attention`, `rotate` and `mix_values`.
    """
    queries, keys, values = attention.project(hidden)
    if attention.q_norm is not None and attention.k_norm is not None:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if rotation is not None:
        queries, keys = rotate(queries, rotation), rotate(keys, rotation)
    if attention.value_lambda is not None and first_values is not None:
        values = mix_values(values, first_values, attention.value_lambda)
    return queries, keys, values


@dataclass(frozen=True)
class AttentionShape:
    """What all attention layers of a student have in common.

    Attributes:
        is_mixed: The layer mixes its values with the first layer's (value residual).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    has_sinks: bool
    has_qk_norm: bool
    is_mixed: bool
    norm_eps: float


@dataclass(frozen=True)
class LayerView:
    """What a forward pass tells all attention layers of one kind.

    Attributes:
        scope: Which keys each query sees, as `attend` wants to know it: an `AttentionScope` for
            the reference, a table of blocks for the fused kernels.
        rotation: Cosines and sines, or None.
        slopes: Distance penalties per head, or None.
        attend: The attention function: the reference or a kernel equal to it.
        heads: What makes queries, keys and values for it: the reference or a kernel equal to it.
    """

    scope: Any
    rotation: Rotation | None
    slopes: Float[Tensor, " heads"] | None
    attend: Callable[..., Tensor]
    heads: Callable[..., QueriesKeysValues] = heads_reference


class Attention(nn.Module, ABC):
    """Projections, then bias, QK-norm, rotation, value residual, attention, output projection.

    A kind of attention provides `project`; the order of everything after it is the same for all,
    because QK-norm does not commute with rotation, nor rotation with a bias.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.num_heads * shape.head_dim
        self.o_proj = Linear(width, shape.hidden_size, bias=shape.bias)
        self.q_norm = self.k_norm = None
        if shape.has_qk_norm:
            self.q_norm = RmsNorm(shape.head_dim, eps=shape.norm_eps)
            self.k_norm = RmsNorm(shape.head_dim, eps=shape.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(shape.num_heads)) if shape.has_sinks else None
        self.value_lambda = nn.Parameter(torch.ones(1)) if shape.is_mixed else None

    @abstractmethod
    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Where queries, keys and values come from."""

    @abstractmethod
    def project(self, hidden: Float[Tensor, "batch seq dim"]) -> QueriesKeysValues:
        """Queries, keys and values of each token, biases added."""

    def gather(
        self,
        hidden: Float[Tensor, "batch seq dim"],
        view: LayerView,
        first_values: Float[Tensor, "batch seq kv_heads head_dim"] | None,
        cache: LayerCache | None = None,
    ) -> tuple[
        Float[Tensor, "batch seq width"], Float[Tensor, "batch seq kv_heads head_dim"] | None
    ]:
        """What the output projection takes, and values for later layers to mix in.

        Layers that mix in those of another have none to give.
        """
        make = heads_reference if cache is not None else view.heads
        queries, keys, values = make(self, hidden, view.rotation, first_values)
        own_values = values if self.value_lambda is None else None
        if cache is not None:
            keys, values = cache.extend(keys, values)
        gathered = view.attend(
            queries, keys, values, view.scope, sinks=self.sinks, slopes=view.slopes
        )
        return gathered.flatten(2), own_values

    def forward(
        self,
        hidden: Float[Tensor, "batch seq dim"],
        view: LayerView,
        first_values: Float[Tensor, "batch seq kv_heads head_dim"] | None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "batch seq kv_heads head_dim"] | None]:
        """What attention adds to the residual stream, and values for later layers to mix in."""
        gathered, values = self.gather(hidden, view, first_values, cache)
        return self.o_proj(gathered), values


def mix_values(
    values: Float[Tensor, "batch seq kv_heads head_dim"],
    first_values: Float[Tensor, "batch seq kv_heads head_dim"],
    value_lambda: Float[Tensor, "1"],
) -> Float[Tensor, "batch seq kv_heads head_dim"]:
    """Lambda times a layer's own values, one minus lambda times the first layer's.

    References:
        Zhou et al., "Value Residual Learning" (2024), arXiv:2410.17897. Difference: one direct
        scalar per layer, not clamped, starting at 1.
    """
    mixed = value_lambda * values + (1 - value_lambda) * first_values
    return mixed.to(values.dtype)
