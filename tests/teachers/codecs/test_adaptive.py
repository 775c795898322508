"""Adaptive: few entries where the teacher is sure; every byte buys more than top-p's or top-K's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.teachers.codecs.made import distributions, size, through
from vpmoe.errors import DataError
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig, kept
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.vocabulary import VOCAB_SIZE

TEACHER = distributions(24)


def test_the_worth_of_an_entry_is_what_it_lowers_the_kl_by():
    top = TEACHER.top(40)
    kl = [TEACHER.kl(shortened(top, n)) for n in range(1, 41)]
    for worth in (1e-1, 1e-2, 1e-3):
        counts = kept(top, top_p=1.0, worth_nats=worth)
        for row, count in enumerate(counts.tolist()):
            gains = [float(kl[n - 1][row] - kl[n][row]) for n in range(1, 40)]
            last = max((n + 1 for n, gain in enumerate(gains, 1) if gain >= worth), default=1)
            assert abs(gains[min(count, 39) - 1] - worth) < 1e-6 or count == last


def shortened(top: Entries, count: int) -> Entries:
    rest = torch.logaddexp(top.tail, top.logprobs[:, count:].logsumexp(1))
    return Entries(top.ids[:, :count], top.logprobs[:, :count], rest)


def test_top_p_is_the_smallest_head_with_that_mass():
    values = torch.tensor([[0.6, 0.25, 0.1, 0.03]]).log()
    top = Entries(torch.tensor([[5, 9, 1, 7]]), values, torch.tensor([math.log(0.02)]))
    for top_p, count in ((0.5, 1), (0.6001, 2), (0.84, 2), (0.86, 3), (0.97, 4), (1.0, 4)):
        assert kept(top, top_p=top_p, worth_nats=0.0).tolist() == [count]


def test_a_sure_teacher_costs_less_than_ten_bytes():
    values = torch.tensor([[0.99995, 2e-5, 1e-5, 5e-6]]).log().repeat(50, 1)
    ids = torch.tensor([[77, 3, 200_000, 4]]).repeat(50, 1)
    top = Entries(ids, values, tail_of(values))
    codec = AdaptiveConfig(k=4, worth_nats=1e-3).build()
    assert size(codec, top) < 10
    assert through(codec, top).ids.shape == (50, 1)


def test_fewer_bytes_than_a_set_of_one_size_at_the_same_error():
    fixed = SetCodedConfig(k=64).build()
    ours = AdaptiveConfig(worth_nats=2.5e-3).build()
    top = TEACHER.top(256)
    error = TEACHER.kl(through(ours, top)).mean()
    assert error <= TEACHER.kl(through(fixed, TEACHER.top(64))).mean()
    assert size(ours, top) < 0.6 * size(fixed, TEACHER.top(64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.01, 30))
def test_any_distribution_comes_back(k, places, seed, spread):
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(places, k + 1, generator=rng)
    logprobs = logits.log_softmax(1)[:, :-1].sort(1, descending=True).values
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=rng)[:k] for _ in range(places)])
    top = Entries(ids, logprobs, tail_of(logprobs))
    config = AdaptiveConfig(k=k, worth_nats=1e-2, value_bits=8)
    out = through(config.build(), top, [places // 2, 0, places - places // 2])
    counts = kept(top, top_p=1.0, worth_nats=1e-2)
    assert torch.equal(out.counts, counts)
    for row, count in enumerate(counts.tolist()):
        assert out.ids[row, :count].tolist() == sorted(ids[row, :count].tolist())
        assert not out.ids[row, count:].any()
    mass = out.logprobs.double().exp().sum(1) + out.tail.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    true_tail = 1 - shortened_mass(logprobs, counts)
    torch.testing.assert_close(out.tail.double().exp(), true_tail, atol=1e-3, rtol=1e-2)


def shortened_mass(logprobs, counts):
    used = torch.arange(logprobs.shape[1]) < counts[:, None]
    return (logprobs.double().exp() * used).sum(1)


def test_bytes_that_are_no_codes_are_refused():
    codec, places = AdaptiveConfig(k=16).build(), torch.tensor([24])
    columns = {n: c.data for n, c in codec.encode(TEACHER.top(16), places).items()}
    for name, column in columns.items():
        with pytest.raises(DataError, match=f"bytes of {name}|ids"):
            codec.decode({**columns, name: column[:-1]}, places)
    with pytest.raises(DataError, match="16 is the most"):
        codec.decode({**columns, "counts": columns["counts"] | 128}, places)
