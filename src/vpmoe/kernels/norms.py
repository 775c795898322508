"""RMSNorm on one GPU with the residual stream around it: one pass forward, one backward.

Forward, the update that a layer adds to the stream is added on the way. Backward, the gradients of
the stream and of every reader of the normed states meet in one kernel, which also sums those of the
gain and of the update's bias: per program first, then over programs, in a fixed order.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@torch.library.custom_op("vpmoe::add_norm", mutates_args=(), device_types="cuda")
def add_norm_op(
    stream: Tensor, update: Tensor | None, bias: Tensor | None, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The stream with its update, empty if there is none, and its normed states."""
    from vpmoe.kernels import norm_passes

    outs = _empty_states(stream, update)
    norm_passes.forward(stream, update, bias, gain, eps, outs)
    return outs


def _empty_states(stream: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
    out = stream.new_empty(0) if update is None else stream.new_empty(stream.shape)
    return out, stream.new_empty(stream.shape)


@add_norm_op.register_fake
def _(stream, update, bias, gain, eps):
    del bias, gain, eps
    return _empty_states(stream, update)


@torch.library.custom_op("vpmoe::add_norm_backward", mutates_args=(), device_types="cuda")
def add_norm_backward_op(
    stream: Tensor,
    gain: Tensor,
    d_stream: Tensor,
    d_normed: list[Tensor],
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the stream, and of gain and bias behind each other."""
    from vpmoe.kernels import norm_passes

    outs = _empty_sums(stream, gain, has_bias)
    norm_passes.backward(stream, gain, d_stream, d_normed, eps, outs)
    return outs


def _empty_sums(stream: Tensor, gain: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the stream, and of gain and bias behind each other."""
    return stream.new_empty(stream.shape), gain.new_empty(gain.numel() * (1 + has_bias))


@add_norm_backward_op.register_fake
def _(stream, gain, d_stream, d_normed, has_bias, eps):
    del d_stream, d_normed, eps
    return _empty_sums(stream, gain, has_bias)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream, update, bias, gain, eps, readers):
        out, normed = add_norm_op(stream, update, bias, gain, eps)
        if update is None:
            out = stream.view_as(stream)
        ctx.has_update, ctx.has_bias, ctx.eps = update is not None, bias is not None, eps
        ctx.save_for_backward(out, gain)
        # Readers of their own get gradients of their own: nothing adds them up outside.
        return out, normed, *(normed.view_as(normed) for _ in range(readers - 1))

    @staticmethod
    def backward(ctx: Any, d_stream, *d_normed: Tensor):
        stream, gain = ctx.saved_tensors
        d_out, small = add_norm_backward_op(
            stream, gain, d_stream, list(d_normed), ctx.has_bias, ctx.eps
        )
        d_gain = small[: gain.numel()]
        d_bias = small[gain.numel() :] if ctx.has_bias else None
        return d_out, d_out if ctx.has_update else None, d_bias, d_gain, None, None


def add_norm(
    stream: Float[Tensor, "*batch dim"],
    update: Float[Tensor, "*batch dim"] | None,
    bias: Float[Tensor, " dim"] | None,
    gain: Float[Tensor, " dim"],
    *,
    eps: float,
    readers: int = 1,
) -> tuple[Tensor, ...]:
    """The stream with an update and its bias, and its normed states once per reader.

    The copies share memory. Their gradients are added inside the kernel of the backward pass, but
    for copies that leave one compiled region: the compiler makes one of those.

    Args:
        stream: Residual stream, bf16.
        update: What is added to it, without its bias, or None.
        bias: Of the update, bf16, or None.
        gain: The norm's gain, bf16.
        eps: The norm's epsilon.
        readers: 1 to 3.

    References:
        Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), arXiv:1910.07467.
    """
    return _AddNorm.apply(stream, update, bias, gain, eps, readers)  # pyright: ignore
