"""A permutation without state, and packing that splits nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.data.pack import best_fit, permuted

ORDER = [4, 1, 6, 5, 9, 3, 0, 8, 2, 7]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3_000), st.integers(0, 2**40), st.integers(0, 50))
def test_it_is_a_permutation(size, seed, epoch):
    order = permuted(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_any_part_equals_that_part_of_the_whole():
    whole = permuted(np.arange(10_007), 10_007, seed=3, epoch=2)
    part = np.array([9_999, 0, 5_000, 5_000])
    assert permuted(part, 10_007, seed=3, epoch=2).tolist() == whole[part].tolist()


def test_seeds_and_epochs_give_other_orders():
    orders = [
        tuple(permuted(np.arange(200), 200, seed=s, epoch=e)) for s in range(4) for e in range(4)
    ]
    assert len(set(orders)) == 16


def test_neighbours_are_spread_evenly():
    """A thousand permutations: each place gets each value about equally often."""
    size = 10
    counts = np.zeros((size, size))
    for seed in range(1_000):
        counts[np.arange(size), permuted(np.arange(size), size, seed=seed, epoch=0)] += 1
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 150  # 81 degrees of freedom: about 5 standard deviations


def test_the_order_never_changes_between_versions():
    assert permuted(np.arange(10), 10, seed=0, epoch=0).tolist() == ORDER


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_packing_places_every_document_once_and_overfills_nothing(sizes):
    lengths = np.array(sizes)
    rows = best_fit(lengths, 64)
    assert sorted(d for row in rows for d in row) == list(range(len(sizes)))
    loads = [int(lengths[row].sum()) for row in rows]
    assert max(loads) <= 64
    # Best fit decreasing needs at most 11/9 of the best possible rows, and one more.
    assert len(rows) <= 11 / 9 * max(1, -(-sum(sizes) // 64)) * 1.5 + 1
    open_rows = [load for load in loads if load <= 32]
    assert len(open_rows) <= 1  # two half-empty rows would have been one


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([8, 8], [[0], [1]]),
        ([3, 5, 2, 4, 1], [[0, 1], [2, 3, 4]]),
        ([5, 6, 3], [[1], [0, 2]]),
        ([6, 5, 2, 3], [[0, 2], [1, 3]]),
    ],
)
def test_the_tightest_row_wins(sizes, expected):
    assert best_fit(np.array(sizes), 8) == expected
