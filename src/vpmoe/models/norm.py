"""RMS normalisation with statistics in float32 or wider."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def widened(values: Tensor) -> Tensor:
    """The same values in float32, or as they are where they are wider.

    References:
        own.
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rms_norm(
    values: Float[Tensor, "*batch dim"], gamma: Float[Tensor, " dim"], *, eps: float
) -> Float[Tensor, "*batch dim"]:
    """Values over their root mean square, times gamma.

    Statistics and the product with gamma are float32 or wider; the result is cast back last.

    References:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467.
    """
    wide = widened(values)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * gamma).to(values.dtype)


def add_norm_reference(
    norm: "RmsNorm",
    stream: Float[Tensor, "batch seq dim"],
    inputs: Float[Tensor, "batch seq width"] | None = None,
    projection: nn.Linear | None = None,
    *,
    readers: int = 1,
) -> tuple[Tensor, ...]:
    """The residual stream with what a layer adds to it, and its normed states for each reader.

    Args:
        norm: Of the stream.
        stream: The stream so far.
        inputs: What `projection` maps to the update; None for no update.
        projection: The layer's last map.
        readers: How often the normed states are returned; a kernel may add up their gradients.

    References:
        own; see `rms_norm`.
    """
    if inputs is not None and projection is not None:
        stream = stream + projection(inputs)
    return stream, *[norm(stream)] * readers


class RmsNorm(nn.Module):
    """RMS normalisation over the last axis with a learned gain `gamma`."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, values: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalised values."""
        return rms_norm(values, self.gamma, eps=self.eps)
