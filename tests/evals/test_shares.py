from itertools import product
from math import comb, sqrt

import pytest

from vpmoe.evals.shares import Z_95, share_of


def test_interval_of_a_published_example():
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I.
    for correct, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        share = share_of(correct, count)
        assert (round(share.low, 4), round(share.high, 4)) == (low, high)


def test_interval_ends_solve_the_score_equation():
    for correct, count in ((3, 10), (50, 400), (399, 400)):
        share = share_of(correct, count)
        for end in (share.low, share.high):
            distance = abs(share.share - end) / sqrt(end * (1 - end) / count)
            assert distance == pytest.approx(Z_95, rel=1e-9)


def test_all_and_nothing_stay_inside_zero_and_one():
    assert share_of(0, 20).low == 0.0
    assert share_of(20, 20).high == 1.0
    assert (share_of(0, 0).low, share_of(0, 0).high) == (0.0, 1.0)
    for correct, count in product(range(6), (5,)):
        share = share_of(correct, count)
        assert 0 <= share.low <= share.share <= share.high <= 1


def test_interval_covers_at_its_stated_rate():
    count, p = 60, 0.7
    covered = sum(
        comb(count, k) * p**k * (1 - p) ** (count - k)
        for k in range(count + 1)
        if share_of(k, count).low <= p <= share_of(k, count).high
    )
    assert 0.93 < covered < 0.98
