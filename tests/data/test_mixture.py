"""Exact shares in every prefix, and no state."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.data.mixture import anchors_before, uses_anchor
from vpmoe.errors import DataError


@given(st.decimals(0, 1, places=3), st.integers(1, 300))
def test_every_prefix_has_its_share(fraction, steps):
    anchors = sum(uses_anchor(step, float(fraction)) for step in range(steps))
    assert anchors == anchors_before(steps, float(fraction)) == int(Fraction(fraction) * steps)


def test_decimal_shares_do_not_drift():
    assert [s for s in range(30) if uses_anchor(s, 0.1)] == [9, 19, 29]
    assert anchors_before(1_000_000_000, 0.15) == 150_000_000


def test_none_and_all():
    assert not any(uses_anchor(s, 0.0) for s in range(100))
    assert all(uses_anchor(s, 1.0) for s in range(100))


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_what_is_no_share_is_refused(fraction):
    with pytest.raises(DataError, match="not a share"):
        uses_anchor(0, fraction)
