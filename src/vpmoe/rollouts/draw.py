"""How a token is chosen: temperature, nucleus, and numbers that are hashes of what they are for."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How a token is chosen.

    Attributes:
        temperature: What logits are divided by; 0 takes the likeliest token.
        top_p: Only the likeliest tokens that together reach this probability are drawn from.
        seed: Root of all randomness.
    """

    temperature: float
    top_p: float
    seed: int


def stream_of(seed: int, request: int) -> int:
    """The hash from which a request's numbers come, as a signed 64-bit word.

    References:
        Steele et al., "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014): its finishing
        function, chained over the words.
    """
    seed &= 0xFFFF_FFFF_FFFF_FFFF
    seed -= (seed >> 63) << 64  # as torch holds it
    return int(_scrambled(_scrambled(torch.tensor(seed)) ^ request))


def uniforms(
    streams: Int[Tensor, " batch"], places: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """One number in [0, 1) for each (stream, place), float64; equal arguments, equal number.

    References:
        Steele et al. (OOPSLA 2014), as in `stream_of`.
    """
    return _shifted(_scrambled(streams ^ places), 11).double() * 2.0**-53


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted right as unsigned ones are."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _scrambled(words: Tensor) -> Tensor:
    words = words + (0x9E37_79B9_7F4A_7C15 - (1 << 64))
    words = (words ^ _shifted(words, 30)) * (0xBF58_476D_1CE4_E5B9 - (1 << 64))
    words = (words ^ _shifted(words, 27)) * (0x94D0_49BB_1331_11EB - (1 << 64))
    return words ^ _shifted(words, 31)


def nucleus(logits: Float[Tensor, "batch rows"], *, top_p: float) -> Float[Tensor, "batch rows"]:
    """Logits with every token outside the nucleus at -inf.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`; it is
    never empty.

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), arXiv:1904.09751.
    """
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    shares = ranked.softmax(dim=-1)
    outside = shares.cumsum(dim=-1) - shares >= top_p
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf)


def choose(
    logits: Float[Tensor, "batch rows"], uniform: Float[Tensor, " batch"], *, draw: Draw
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Rows chosen, their log-probs under the model, and under what they were drawn from.

    A draw inverts the cumulative distribution at `uniform`, in row order and float64.

    References:
        own.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    if draw.temperature == 0:
        rows = logits.argmax(dim=-1)
        return rows, _of(logprobs, rows), torch.zeros_like(uniform, dtype=torch.float32)
    behavior = logprobs
    if draw.temperature != 1 or draw.top_p < 1:
        tempered = logits / draw.temperature
        if draw.top_p < 1:
            tempered = nucleus(tempered, top_p=draw.top_p)
        behavior = tempered.log_softmax(dim=-1)
    heights = behavior.double().exp().cumsum(dim=-1)
    target = uniform.double()[:, None] * heights[:, -1:]
    rows = torch.searchsorted(heights, target, right=True).squeeze(1)
    rows = rows.clamp_max(logits.shape[1] - 1)
    return rows, _of(logprobs, rows), _of(behavior, rows)


def _of(logprobs: Tensor, rows: Tensor) -> Tensor:
    return logprobs.gather(1, rows[:, None]).squeeze(1)
