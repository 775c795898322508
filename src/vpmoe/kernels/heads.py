"""Queries, keys and values on one GPU, from a layer's projections to what attention takes.

One pass forward and one backward over everything in between: tensor-product contraction, biases,
QK-norm, rotation, value residual. A program holds some tokens and goes through their heads one by
one; nothing but the results is written. Sums over tokens (biases, gains, lambda, frequencies) are
written once per program and added up in a fixed order by a second kernel, so that a run repeats.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Role(NamedTuple):
    """Where one of queries, keys and values lies in a token's row and among the small weights.

    Attributes:
        heads: How many there are.
        rank: Vectors that they are mixed from; 0 where each head has its own.
        vectors: First column of the vectors.
        mixture: First column of the mixtures.
        bias: First number of the bias.
        mixture_bias: First number of the mixtures' bias.
        gain: First number of the norm's gain.
    """

    heads: int
    rank: int
    vectors: int
    mixture: int
    bias: int
    mixture_bias: int
    gain: int


class HeadShape(NamedTuple):
    """Sizes of a layer's heads.

    A token's row holds the vectors of queries, keys and values, then their mixtures; the small
    weights are their biases, the mixtures' biases, and the gains of queries and keys.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        dim: Numbers per head, a power of two.
        q_rank: Vectors that query heads are mixed from; 0 where each head has its own.
        rank: The same of keys and of values.
        has_norm: Queries and keys are normalised.
    """

    heads: int
    kv_heads: int
    dim: int
    q_rank: int
    rank: int
    has_norm: bool

    @property
    def roles(self) -> tuple[Role, Role, Role]:
        """Queries, keys, values."""
        heads = self.heads, self.kv_heads, self.kv_heads
        ranks = self.q_rank, self.rank, self.rank
        found = []
        vectors = bias = 0
        mixture = sum((r or n) * self.dim for n, r in zip(heads, ranks, strict=True))
        mixture_bias = sum(heads) * self.dim
        gain = mixture_bias + sum(n * r for n, r in zip(heads, ranks, strict=True))
        for n, r in zip(heads, ranks, strict=True):
            found.append(Role(n, r, vectors, mixture, bias, mixture_bias, gain))
            vectors, bias = vectors + (r or n) * self.dim, bias + n * self.dim
            mixture, mixture_bias = mixture + n * r, mixture_bias + n * r
            gain += self.dim
        return found[0], found[1], found[2]

    @property
    def row(self) -> int:
        """Columns of a token's row: those used, and zeros up to the next 64."""
        last = self.roles[2]
        return -(-(last.mixture + last.heads * last.rank) // 64) * 64

    @property
    def small(self) -> int:
        """Numbers among the small weights."""
        return self.roles[2].gain


@torch.library.custom_op("vpmoe::heads", mutates_args=(), device_types="cuda")
def heads_op(
    rows: Tensor,
    small: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    positions: Tensor | None,
    frequencies: Tensor | None,
    first: Tensor | None,
    mixing: Tensor | None,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    from vpmoe.kernels import head_passes

    del positions, frequencies
    outs = _empty_heads(rows, HeadShape(*shape))
    head_passes.forward(
        rows, small, (cosines, sines), (first, mixing), HeadShape(*shape), eps, outs
    )
    return outs


def _empty_heads(rows: Tensor, shape: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq = rows.shape[:2]
    q = rows.new_empty(batch, seq, shape.heads, shape.dim)
    k = rows.new_empty(batch, seq, shape.kv_heads, shape.dim)
    return q, k, torch.empty_like(k)


@heads_op.register_fake
def _(rows, small, cosines, sines, positions, frequencies, first, mixing, shape, eps):
    del small, cosines, sines, positions, frequencies, first, mixing, eps
    return _empty_heads(rows, HeadShape(*shape))


@torch.library.custom_op("vpmoe::heads_backward", mutates_args=(), device_types="cuda")
def heads_backward_op(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    rows: Tensor,
    small: Tensor,
    cosines: Tensor | None,
    sines: Tensor | None,
    positions: Tensor | None,
    first: Tensor | None,
    mixing: Tensor | None,
    shape: list[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows, small weights, frequencies and lambda, first values."""
    from vpmoe.kernels import head_passes

    sizes = HeadShape(*shape)
    outs = _empty_gradients(rows, small, first, sizes)
    head_passes.backward(
        (dq, dk, dv), rows, small, (cosines, sines, positions), (first, mixing), sizes, eps, outs
    )
    return outs


def _empty_gradients(
    rows: Tensor, small: Tensor, first: Tensor | None, shape: HeadShape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows, small weights, frequencies and lambda, first values."""
    wide = rows.new_empty(shape.dim // 2 + 1, dtype=torch.float32)
    d_first = rows.new_empty(0) if first is None else torch.empty_like(first)
    return torch.empty_like(rows), torch.empty_like(small), wide, d_first


@heads_backward_op.register_fake
def _(dq, dk, dv, rows, small, cosines, sines, positions, first, mixing, shape, eps):
    del dq, dk, dv, cosines, sines, positions, mixing, eps
    return _empty_gradients(rows, small, first, HeadShape(*shape))


def _keep(ctx, inputs, output):
    del output
    *tensors, ctx.shape, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dq, dk, dv):
    rows, small, cosines, sines, positions, frequencies, first, mixing = ctx.saved_tensors
    d_rows, d_small, d_wide, d_first = heads_backward_op(
        dq, dk, dv, rows, small, cosines, sines, positions, first, mixing, ctx.shape, ctx.eps
    )
    d_frequencies = None if frequencies is None else d_wide[:-1]
    d_mixing = None if mixing is None else d_wide[-1:]
    d_first = None if first is None else d_first
    return d_rows, d_small, None, None, None, d_frequencies, d_first, d_mixing, None, None


heads_op.register_autograd(_backward, setup_context=_keep)


class Turns(NamedTuple):
    """What queries and keys are turned by; the gradient goes to the frequencies.

    Attributes:
        cosines: Of each token's angles, float32.
        sines: The same.
        positions: Each token's place in its document.
        frequencies: Radians per token, float32.
    """

    cosines: Float[Tensor, "batch seq half"]
    sines: Float[Tensor, "batch seq half"]
    positions: Int[Tensor, "batch seq"]
    frequencies: Float[Tensor, " half"]


def heads(
    rows: Float[Tensor, "batch seq row"],
    small: Float[Tensor, " small"],
    rotation: Turns | None,
    value_residual: tuple[Float[Tensor, "batch seq kv_heads dim"], Float[Tensor, "1"]] | None,
    *,
    shape: HeadShape,
    eps: float,
) -> tuple[
    Float[Tensor, "batch seq heads dim"],
    Float[Tensor, "batch seq kv_heads dim"],
    Float[Tensor, "batch seq kv_heads dim"],
]:
    """Queries, keys and values as attention takes them; may be called in a compiled region.

    Args:
        rows: Projections of each token, without biases, in the order of `HeadShape`.
        small: All biases and gains, in the order of `HeadShape`.
        rotation: None for none.
        value_residual: First layer's values and lambda, float32; None where values stay.
        shape: Sizes.
        eps: Of the norms.

    References:
        Zhang et al., "Tensor Product Attention Is All You Need" (2025), arXiv:2501.06425; Zhang et
        al., "Group Representational Position Encoding" (2025), arXiv:2512.07805; Zhou et al.,
        "Value Residual Learning" (2024), arXiv:2410.17897. Difference: one kernel, exact gradients
        of everything, frequencies included.
    """
    cosines, sines, positions, frequencies = rotation or (None, None, None, None)
    first, mixing = value_residual or (None, None)
    tensors = rows, small, cosines, sines, positions, frequencies, first, mixing
    return heads_op(*tensors, list(shape), eps)
