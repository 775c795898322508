"""The K likeliest ids as a set, a byte per log-prob, and the mass of all others."""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from pydantic import Field
from torch import Tensor

from vpmoe.config import Config
from vpmoe.teachers.codecs.base import Codec, Column, Entries, Needs, damaged, require_size
from vpmoe.teachers.codecs.bits import get, layout, put
from vpmoe.teachers.codecs.ragged import used_entries
from vpmoe.teachers.codecs.sets import HIGH, LOW, decode_sets, encode_sets
from vpmoe.teachers.codecs.values import companded, depths, expanded, from_bytes, to_bytes
from vpmoe.vocabulary import VOCAB_SIZE

COLUMNS = ("tail", "deepest", "values", LOW, HIGH)


class SetCodedConfig(Config):
    """The K likeliest ids: 177 bytes for 64, with the error of the plain way's 272."""

    kind: Literal["set_coded"] = "set_coded"
    k: int = Field(default=64, ge=2, le=1_024)
    """How many ids."""
    value_bits: int = Field(default=8, ge=3, le=12)
    """Of each log-prob."""

    def build(self) -> "SetCoded":
        """The codec."""
        return SetCoded(self)


class SetCoded(Codec):
    """See `SetCodedConfig`.

    Ids come back ascending: which is likelier, the values say.

    Args:
        config: How many ids, how fine the values.

    References:
        own; the id set is an Elias-Fano code, see `encode_sets`, the values `companded`.
    """

    needs: Needs = "top"
    columns = COLUMNS

    def __init__(self, config: SetCodedConfig) -> None:
        self.asked = self.max_entries = config.k
        self._bits = config.value_bits

    def encode(self, entries: Entries, places: Int64[Tensor, " samples"]) -> dict[str, Column]:
        """The same number of ids at every place."""
        counts = torch.full_like(entries.ids[:, 0], self.max_entries)
        return pack(entries, counts, places, bits=self._bits)

    def decode(self, columns: Mapping[str, Tensor], places: Int64[Tensor, " samples"]) -> Entries:
        """The entries of all places, ids ascending."""
        counts = torch.full((int(places.sum()),), self.max_entries, device=places.device)
        return unpack(columns, counts, places, bits=self._bits, width=self.max_entries)


def pack(
    entries: Entries, counts: Int64[Tensor, " places"], places: Tensor, *, bits: int
) -> dict[str, Column]:
    """Columns of the first `counts` entries of each place; the others go to the tail.

    The deepest log-prob is written only where there is more than one.
    """
    used = used_entries(counts, entries.ids.shape[1])
    ids, order = entries.ids.where(used, VOCAB_SIZE).sort(1)
    kept = entries.logprobs.where(used, -torch.inf).gather(1, order)
    dropped = entries.logprobs.where(~used, -torch.inf).logsumexp(1)
    tail = torch.logaddexp(entries.tail, dropped)
    depth, deepest = depths(kept, used)
    several = counts > 1
    return {
        "tail": Column(to_bytes(tail), 2 * places),
        "deepest": Column(to_bytes(deepest[several]), 2 * _sums(several.long(), places)),
        "values": _pack_values(companded(depth, deepest, bits)[used], counts, places, bits),
        **encode_sets(ids[used], counts, places),
    }


def unpack(
    columns: Mapping[str, UInt8[Tensor, " bytes"]],
    counts: Int64[Tensor, " places"],
    places: Int64[Tensor, " samples"],
    *,
    bits: int,
    width: int,
) -> Entries:
    """What `pack` wrote, `width` entries to a place.

    Raises:
        DataError: If it did not write that.
    """
    several = counts > 1
    require_size("tail", len(columns["tail"]), 2 * len(counts))
    require_size("deepest", len(columns["deepest"]), 2 * int(several.sum()))
    tail = from_bytes(columns["tail"])
    deepest = torch.zeros_like(tail)
    deepest[several] = from_bytes(columns["deepest"])
    if not bool((tail <= 0).all()) or not bool((deepest >= 0).all()):
        raise damaged("a mass above one")
    flat = decode_sets(columns[LOW], columns[HIGH], counts, places)
    used = used_entries(counts, width)
    ids, codes = (
        torch.zeros_like(used, dtype=torch.int64),
        torch.zeros_like(used, dtype=torch.int64),
    )
    ids[used] = flat
    codes[used] = _unpack_values(columns["values"], counts, places, bits)
    return Entries(ids, expanded(codes, deepest, tail, used, bits), tail)


def _sums(numbers: Int64[Tensor, " places"], places: Int64[Tensor, " samples"]) -> Tensor:
    """Sum over the places of each sample."""
    before = torch.nn.functional.pad(torch.cumsum(numbers, 0), (1, 0))
    last = torch.cumsum(places, 0)
    return before[last] - before[last - places]


def number_starts(counts: Tensor, places: Tensor, bits: int, total: int) -> tuple[Tensor, Tensor]:
    """Where the numbers of `bits` bits of each place begin, and the bytes that a sample takes."""
    starts, sizes = layout(counts * bits, places)
    first = torch.cumsum(counts, 0) - counts
    offset = torch.repeat_interleave(starts - first * bits, counts, output_size=total)
    return offset + torch.arange(total, device=counts.device) * bits, sizes


def _pack_values(codes: Tensor, counts: Tensor, places: Tensor, bits: int) -> Column:
    if bits == 8:
        return Column(codes.to(torch.uint8), _sums(counts, places))
    starts, sizes = number_starts(counts, places, bits, len(codes))
    return Column(put(codes, starts, bits, int(sizes.sum())), sizes)


def _unpack_values(data: Tensor, counts: Tensor, places: Tensor, bits: int) -> Tensor:
    total = int(counts.sum())
    if bits == 8:
        require_size("values", len(data), total)
        return data.long()
    starts, sizes = number_starts(counts, places, bits, total)
    require_size("values", len(data), int(sizes.sum()))
    return get(data, starts, bits)
