"""Rankings: orders of all ids that survive their bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.teachers.codecs import ranking as ranking_module
from vpmoe.teachers.codecs.ranking import ID_BITS, MOST, Ranking
from vpmoe.vocabulary import VOCAB_SIZE

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, VOCAB_SIZE - 1), unique=True, max_size=60),
    st.integers(0, 2**31),
)
def test_any_ranking_is_an_order_of_all_ids_and_comes_back(first, seed):
    rng = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (len(first),), generator=rng)
    ranking = Ranking(torch.tensor(first, dtype=torch.int64), levels)
    data = ranking.to_bytes()
    assert len(data) == -(-len(first) * ID_BITS // 8) + len(first)
    again = Ranking.from_bytes(data)
    assert again.sha256 == ranking.sha256
    assert torch.equal(again.prior(VOCAB_SIZE, CPU), ranking.prior(VOCAB_SIZE, CPU))
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
    assert len(Ranking.of_counts(counts).to_bytes()) == MOST * ID_BITS // 8 + MOST


def test_the_prior_is_how_often_ids_were_seen_and_a_tenth_of_it_even():
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    counts[[7, 5, 200_000]] = torch.tensor([200, 80_000, 1])
    prior = Ranking.of_counts(counts).prior(VOCAB_SIZE, CPU)
    weights = torch.full((VOCAB_SIZE,), 0.1, dtype=torch.float64)
    weights[counts > 0] = counts[counts > 0].double()
    expected = (0.9 * weights / weights.sum() + 0.1 / VOCAB_SIZE).log()
    assert float(prior.exp().sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(prior, expected, atol=1 / 8, rtol=0)  # half a step, and the norm's
    assert float(prior[5] - prior[7]) == pytest.approx(math.log(400), abs=1 / 8)
    torch.testing.assert_close(
        Ranking.by_number().prior(VOCAB_SIZE, CPU).exp(),
        torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE, dtype=torch.float64),
    )


@pytest.mark.parametrize("rule", ["_STEPS", "_UNSEEN", "_EVEN"])
def test_other_rules_for_the_prior_are_another_ranking(monkeypatch, rule):
    """A store keeps the hash: it is never rebuilt by other rules than it was written by."""
    before = Ranking(torch.tensor([3, 1, 2])).sha256
    monkeypatch.setattr(ranking_module, rule, 2 * getattr(ranking_module, rule))
    assert Ranking(torch.tensor([3, 1, 2])).sha256 != before


def test_a_small_vocabulary_leaves_little_to_ids_it_has_not():
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    counts[:80] = 1_000
    for vocab, unseen, even in ((91, 11, 11 / 91), (80, 1, 0), (50, 1, 0)):
        prior = Ranking.of_counts(counts).prior(vocab, CPU)
        expected = 0.9 * 0.1 * unseen / 80_000 + 0.1 * even
        assert float(prior[80:].exp().sum()) == pytest.approx(expected, rel=0.1)


def test_bytes_of_no_ranking_are_refused():
    good = Ranking(torch.tensor([3, 1, 2])).to_bytes()  # seven bytes of ids, three of levels
    for bad, why in (
        (good + b"\0", "no ranking"),
        (good[:6] + bytes([good[6] | 1]) + good[7:], "beyond its last"),
        (b"\0" * 10, "twice"),
        (b"\xff" * 4, "outside the vocabulary|beyond"),
    ):
        with pytest.raises(DataError, match=why):
            Ranking.from_bytes(bad)
