"""Sets of ids whose frequent members cost few bits."""

from functools import lru_cache

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vpmoe.teachers.codecs.base import Column, damaged, require_size
from vpmoe.teachers.codecs.bits import get, layout, put
from vpmoe.teachers.codecs.ragged import Ragged
from vpmoe.teachers.codecs.unary import decode_unary, encode_unary
from vpmoe.vocabulary import VOCAB_SIZE

LOW, HIGH = "ranks_low", "ranks_high"


def encode_ranks(ranks: Int64[Tensor, " entries"], shape: Ragged) -> dict[str, Column]:
    """Elias-Fano code of sets of ranks over buckets that double in width.

    The ranks from 2^e to 2^(e+1) hold about as many members of a set for one e as for another,
    as the frequencies of words go with the inverse of their rank. So an octave is cut into 2^m
    buckets of equal width, more of them for larger sets; the number of a rank's bucket grows along
    the set and is written as zeros before a one, and the place in the bucket as it is. Nothing is
    written after the last one.

    Args:
        ranks: Ascending in each place, the places one after the other.
        shape: How many there are at each place.

    References:
        own, after Elias (1974) and Fano (1971), see `encode_sets`; Zipf, "Human Behavior and the
        Principle of Least Effort" (1949). Difference: buckets are no longer of one width.
    """
    parts = shape.of_place(parts_of(shape.counts))
    number = ranks + 1
    exponent = (number.float().view(torch.int32) >> 23).long() - 127  # exact: below 2^24
    width = (exponent - parts).clamp_min(0)
    bucket = (width << parts) + (number >> width) - 1
    starts, sizes = layout(width, shape.entries)
    low = put(number & ((1 << width) - 1), starts, width, int(sizes.sum()))
    return {
        LOW: Column(low, sizes),
        HIGH: encode_unary(shape.steps(bucket), shape.entries),
    }


def decode_ranks(
    low: UInt8[Tensor, " low_bytes"], high: UInt8[Tensor, " high_bytes"], shape: Ragged
) -> Int64[Tensor, " entries"]:
    """The ranks of all places, ascending in each.

    Raises:
        DataError: If the bytes are not those of sets of these sizes.

    References:
        As `encode_ranks`.
    """
    parts = shape.of_place(parts_of(shape.counts))
    bucket = shape.sums(decode_unary(HIGH, high, shape.entries)) + 1
    width = ((bucket >> parts) - 1).clamp_min(0)
    if not bool((width < 18).all()):
        raise damaged("a rank is outside the vocabulary")
    starts, sizes = layout(width, shape.entries)
    require_size(LOW, len(low), int(sizes.sum()))
    number = (((bucket - (width << parts)) << width) | get(low, starts, width)) - 1
    if not bool((number < VOCAB_SIZE).all()):
        raise damaged("a rank is outside the vocabulary")
    if not bool(shape.rises(number)):
        raise damaged("the ranks of a place do not rise")
    return number


def parts_of(counts: Int64[Tensor, " places"]) -> Int64[Tensor, " places"]:
    """m of each place: an octave of ranks is cut in 2^m, about a sixth of the set's size.

    References:
        own; the best m for sets of 8, 16, 32, 64, 128 and 256 likeliest ids of an n-gram model is
        0, 1, 2, 3, 4 and 5.
    """
    return _parts(int(counts.max()) if len(counts) else 0).to(counts.device)[counts]


@lru_cache
def _parts(most: int) -> Int64[Tensor, " counts"]:
    return torch.tensor([max(0, (3 * n // 16).bit_length() - 1) for n in range(most + 1)])
