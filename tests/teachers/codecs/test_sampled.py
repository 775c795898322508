"""Drawn ids: frequencies come back exactly, their mean is the teacher, about 38 bytes."""

import pytest
import torch

from tests.teachers.codecs.made import distributions, size, through
from vpmoe.errors import DataError
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.sampled import SampledConfig
from vpmoe.teachers.draws import weighted

TEACHER = distributions(24)
DRAWS = 50


def drawn(logprobs: torch.Tensor, draws: int = DRAWS, seed: int = 0) -> Entries:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(logprobs.exp(), draws, replacement=True, generator=rng).sort(1).values
    once, weights = weighted(ids, torch.zeros(ids.shape), power=1.0)
    nothing = torch.full((len(ids),), -torch.inf)
    return Entries(once, weights, nothing)


def test_ids_and_frequencies_come_back_exactly():
    given = drawn(TEACHER.logprobs)
    out = through(SampledConfig(draws=DRAWS).build(), given, [4, 0, 20])
    width = out.ids.shape[1]
    assert torch.equal(out.counts, given.counts) and width == int(given.counts.max())
    assert torch.equal(out.ids, given.ids[:, :width])
    torch.testing.assert_close(out.logprobs, given.logprobs[:, :width], atol=1e-6, rtol=0)
    assert (out.tail == -torch.inf).all()
    torch.testing.assert_close(out.logprobs.exp().sum(1), torch.ones(24))


def test_a_dozen_ids_take_less_than_38_bytes():
    rank = torch.arange(1, 2_001, dtype=torch.float64)
    sure = (-2.0 * rank.log()).log_softmax(0).repeat(300, 1)
    given = drawn(sure)
    assert 8 < given.counts.float().mean() < 13
    assert size(SampledConfig(draws=DRAWS).build(), given) < 38


def test_the_mean_over_draws_is_the_teacher():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).repeat(20_000, 1)
    out = through(SampledConfig(draws=16).build(), drawn(p.log(), 16))
    mean = (
        torch.zeros(4).index_add_(0, out.ids.reshape(-1), out.logprobs.exp().reshape(-1)) / 20_000
    )
    torch.testing.assert_close(mean.double(), p[0], atol=0.005, rtol=0)


def test_weights_that_are_no_frequencies_are_refused():
    given = drawn(TEACHER.logprobs)
    with pytest.raises(DataError, match="not frequencies among 40 draws"):
        through(SampledConfig(draws=40).build(), given)


def test_bytes_that_are_no_codes_are_refused():
    codec, places = SampledConfig(draws=DRAWS).build(), torch.tensor([24])
    columns = {n: c.data for n, c in codec.encode(drawn(TEACHER.logprobs), places).items()}
    for name, column in columns.items():
        with pytest.raises(DataError):
            codec.decode({**columns, name: column[:-1]}, places)
        bad = column.clone()
        bad[len(bad) // 2] ^= 64
        with pytest.raises(DataError):
            codec.decode({**columns, name: bad}, places) if name != "ids_low" else codec.decode(
                {**columns, name: bad | 255}, places
            )
