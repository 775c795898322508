"""Log-probs in a byte each: finer near the likeliest, and adding up to what is known."""

import torch
from jaxtyping import Bool, Float, Float16, Float32, Int64, UInt8
from torch import Tensor

from vpmoe.teachers.codecs.base import damaged


def to_bytes(values: Float[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """float16 as bytes; what is beyond its ends is clipped to them, -inf stays.

    References:
        own.
    """
    ends = torch.finfo(torch.float16)
    clipped = torch.where(torch.isinf(values), values, values.clamp(ends.min, ends.max))
    return clipped.to(torch.float16).reshape(-1).view(torch.uint8)


def from_bytes(data: UInt8[Tensor, " bytes"]) -> Float32[Tensor, " values"]:
    """float16 values of the bytes, as float32.

    Raises:
        DataError: If one of them is not a number, or is +inf.

    References:
        own.
    """
    values = numbers(data, torch.float16).float()
    if not bool((values < torch.inf).all()):
        raise damaged("a value is not a number")
    return values


def numbers(data: UInt8[Tensor, " bytes"], dtype: torch.dtype) -> Float[Tensor, " values"]:
    """The bytes read as numbers; copied, as a slice of bytes may begin anywhere.

    References:
        own.
    """
    return torch.empty(len(data), dtype=torch.uint8, device=data.device).copy_(data).view(dtype)


def depths(
    logprobs: Float32[Tensor, "places entries"], used: Bool[Tensor, "places entries"]
) -> tuple[Float32[Tensor, "places entries"], Float16[Tensor, " places"]]:
    """How far below the likeliest of its place each entry lies, and the deepest of each place."""
    depth = (logprobs.amax(1, keepdim=True) - logprobs).where(used, 0.0)
    deepest = depth.amax(1).clamp_max(torch.finfo(torch.float16).max)
    return depth, deepest.to(torch.float16)


def companded(
    depth: Float32[Tensor, "places entries"], deepest: Float16[Tensor, " places"], bits: int
) -> Int64[Tensor, "places entries"]:
    """The depth of each entry as a number of `bits` bits, in steps that grow with it.

    Code c stands for deepest (c / C)^2 with C = 2^bits - 1: an error at depth d is in proportion
    to sqrt(d), and a likely entry has a small one.

    References:
        own; the idea of companding is Bennett, "Spectra of Quantized Signals" (1948).
    """
    most = (1 << bits) - 1
    scale = deepest.float().clamp_min(torch.finfo(torch.float16).tiny)[:, None]
    return (most * (depth / scale).sqrt()).round().clamp(0, most).long()


def expanded(
    codes: Int64[Tensor, "places entries"],
    deepest: Float32[Tensor, " places"],
    tail: Float32[Tensor, " places"],
    used: Bool[Tensor, "places entries"],
    bits: int,
) -> Float32[Tensor, "places entries"]:
    """Log-probs whose depths are the codes', and whose mass is what the tail leaves.

    The likeliest entry is not stored: it follows from the others and the tail. So the mass of all
    entries and the tail is one, and what the codes round has no effect of first order on a KL.

    References:
        own.
    """
    most = (1 << bits) - 1
    below = (codes.float() / most).square() * -deepest[:, None]
    below = below.where(used, -torch.inf)
    left = torch.log(-torch.expm1(tail.double().clamp_max(-1e-12))).float()
    return below + (left - below.logsumexp(1))[:, None]
