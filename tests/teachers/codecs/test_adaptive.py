"""Adaptive: few entries where the teacher is sure, and few bytes for ids that are frequent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.teachers.codecs.made import distributions, size, through
from vpmoe.config import validate
from vpmoe.errors import ConfigError, DataError
from vpmoe.teachers.codecs import Entries, fitted
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.worth import DEEPEST_NATS, departures, kept
from vpmoe.vocabulary import VOCAB_SIZE

TEACHER = distributions(24)
SHUFFLED = Ranking(torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(5))[:9_000])


def adaptive(ranking: Ranking = SHUFFLED, **settings):
    return AdaptiveConfig.model_validate(settings).build().ranked_by(ranking)


def test_a_sure_teacher_costs_less_than_seven_bytes():
    values = torch.tensor([[0.99995, 2e-5, 1e-5, 5e-6]]).log().repeat(50, 1)
    ids = torch.tensor([[77, 3, 200_000, 4]]).repeat(50, 1)
    top = Entries(ids, values, tail_of(values))
    codec = adaptive(Ranking.by_number(), k=4, worth_nats=1e-3)
    assert size(codec, top) < 7
    out = through(codec, top)
    assert out.ids.tolist() == [[77]] * 50
    torch.testing.assert_close(out.tail.exp(), torch.full((50,), 5e-5), rtol=0.1, atol=0)


def test_fewer_bytes_than_a_set_of_one_size_at_the_same_error():
    """Even for ids in no order at all, which are as rare as they can be."""
    fixed, ours = SetCodedConfig(k=64).build(), adaptive(worth_nats=2.5e-3)
    top = TEACHER.top(256)
    error = TEACHER.kl(through(ours, top)).mean()
    assert error <= TEACHER.kl(through(fixed, TEACHER.top(64))).mean()
    assert size(ours, top) < 0.6 * size(fixed, TEACHER.top(64))


def test_a_ranking_that_fits_halves_the_bytes():
    top = TEACHER.top(64)
    seen = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    keep = torch.arange(64).repeat(24, 1)
    small = Entries(keep * 397 % 500 + 100_000, top.logprobs, top.tail)
    seen.scatter_add_(0, small.ids.reshape(-1), torch.ones(small.ids.numel(), dtype=torch.int64))
    fitting = adaptive(Ranking.of_counts(seen), worth_nats=1e-3)
    assert size(fitting, small) < 0.5 * size(adaptive(worth_nats=1e-3), small)
    assert torch.equal(
        through(fitting, small).ranked().ids, through(adaptive(worth_nats=1e-3), small).ranked().ids
    )


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.floats(0.01, 30),
    st.integers(0, 6),
)
def test_any_distribution_comes_back(k, places, seed, spread, fine_bits):
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(places, k + 1, generator=rng)
    logprobs = logits.log_softmax(1)[:, :-1].sort(1, descending=True).values
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=rng)[:k] for _ in range(places)])
    top = Entries(ids, logprobs, tail_of(logprobs))
    codec = adaptive(k=k, worth_nats=1e-2, fine_bits=fine_bits)
    out = through(codec, top, [places // 2, 0, places - places // 2])
    counts, left = kept(top, top_p=1.0, worth_nats=1e-2, vocab=VOCAB_SIZE)
    assert torch.equal(out.counts, counts)
    for row, count in enumerate(counts.tolist()):
        assert sorted(out.ids[row, :count].tolist()) == sorted(ids[row, :count].tolist())
        assert not out.ids[row, count:].any()
        true = dict(zip(ids[row].tolist(), logprobs[row].tolist(), strict=True))
        named = float(logprobs[row, :count].exp().sum())  # the tail's byte tells it down to 1e-7
        for i, value in zip(
            out.ids[row, :count].tolist(), out.logprobs[row].tolist(), strict=False
        ):
            allowed = 2.0**-fine_bits + 0.15 + 0.02 * abs(true[i])
            assert abs(value - true[i]) <= allowed or named < 1e-7
    mass = out.logprobs.double().exp().sum(1) + out.tail.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.tail.double().exp(), left, atol=2e-3, rtol=0.07)


def test_fine_bits_lower_the_error_of_the_values():
    top, errors = TEACHER.top(64), []
    exact = TEACHER.kl(top).mean()
    for fine_bits in (0, 1, 3):
        out = through(adaptive(k=64, worth_nats=0.0, fine_bits=fine_bits), top)
        errors.append(float(TEACHER.kl(out).mean() - exact))
    assert 0 < errors[2] < errors[1] / 8 < errors[0] / 24


def test_what_is_left_open_is_decided_by_the_teacher():
    few = fitted(AdaptiveConfig(), 91)
    assert few == AdaptiveConfig(k=91, vocab=91, fine_bits=0)
    assert few.build().asked == 91
    given = AdaptiveConfig(k=40, vocab=1_000, fine_bits=1, tail="prior")
    assert fitted(given, VOCAB_SIZE) == given
    beside = fitted(AdaptiveConfig(tail="prior"), VOCAB_SIZE)
    assert beside == AdaptiveConfig(tail="prior", vocab=VOCAB_SIZE, fine_bits=2)
    assert fitted(SetCodedConfig(), 91) == SetCodedConfig()


def test_without_a_ranking_nothing_is_packed_or_unpacked():
    codec, places = AdaptiveConfig(k=16).build(), torch.tensor([24])
    with pytest.raises(DataError, match="the ranking of the ids is not there"):
        codec.encode(TEACHER.top(16), places)
    columns = {n: c.data for n, c in adaptive(k=16).encode(TEACHER.top(16), places).items()}
    with pytest.raises(DataError, match="the ranking of the ids is not there"):
        codec.decode(columns, places)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.01, 30))
def test_any_distribution_comes_back_beside_a_prior(k, places, seed, spread):
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(places, k + 1, generator=rng)
    logprobs = logits.log_softmax(1)[:, :-1].sort(1, descending=True).values
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=rng)[:k] for _ in range(places)])
    top = Entries(ids, logprobs, tail_of(logprobs))
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    counts[ids.flatten()[: 3 * places]] = torch.randint(
        1, 10**6, (len(ids.flatten()[: 3 * places]),), generator=rng
    )
    codec = adaptive(Ranking.of_counts(counts), k=k, worth_nats=1e-2, tail="prior", fine_bits=4)
    out = through(codec, top, [places // 2, 0, places - places // 2])
    prior = codec.prior(torch.device("cpu"))
    named, left = departures(top, worth_nats=1e-2, prior=prior)
    assert torch.equal(out.counts, named.sum(1))
    for row in range(places):
        true = dict(zip(ids[row][named[row]].tolist(), logprobs[row][named[row]], strict=True))
        used = out.logprobs[row] > -torch.inf
        found = dict(zip(out.ids[row][used].tolist(), out.logprobs[row][used], strict=True))
        assert set(found) == set(true)
        for i, value in true.items():
            allowed = 2.0**-4 + 0.15 + 0.02 * abs(float(value))
            unseen = float(value) < float(max(true.values())) - DEEPEST_NATS
            assert abs(float(found[i] - value)) <= allowed or float(left[row]) > 1 - 1e-7 or unseen
    mass = out.logprobs.double().exp().sum(1) + out.tail.double().exp()
    torch.testing.assert_close(
        mass, torch.ones_like(mass), atol=1e-5, rtol=0
    )  # of float32 log-probs
    torch.testing.assert_close(out.tail.double().exp(), left, atol=2e-3, rtol=0.07)


def test_a_prior_and_a_share_of_the_mass_are_two_rules():
    with pytest.raises(ConfigError, match="leave one of them out"):
        validate(AdaptiveConfig, {"tail": "prior", "top_p": 0.9}, source="codec")
    assert adaptive().prior(torch.device("cpu")) is None
    assert SetCodedConfig().build().prior(torch.device("cpu")) is None


def test_bytes_that_are_no_codes_are_refused():
    codec, places = adaptive(k=16), torch.tensor([24])
    columns = {n: c.data for n, c in codec.encode(TEACHER.top(16), places).items()}
    for name, column in columns.items():
        with pytest.raises(DataError, match=f"of {name}"):
            codec.decode({**columns, name: column[:-1]}, places)
    with pytest.raises(DataError, match="16 is the most"):
        codec.decode({**columns, "counts": columns["counts"] | 128}, places)
