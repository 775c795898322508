"""Worth: an id is kept for what naming it lowers the KL by, measured on whole distributions."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.teachers.codecs.made import distributions
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.worth import departures, kept
from vpmoe.vocabulary import VOCAB_SIZE

TEACHER = distributions(24)


def test_the_worth_of_an_entry_is_what_it_lowers_the_kl_by():
    top = TEACHER.top(40)
    kl = [TEACHER.kl(shortened(top, n)) for n in range(1, 41)]
    for worth in (1e-1, 1e-2, 1e-3):
        counts, left = kept(top, top_p=1.0, worth_nats=worth, vocab=VOCAB_SIZE)
        for row, count in enumerate(counts.tolist()):
            gains = [float(kl[n - 1][row] - kl[n][row]) for n in range(1, 40)]
            last = max((n + 1 for n, gain in enumerate(gains, 1) if gain >= worth), default=1)
            assert abs(gains[min(count, 39) - 1] - worth) < 1e-6 or count == last
            assert abs(float(left[row]) - float(shortened(top, count).tail[row].exp())) < 1e-6


def shortened(top: Entries, count: int) -> Entries:
    rest = torch.logaddexp(top.tail, top.logprobs[:, count:].logsumexp(1))
    return Entries(top.ids[:, :count], top.logprobs[:, :count], rest)


def test_top_p_is_the_smallest_head_with_that_mass():
    values = torch.tensor([[0.6, 0.25, 0.1, 0.03]]).log()
    top = Entries(torch.tensor([[5, 9, 1, 7]]), values, torch.tensor([math.log(0.02)]))
    for top_p, count in ((0.5, 1), (0.6001, 2), (0.84, 2), (0.86, 3), (0.97, 4), (1.0, 4)):
        counts, left = kept(top, top_p=top_p, worth_nats=0.0, vocab=VOCAB_SIZE)
        assert counts.tolist() == [count]
        torch.testing.assert_close(left.float(), 1 - values.exp()[:, :count].sum(1))


@settings(max_examples=100, deadline=None)
@example(9, 152560, 12.75, 1e-6, 50)
@given(
    st.integers(2, 60),
    st.integers(0, 2**31),
    st.floats(0.01, 20),
    st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 0.3]),
    st.integers(0, 50),
)
def test_the_short_way_finds_what_the_definition_says(k, seed, spread, worth, unknown):
    """Ids too small to be worth it are never looked at: the answer is that of looking at all."""
    rng = torch.Generator().manual_seed(seed)
    logprobs = (spread * torch.randn(4, k + unknown, generator=rng)).log_softmax(1)
    logprobs = logprobs.sort(1, descending=True).values[:, :k]
    top = Entries(torch.arange(k).repeat(4, 1), logprobs, tail_of(logprobs))
    vocab = k + unknown
    counts, left = kept(top, top_p=1.0, worth_nats=worth, vocab=vocab)
    mass = logprobs.double().exp()
    for row in range(4):
        rest = torch.cat([mass.new_ones(1), 1 - mass[row].cumsum(0)])
        rest = rest.clamp_min(float(top.tail[row].double().exp()))
        m = (vocab - torch.arange(k + 1)).clamp_min(1)
        spread_cost = rest * (m / rest).log()
        gains = spread_cost[:-1] - spread_cost[1:] + mass[row] * logprobs[row].double()
        last = [n for n in range(1, k + 1) if gains[n - 1] >= worth]
        count = int(counts[row])
        # Both sums of what is left stop at LEAST_TAIL, whose cost is 1.3e-6.
        near = abs(float(gains[max(count, last[-1] if last else 1) - 1]) - worth) < 4e-6
        assert count == (last[-1] if last else 1) or near
        assert abs(float(left[row]) - float(rest[count])) < 1e-7


def test_a_place_does_not_depend_on_its_neighbours():
    top = TEACHER.top(100)
    together = kept(top, top_p=0.99, worth_nats=1e-3, vocab=VOCAB_SIZE)
    for row in range(len(top)):
        alone = kept(top.select(torch.tensor([row])), top_p=0.99, worth_nats=1e-3, vocab=VOCAB_SIZE)
        assert torch.equal(alone[0], together[0][row : row + 1])
        assert torch.equal(alone[1], together[1][row : row + 1])


def prior_of(seed):
    rng = torch.Generator().manual_seed(seed)
    counts = (torch.rand(VOCAB_SIZE, generator=rng).double() ** -1.5).long()
    return Ranking.of_counts(counts[torch.randperm(VOCAB_SIZE, generator=rng)]).prior(
        VOCAB_SIZE, torch.device("cpu")
    )


def near_a_prior(prior, places, k, seed, spread):
    """A teacher that says of most ids what the prior says, and of some much more or less."""
    rng = torch.Generator().manual_seed(seed)
    logits = prior.repeat(places, 1)
    logits += spread * torch.randn(logits.shape, generator=rng, dtype=torch.float64)
    logprobs = logits.log_softmax(1)
    values, ids = logprobs.topk(k, dim=1)
    return logprobs, Entries(ids, values.float(), tail_of(values.float()))


def kl_beside_a_prior(logprobs, top, named, prior):
    """Of each place, the rebuilt distribution written out."""
    out = torch.empty(len(logprobs), dtype=torch.float64)
    for row, teacher in enumerate(logprobs):
        rebuilt = prior.exp().clone()
        ids = top.ids[row][named[row]]
        rebuilt[ids] = 0
        rebuilt *= (1 - teacher[ids].exp().sum()) / rebuilt.sum()
        rebuilt[ids] = teacher[ids].exp()
        out[row] = (teacher.exp() * (teacher - rebuilt.log())).sum()
    return out


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("worth", [1e-1, 1e-2, 1e-3])
def test_no_single_name_more_or_less_would_be_better(spread, worth):
    prior = prior_of(1)
    logprobs, top = near_a_prior(prior, 3, 40, 7, spread)
    named, left = departures(top, worth_nats=worth, prior=prior)
    best = kl_beside_a_prior(logprobs, top, named, prior) + worth * named.sum(1)
    for column in range(40):
        other = named.clone()
        other[:, column] ^= True
        cost = kl_beside_a_prior(logprobs, top, other, prior) + worth * other.sum(1)
        cost = cost.masked_fill(~other.any(1), math.inf)  # one is named at least
        assert bool((cost >= best - 0.5 * worth).all())  # s of the others follows a name as well
    expected = 1 - (named * top.logprobs.double().exp()).sum(1)
    torch.testing.assert_close(left, expected, atol=1e-7, rtol=1e-6)


def test_a_frequent_id_as_likely_as_ever_needs_no_name_and_a_missing_one_does():
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    counts[:100] = 1_000
    prior = Ranking.of_counts(counts).prior(VOCAB_SIZE, torch.device("cpu"))
    chances = torch.full((100,), 0.5 / 98)
    chances[3], chances[5] = 0.4996, 0.0004  # far too likely, and far too unlikely
    values, ids = chances.log().sort(descending=True, stable=True)
    top = Entries(ids[None], values[None], tail_of(values[None]))
    named, _ = departures(top, worth_nats=2e-3, prior=prior)
    assert sorted(ids[named[0]].tolist()) == [3, 5]


def test_what_is_left_is_never_less_than_what_the_teacher_left():
    prior = Ranking.by_number().prior(VOCAB_SIZE, torch.device("cpu"))
    values = torch.tensor([[0.75, 0.25]]).log()
    top = Entries(torch.tensor([[5, 9]]), values, torch.tensor([math.log(1e-6)]))
    named, left = departures(top, worth_nats=1e-3, prior=prior)
    assert named.all() and float(left[0]) == pytest.approx(1e-6, rel=1e-3)


def test_departures_of_a_place_do_not_depend_on_its_neighbours():
    prior = prior_of(2)
    _, top = near_a_prior(prior, 6, 50, 9, 2.0)
    together = departures(top, worth_nats=3e-3, prior=prior)
    for row in range(len(top)):
        alone = departures(top.select(torch.tensor([row])), worth_nats=3e-3, prior=prior)
        assert torch.equal(alone[0], together[0][row : row + 1])
        assert torch.equal(alone[1], together[1][row : row + 1])
