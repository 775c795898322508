"""Rankings: orders of all ids that survive their bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.teachers.codecs.ranking import ID_BITS, MOST, Ranking
from vpmoe.vocabulary import VOCAB_SIZE

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), unique=True, max_size=60))
def test_any_ranking_is_an_order_of_all_ids_and_comes_back(first):
    ranking = Ranking(torch.tensor(first, dtype=torch.int64))
    data = ranking.to_bytes()
    assert len(data) == -(-len(first) * ID_BITS // 8)
    again = Ranking.from_bytes(data)
    assert again.sha256 == ranking.sha256
    ids, ranks = again.ids(CPU), again.ranks(CPU)
    assert ids[: len(first)].tolist() == first
    assert bool((ids[len(first) :].diff() > 0).all())
    assert torch.equal(ids[ranks], torch.arange(VOCAB_SIZE))


def test_frequent_ids_come_first_and_equal_ones_by_number():
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    counts[[7, 5, 9, 200_000]] = torch.tensor([2, 8, 2, 3])
    assert Ranking.of_counts(counts).ids(CPU)[:6].tolist() == [5, 200_000, 7, 9, 0, 1]
    assert torch.equal(Ranking.by_number().ids(CPU), torch.arange(VOCAB_SIZE))


def test_the_order_of_rare_ids_is_not_kept():
    counts = torch.arange(1, VOCAB_SIZE + 1)
    assert len(Ranking.of_counts(counts).to_bytes()) == MOST * ID_BITS // 8


def test_bytes_of_no_ranking_are_refused():
    good = Ranking(torch.tensor([3, 1, 2])).to_bytes()
    for bad, why in (
        (good + b"\0", "no ranking"),
        (good[:-1] + bytes([good[-1] | 1]), "beyond its last"),
        (b"\0" * 7, "twice"),
        (b"\xff" * 3, "outside the vocabulary|beyond"),
    ):
        with pytest.raises(DataError, match=why):
            Ranking.from_bytes(bad)
