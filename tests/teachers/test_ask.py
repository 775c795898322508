"""Drawn ids are checked before anything believes them; the likeliest in test_score_targets.py."""

import numpy as np
import pytest
import torch

from vpmoe.errors import TeacherError
from vpmoe.teachers.ask import checked
from vpmoe.teachers.base import SampledScores
from vpmoe.teachers.codecs.sampled import SampledConfig

DRAWS = 20


def answer(length, *, weights=(0.75, 0.25)):
    ids = np.zeros((length - 1, DRAWS), dtype=np.int32)
    ids[:, :2] = (5, 9)
    values = np.full((length - 1, DRAWS), -np.inf, dtype=np.float32)
    values[:, :2] = np.log(weights)
    return SampledScores(np.full(length - 1, -1.5, dtype=np.float32), ids, values)


def asked(lengths):
    return [np.arange(length, dtype=np.int32) for length in lengths]


def test_drawn_ids_come_back_with_their_weights():
    codec = SampledConfig(draws=DRAWS).build()
    found = checked(codec, asked([4, 3]), [answer(4), answer(3)])
    assert found is not None and found.ids.dtype == torch.int64
    assert found.ids[:, :2].tolist() == [[5, 9]] * 5 and found.counts.tolist() == [2] * 5
    assert bool((found.tail == -torch.inf).all())


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((0.75, 0.75), "1.5000"),
        ((0.1, 0.2), "0.3000"),
        ((np.nan, 0.5), "nan"),
        ((1e9, 0), "e|0000"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights, said):
    codec = SampledConfig(draws=DRAWS).build()
    with np.errstate(divide="ignore"), pytest.raises(TeacherError, match=said) as caught:
        checked(codec, asked([4, 3]), [answer(4), answer(3, weights=weights)], first=6)
    assert "token 1 of sequence 7" in caught.value.message
