"""The frontier's numbers against whole distributions in float64."""

from dataclasses import replace

import pytest
import torch

from tests.teachers.codecs.made import distributions, through
from vpmoe.teachers import frontier
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.adaptive import AdaptiveConfig
from vpmoe.teachers.codecs.ranking import MOST, Ranking
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.frontier import (
    GRID,
    joined,
    kl,
    measure,
    reference_of,
    squared_error,
)
from vpmoe.vocabulary import VOCAB_SIZE

TEACHER = distributions(12, seed=3)
REFERENCE = reference_of(TEACHER.logprobs, torch.arange(VOCAB_SIZE), draws=50)


def rebuilt(entries: Entries, prior: torch.Tensor | None = None) -> torch.Tensor:
    """The whole rebuilt distribution, the tail shared evenly or by a prior."""
    shares = torch.ones(VOCAB_SIZE).double() if prior is None else prior.exp()
    used = entries.logprobs > -torch.inf
    out = shares.repeat(len(entries), 1)
    row = torch.arange(len(out))[:, None].expand_as(used)
    out[row[used], entries.ids[used]] = 0
    out *= entries.tail.double().exp()[:, None] / out.sum(1, keepdim=True)
    out[row[used], entries.ids[used]] = entries.logprobs.double().exp()[used]
    return out


@pytest.mark.parametrize("k", [2, 16, 200])
def test_errors_are_those_of_the_whole_distribution(k):
    entries = through(SetCodedConfig(k=k, value_bits=5).build(), TEACHER.top(k))
    torch.testing.assert_close(kl(REFERENCE, entries), TEACHER.kl(entries), atol=1e-9, rtol=1e-9)
    dense = (rebuilt(entries) - TEACHER.logprobs.exp()).square().sum(1)
    torch.testing.assert_close(squared_error(REFERENCE, entries), dense, atol=1e-9, rtol=1e-5)


def test_errors_beside_a_prior_are_those_of_the_whole_distribution():
    """What is beyond the ids that are held is told by draws: all are held but 2e-6 of the mass."""
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    sharp = torch.log_softmax(3 * TEACHER.logprobs, dim=1)
    reference = reference_of(sharp, torch.arange(VOCAB_SIZE))
    counts[reference.ids[:, :30].flatten()] = torch.arange(1, 361) ** 2
    codec = AdaptiveConfig(tail="prior", worth_nats=3e-3).build()
    codec = codec.ranked_by(Ranking.of_counts(counts))
    entries = through(codec, reference.top(256))
    prior = codec.prior(torch.device("cpu"))
    dense = (sharp.exp() * (sharp - rebuilt(entries, prior).log())).sum(1)
    torch.testing.assert_close(kl(reference, entries, prior), dense, atol=5e-4, rtol=1e-3)
    dense = (rebuilt(entries, prior) - sharp.exp()).square().sum(1)
    torch.testing.assert_close(
        squared_error(reference, entries, prior), dense, atol=1e-7, rtol=1e-4
    )


def test_what_a_prior_does_in_an_unknown_tail_is_not_said():
    narrow = replace(REFERENCE, rest_ids=None)
    names = {point.name for point in measure(narrow)}
    assert "adaptive 0.01" in names and not any(name.startswith("prior") for name in names)


def test_draws_from_the_rest_say_what_the_rest_is():
    """A fifth of the mass beyond the ids that are held: its mean log prior to a few hundredths."""
    flat = torch.cat([TEACHER.logprobs[:4], TEACHER.logprobs[:4] * 0.6]).log_softmax(1)
    reference = reference_of(flat, torch.arange(VOCAB_SIZE))
    left = 1 - reference.logprobs.exp().sum(1)
    assert bool((left > 0.2).any())
    values = -torch.arange(1, VOCAB_SIZE + 1).double().log()
    exact = (flat.exp() * values).sum(1)
    found = frontier._mean_of(reference, values)
    torch.testing.assert_close(found, exact, atol=0.3, rtol=0)
    assert abs(float((found - exact).mean())) < 0.1


def test_drawn_ids_have_the_error_of_their_frequencies():
    entries = REFERENCE.drawn(50)
    assert (entries.logprobs.exp().sum(1) - 1).abs().max() < 1e-6
    assert entries.counts.min() >= 1 and (entries.ids[:, 0] > 0).any()
    dense = (rebuilt(entries) - TEACHER.logprobs.exp()).square().sum(1)
    torch.testing.assert_close(squared_error(REFERENCE, entries), dense, atol=1e-9, rtol=1e-5)


def test_a_reference_in_parts_is_the_same():
    parts = [reference_of(part, torch.arange(VOCAB_SIZE)) for part in TEACHER.logprobs.split(5)]
    whole = joined(parts)
    torch.testing.assert_close(whole.entropy, REFERENCE.entropy)
    assert torch.equal(whole.ids, REFERENCE.ids)


def test_the_bars_hold_on_power_laws():
    """At most 182 bytes for 64 ids with the plain way's error; adaptive beats DistillKit's 344."""
    points = {point.name: point for point in measure(REFERENCE)}
    assert len(points) == len(GRID)
    assert points["set-64"].bytes_per_token <= 182
    assert points["set-64"].kl_nats <= points["top-64"].kl_nats + 1e-5
    assert points["set-128"].bytes_per_token <= 342
    assert points["set-128"].kl_nats <= points["DistillKit, normalized"].kl_nats
    assert points["adaptive 0.001"].kl_nats <= points["DistillKit"].kl_nats
    assert points["adaptive 0.001"].bytes_per_token < points["DistillKit"].bytes_per_token / 2
    assert points["sampled, 50 draws"].unbiased and points["sampled, 50 draws"].kl_nats is None


def test_two_fifths_of_distillkits_bytes_where_ids_are_as_frequent_as_words():
    """At no more than its error; power laws whose ids are drawn by Zipf's law, one by one."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randperm(VOCAB_SIZE, generator=rng)
    rank = torch.arange(1, VOCAB_SIZE + 1).double()
    rows = []
    for exponent in torch.linspace(1.3, 3.0, 12):
        chances = torch.rand(VOCAB_SIZE, generator=rng, dtype=torch.float64)
        order = ids[(-rank.log() - (-chances.log()).log()).argsort(descending=True)]
        shape = (-exponent * rank.log()).log_softmax(0)
        rows.append(torch.empty_like(shape).scatter_(0, order, shape))
    reference = reference_of(torch.stack(rows), torch.arange(VOCAB_SIZE))
    points = measure(reference, ranking=Ranking(ids[:MOST]))
    (theirs,) = [point for point in points if point.name == "DistillKit"]
    ours = [p for p in points if p.family == "adaptive" and p.kl_nats <= theirs.kl_nats]
    assert min(p.bytes_per_token for p in ours) < 0.4 * theirs.bytes_per_token


def test_a_teacher_of_few_ids_is_measured_with_what_it_has():
    few = TEACHER.logprobs[:, :40].log_softmax(1)
    points = measure(reference_of(few, torch.arange(1_000, 1_040)))
    names = {point.name for point in points}
    assert "set-32" in names and "set-64" not in names and "DistillKit" not in names
    assert all(p.kl_nats is None or p.kl_nats >= -1e-6 for p in points)
