"""Log-probs in two or three bits each: coarse for the many small ones, fine for the few large."""

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from vpmoe.teachers.codecs.base import Column, damaged, require_size
from vpmoe.teachers.codecs.bits import get, layout, put
from vpmoe.teachers.codecs.ragged import Ragged
from vpmoe.teachers.codecs.unary import decode_unary, encode_unary
from vpmoe.teachers.codecs.worth import DEEPEST_NATS

LEVELS, FINE = "levels", "fine"
_MOST_HALVINGS = 6  # 1/64 nat: a probability to 0.5 % on average
_ODDS_CODES = 128  # of either sign
_MOST_ODDS_NATS = 17.0  # more than those of `LEAST_TAIL`


def heights(logprobs: Float32[Tensor, " entries"], shape: Ragged) -> Float32[Tensor, " entries"]:
    """How far each log-prob lies above the least of its place, nats.

    Args:
        logprobs: The likeliest first in each place, the places one after the other.
        shape: How many there are at each place.

    References:
        own.
    """
    least = torch.maximum(logprobs[shape.last], logprobs[shape.first] - DEEPEST_NATS)
    return (logprobs - shape.of_place(least)).clamp_min(0.0)


def encode_levels(
    height: Float32[Tensor, " entries"], shape: Ragged, *, fine_bits: int
) -> dict[str, Column]:
    """Heights as whole nats and a part.

    The whole nats are zeros before a one. Each of them makes the probability 2.7 times as large
    and adds a bit to the part, up to six: the many entries of small mass take a bit or two. An
    error d of a log-prob costs a KL of t d^2 / 2, so that steps should shrink with the root of
    the probability t; for the sake of the gradient they shrink a little faster.

    Args:
        height: Of the places one after the other, in any order within each.
        shape: How many there are at each place.
        fine_bits: More bits for every part; each halves all steps.

    References:
        own; a unary number with a binary part is the gamma code of Elias, "Universal Codeword
        Sets" (1975).
    """
    level = height.floor()
    bits = _part_bits(level.long(), fine_bits)
    part = ((height - level) * (1 << bits).float()).long()
    starts, sizes = layout(bits, shape.entries)
    return {
        LEVELS: encode_unary(level.long(), shape.entries),
        FINE: Column(put(part, starts, bits, int(sizes.sum())), sizes),
    }


def decode_levels(
    levels: UInt8[Tensor, " bytes"],
    fine: UInt8[Tensor, " fine_bytes"],
    shape: Ragged,
    *,
    fine_bits: int,
) -> Float32[Tensor, " entries"]:
    """The middles of the steps that the heights fell in.

    Raises:
        DataError: If the bytes are not those of so many heights.

    References:
        As `encode_levels`.
    """
    level = decode_unary(LEVELS, levels, shape.entries)
    if not bool((level <= DEEPEST_NATS).all()):
        raise damaged("a log-prob is lower than any that is kept")
    bits = _part_bits(level, fine_bits)
    starts, sizes = layout(bits, shape.entries)
    require_size(FINE, len(fine), int(sizes.sum()))
    part = get(fine, starts, bits).float() + 0.5
    return level.float() + part / (1 << bits).float()


def odds_code(tail: Float64[Tensor, " places"]) -> UInt8[Tensor, " places"]:
    """The log-odds of a mass in a byte, in steps that grow with the root of their size.

    A half is known to a ten-thousandth, a twentieth to three hundredths of itself, and what is
    near nothing or near all not much worse.

    References:
        own; the idea of companding is Bennett, "Spectra of Quantized Signals" (1948).
    """
    odds = tail.clamp_min(1e-300).log() - torch.log1p(-tail.clamp_max(1.0 - 1e-12))
    code = (_ODDS_CODES * (odds.abs() / _MOST_ODDS_NATS).sqrt()).long()
    code = code.clamp_max(_ODDS_CODES - 1) + _ODDS_CODES * (odds >= 0)
    return code.to(torch.uint8)


def odds_of_code(code: UInt8[Tensor, " places"]) -> Float32[Tensor, " places"]:
    """The log-odds of the mass; never so large that nothing is left for either side.

    References:
        own.
    """
    size = ((code.long() % _ODDS_CODES).float() + 0.5) / _ODDS_CODES
    return torch.where(code >= _ODDS_CODES, 1.0, -1.0) * _MOST_ODDS_NATS * size.square()


def _part_bits(level: Int64[Tensor, " entries"], fine_bits: int) -> Int64[Tensor, " entries"]:
    return level.clamp_max(_MOST_HALVINGS) + fine_bits
