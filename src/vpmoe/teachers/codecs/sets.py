"""Sets of token ids in about two bits more than the logarithm of the choice they make."""

from functools import lru_cache

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vpmoe.teachers.codecs.base import Column, damaged, require_size
from vpmoe.teachers.codecs.bits import get, layout, put, set_bits
from vpmoe.vocabulary import VOCAB_SIZE

LOW, HIGH = "ids_low", "ids_high"


def encode_sets(
    ids: Int64[Tensor, " entries"],
    counts: Int64[Tensor, " places"],
    places: Int64[Tensor, " samples"],
) -> dict[str, Column]:
    """Elias-Fano code of one set of ids per place.

    An id is cut in two. The lower l bits are written as they are; the upper part, which grows
    along the ascending ids, is the number of zeros before the id's one in a row of bits. With
    l = floor(log2(V / n)) a set of n ids takes n l + n + V / 2^l bits: 866 for n = 64 of
    201,088, where no code could do with less than 832.

    Args:
        ids: Ascending in each place, the places one after the other.
        counts: How many each place has.
        places: How many places each sample has.

    References:
        Elias, "Efficient Storage and Retrieval by Content and Address of Static Files" (1974);
        Fano (1971). Difference: no index for random access, as places are read whole.
    """
    plan = _Plan(counts, places, len(ids))
    width = plan.low_bits[plan.place]
    low = put(ids & ((1 << width) - 1), plan.low_starts, width, plan.low_bytes)
    ones = plan.high_starts + (ids >> width)
    high = put(torch.ones_like(ids), ones, 1, plan.high_bytes)
    return {LOW: Column(low, plan.low_sizes), HIGH: Column(high, plan.high_sizes)}


def decode_sets(
    low: UInt8[Tensor, " low_bytes"],
    high: UInt8[Tensor, " high_bytes"],
    counts: Int64[Tensor, " places"],
    places: Int64[Tensor, " samples"],
) -> Int64[Tensor, " entries"]:
    """The ids of all places, ascending in each.

    Raises:
        DataError: If the bytes are not those of sets of these sizes.

    References:
        As `encode_sets`.
    """
    plan = _Plan(counts, places, int(counts.sum()))
    require_size(LOW, len(low), plan.low_bytes)
    require_size(HIGH, len(high), plan.high_bytes)
    ones = set_bits(high)
    if len(ones) != len(plan.place):
        raise damaged(f"{len(plan.place)} ids are due, {len(ones)} are there")
    width = plan.low_bits[plan.place]
    upper = ones - plan.high_starts
    ids = (upper << width) | get(low, plan.low_starts, width)
    rising = (torch.diff(ids) > 0) | (torch.diff(plan.place) > 0)
    if not bool(((upper >= 0) & (ids < VOCAB_SIZE)).all()) or not bool(rising.all()):
        raise damaged("the ids of a place do not rise")
    return ids


class _Plan:
    """Which bits belong to which entry; a function of the counts alone."""

    def __init__(self, counts: Tensor, places: Tensor, total: int) -> None:
        num_places = len(counts)
        table = low_bits_of(int(counts.max()) if num_places else 0).to(counts.device)
        self.low_bits = table[counts]
        upper = torch.where(counts > 0, (VOCAB_SIZE - 1) >> self.low_bits, 0)
        low_starts, self.low_sizes = layout(counts * self.low_bits, places)
        high_starts, self.high_sizes = layout(counts + upper, places)
        index = torch.arange(num_places, device=counts.device)
        self.place = torch.repeat_interleave(index, counts, output_size=total)
        first = torch.cumsum(counts, 0) - counts
        rank = torch.arange(total, device=counts.device) - first[self.place]
        self.low_starts = low_starts[self.place] + rank * self.low_bits[self.place]
        self.high_starts = high_starts[self.place] + rank
        self.low_bytes = int(self.low_sizes.sum())
        self.high_bytes = int(self.high_sizes.sum())


@lru_cache
def low_bits_of(most: int) -> Int64[Tensor, " counts"]:
    """floor(log2(V / n)) for n = 0 to `most`; that of 0 plays no part.

    References:
        As `encode_sets`.
    """
    return torch.tensor([0, *((VOCAB_SIZE // n).bit_length() - 1 for n in range(1, most + 1))])
