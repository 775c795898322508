"""Worth: an id is kept for what naming it lowers the KL by, measured on whole distributions."""

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.teachers.codecs.made import distributions
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.worth import kept
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
