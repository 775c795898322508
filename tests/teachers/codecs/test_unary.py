"""Unary numbers: any come back, in the bits that were promised, and no other bytes pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.teachers.codecs.unary import decode_unary, encode_unary

samples = st.lists(st.lists(st.integers(0, 40), max_size=9), max_size=6)


@settings(max_examples=200, deadline=None)
@given(samples)
def test_any_numbers_come_back(parts):
    numbers = torch.tensor([n for part in parts for n in part], dtype=torch.int64)
    entries = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    column = encode_unary(numbers, entries)
    assert decode_unary("x", column.data, entries).tolist() == numbers.tolist()
    bits = [sum(part) + len(part) for part in parts]
    assert column.sizes.tolist() == [-(-b // 8) for b in bits]
    alone = [encode_unary(torch.tensor(p).long(), torch.tensor([len(p)])).data for p in parts]
    assert torch.equal(column.data, torch.cat([torch.empty(0).byte(), *alone]))


def test_the_bits_are_zeros_before_ones():
    column = encode_unary(torch.tensor([0, 3, 1, 2]), torch.tensor([3, 1]))
    assert [f"{byte:08b}" for byte in column.data.tolist()] == ["10001010", "00100000"]


def test_bytes_of_other_numbers_are_refused():
    entries = torch.tensor([3, 2])
    good = encode_unary(torch.tensor([2, 9, 1, 30, 4]), entries).data
    for bad, why in (
        (good[:-1], "are due"),
        (torch.cat([good, torch.zeros(1).byte()]), "do not end"),
        (good | 1, "are due"),
    ):
        with pytest.raises(DataError, match=why):
            decode_unary("x", bad, entries)
    early = torch.tensor([0b11110000, 0b00000001, 0b10000000], dtype=torch.uint8)
    assert decode_unary("x", early, torch.tensor([4, 2])).tolist() == [0, 0, 0, 0, 7, 0]
    with pytest.raises(DataError, match="other samples"):
        decode_unary("x", early, torch.tensor([3, 3]))
