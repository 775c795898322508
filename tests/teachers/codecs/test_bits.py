"""Numbers in rows of bits: a bijection for every width, the documented bytes, aligned samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.teachers.codecs.bits import MAX_WIDTH, get, layout, put, set_bits


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [([5, 1, 7, 3], 3, [167, 176]), ([200006, 1, 131072], 18, [195, 81, 128, 0, 24, 0, 0])],
)
def test_highest_bit_first(values, width, expected):
    starts = torch.arange(len(values)) * width
    data = put(torch.tensor(values), starts, width, len(expected))
    assert data.tolist() == expected
    assert get(data, starts, width).tolist() == values


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, MAX_WIDTH), st.integers(0, 2**62)), max_size=40))
def test_numbers_of_any_width_come_back(pairs):
    widths = torch.tensor([width for width, _ in pairs], dtype=torch.int64)
    values = torch.tensor([value % 2**width for width, value in pairs], dtype=torch.int64)
    starts = widths.cumsum(0) - widths
    data = put(values, starts, widths, (int(widths.sum()) + 7) // 8)
    assert get(data, starts, widths).tolist() == values.tolist()
    text = "".join(f"{v:0{w}b}" for v, w in zip(values.tolist(), widths.tolist(), strict=True) if w)
    bits = "".join(f"{byte:08b}" for byte in data.tolist())
    assert bits[: len(text)] == text and set(bits[len(text) :]) <= {"0"}
    assert set_bits(data).tolist() == [i for i, bit in enumerate(bits) if bit == "1"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=6))
def test_a_sample_begins_with_a_byte_of_its_own(samples):
    bits = torch.tensor([b for sample in samples for b in sample], dtype=torch.int64)
    places = torch.tensor([len(sample) for sample in samples], dtype=torch.int64)
    starts, sizes = layout(bits, places)
    expected, at = [], 0
    for sample, size in zip(samples, sizes.tolist(), strict=True):
        assert size == (sum(sample) + 7) // 8
        here = 8 * at
        for count in sample:
            expected.append(here)
            here += count
        at += size
    assert starts.tolist() == expected
