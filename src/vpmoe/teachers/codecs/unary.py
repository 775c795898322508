"""Small numbers as zeros before a one, read at any number of places at once."""

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vpmoe.teachers.codecs.base import Column, damaged
from vpmoe.teachers.codecs.bits import layout, put, set_bits


def encode_unary(numbers: Int64[Tensor, " entries"], entries: Int64[Tensor, " samples"]) -> Column:
    """Each number x as x zeros and a one; a sample begins with a byte of its own.

    Args:
        numbers: Zero or more, of the samples one after the other.
        entries: How many numbers each sample has.

    References:
        own; the code is Elias' alpha, "Universal Codeword Sets" (1975).
    """
    starts, sizes = layout(numbers + 1, entries)
    return Column(put(torch.ones_like(numbers), starts + numbers, 1, int(sizes.sum())), sizes)


def decode_unary(
    name: str, data: UInt8[Tensor, " bytes"], entries: Int64[Tensor, " samples"]
) -> Int64[Tensor, " entries"]:
    """The numbers again: every one in the bytes ends one, so that no length needs to be known.

    Args:
        name: Of the column, for a refusal.
        data: Of the samples one after the other.
        entries: How many numbers each sample has.

    Raises:
        DataError: If the bytes are not those of so many numbers.

    References:
        As `encode_unary`.
    """
    ones, due = set_bits(data), int(entries.sum())
    if len(ones) != due:
        raise damaged(f"{due} numbers of {name} are due, {len(ones)} are there")
    begins = torch.nn.functional.pad(ones + 1, (1, 0))
    if len(data) != (int(begins[-1]) + 7) // 8:
        raise damaged(f"the bytes of {name} do not end with its last number")
    begins = begins[:-1]
    first = (torch.cumsum(entries, 0) - entries)[entries > 0]
    begins[first] = (begins[first] + 7) & -8
    numbers = ones - begins
    if not bool((numbers >= 0).all()):
        raise damaged(f"the numbers of {name} belong to other samples")
    return numbers
