"""Levels: every log-prob comes back to half a step, and steps shrink where probability is large."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.teachers.codecs.levels import (
    FINE,
    LEVELS,
    decode_levels,
    encode_levels,
    heights,
    odds_code,
    odds_of_code,
)
from vpmoe.teachers.codecs.ragged import Ragged


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.floats(0, 63), min_size=1, max_size=9)), st.integers(0, 6))
def test_heights_come_back_to_half_a_step(parts, fine_bits):
    height = torch.tensor([h for part in parts for h in part], dtype=torch.float32)
    cut = len(parts) // 2
    shape = Ragged(
        torch.tensor([len(p) for p in parts]).long(), torch.tensor([cut, len(parts) - cut])
    )
    columns = encode_levels(height, shape, fine_bits=fine_bits)
    out = decode_levels(columns[LEVELS].data, columns[FINE].data, shape, fine_bits=fine_bits)
    step = 2.0 ** -(height.floor().clamp_max(6) + fine_bits)
    assert bool(((out - height).abs() <= step / 2 + 1e-6).all())
    bits = (height.floor() + 1 + height.floor().clamp_max(6) + fine_bits).sum()
    size = sum(len(column.data) for column in columns.values())
    assert bits / 8 <= size <= bits / 8 + 4


def test_heights_are_above_the_least_of_the_place_and_end_somewhere():
    logprobs = torch.tensor([-1.0, -2.5, -4.0, -0.1, 0.0, -1e30])
    shape = Ragged(torch.tensor([3, 1, 2]), torch.tensor([3]))
    assert heights(logprobs, shape).tolist() == [3.0, 1.5, 0.0, 0.0, 64.0, 0.0]


def test_a_power_law_takes_less_than_three_bits():
    rank = torch.arange(1, 41)
    height = (40 / rank).log().repeat(100)
    shape = Ragged(torch.full((100,), 40), torch.tensor([100]))
    columns = encode_levels(height, shape, fine_bits=0)
    assert 8 * sum(len(column.data) for column in columns.values()) / 4_000 < 2.6


@given(st.floats(-16, 16))
def test_the_tail_comes_back_with_the_rest(odds):
    mass = 1 / (1 + math.exp(-odds))
    out = float(odds_of_code(odds_code(torch.tensor([mass], dtype=torch.float64)))[0])
    assert abs(out - odds) < 0.14 * math.sqrt(abs(odds)) / 2 + 2e-3


def test_no_tail_and_nothing_but_a_tail_stay_away_from_the_ends():
    for mass in (0.0, 1e-300, 1.0):
        odds = odds_of_code(odds_code(torch.tensor([mass], dtype=torch.float64)))
        assert 16 < abs(float(odds[0])) < 17


def test_bytes_of_other_heights_are_refused():
    shape = Ragged(torch.tensor([2, 3]), torch.tensor([2]))
    height = torch.tensor([0.0, 60.0, 1.5, 0.0, 3.3])
    columns = {n: c.data for n, c in encode_levels(height, shape, fine_bits=2).items()}
    for name in columns:
        bad = {**columns, name: columns[name][:-1]}
        with pytest.raises(DataError, match=name):
            decode_levels(bad[LEVELS], bad[FINE], shape, fine_bits=2)
    far = encode_levels(
        torch.tensor([70.0]), Ragged(torch.tensor([1]), torch.tensor([1])), fine_bits=0
    )
    with pytest.raises(DataError, match="lower than any"):
        decode_levels(
            far[LEVELS].data,
            far[FINE].data,
            Ragged(torch.tensor([1]), torch.tensor([1])),
            fine_bits=0,
        )
