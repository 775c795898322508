"""Feed-forward networks: activations as pure functions, and the dense layer's module."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["relu2", "swiglu", "clamped_swiglu"]
GATED: frozenset[Activation] = frozenset({"swiglu", "clamped_swiglu"})

GPT_OSS_ALPHA = 1.702  # gain inside GPT-OSS's sigmoid, the usual GELU approximation
GPT_OSS_LIMIT = 7.0  # where GPT-OSS clamps the gate (above) and the up projection (both sides)


class Linear(nn.Linear):
    """A linear map whose values come from `init.init_weights` only."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


def relu2(up: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Squared ReLU: the square is taken after the ReLU.

    References:
        So et al., "Primer" (2021), arXiv:2109.08668.
    """
    return F.relu(up).square()


def swiglu(
    gate: Float[Tensor, "*rows width"], up: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """Gated SiLU: silu(gate) * up.

    References:
        Shazeer, "GLU Variants Improve Transformer" (2020), arXiv:2002.05202.
    """
    return F.silu(gate) * up


def clamped_swiglu(
    gate: Float[Tensor, "*rows width"], up: Float[Tensor, "*rows width"]
) -> Float[Tensor, "*rows width"]:
    """GPT-OSS's gated unit: (up + 1) * gate * sigmoid(1.702 gate), both sides clamped.

    The gate is clamped above only, the up projection on both sides; a clamped side has no gradient.

    References:
        OpenAI, "gpt-oss model card" (2025), arXiv:2508.10925. Difference: gate and up projections
        are separate matrices here, not interleaved columns of one.
    """
    gate = gate.clamp(max=GPT_OSS_LIMIT)
    up = up.clamp(min=-GPT_OSS_LIMIT, max=GPT_OSS_LIMIT)
    return (up + 1) * gate * torch.sigmoid(GPT_OSS_ALPHA * gate)


def activate(
    up: Float[Tensor, "*rows width"],
    gate: Float[Tensor, "*rows width"] | None,
    *,
    activation: Activation,
) -> Float[Tensor, "*rows width"]:
    """Hidden units of a feed-forward network from its projections.

    References:
        own; see the functions it chooses from.
    """
    if gate is None:
        return relu2(up)
    return swiglu(gate, up) if activation == "swiglu" else clamped_swiglu(gate, up)


class Mlp(nn.Module):
    """One feed-forward network for every token: the dense layers and the shared expert."""

    def __init__(self, hidden_size: int, width: int, *, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = Linear(hidden_size, width, bias=bias) if activation in GATED else None
        self.up = Linear(hidden_size, width, bias=bias)
        self.down = Linear(width, hidden_size, bias=bias)

    def forward(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """What the network adds to the residual stream."""
        gate = None if self.gate is None else self.gate(hidden)
        return self.down(activate(self.up(hidden), gate, activation=self.activation))
