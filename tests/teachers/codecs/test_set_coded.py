"""Set-coded top-K: at most 182 bytes for 64 ids, and an error no worse than the plain way's 272."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.teachers.codecs.made import distributions, size, through
from vpmoe.errors import DataError
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.base import tail_of
from vpmoe.teachers.codecs.set_coded import SetCodedConfig
from vpmoe.teachers.codecs.top_k import TopKConfig
from vpmoe.vocabulary import VOCAB_SIZE

TEACHER = distributions(24)


@pytest.mark.parametrize(("k", "most"), [(32, 98), (64, 182), (128, 342)])
def test_bytes_and_error(k, most):
    codec, top = SetCodedConfig(k=k).build(), TEACHER.top(k)
    assert size(codec, top) <= most
    ours = TEACHER.kl(through(codec, top))
    plain = TEACHER.kl(through(TopKConfig(k=k).build(), top))
    assert ours.mean() <= plain.mean() + 2e-5
    best = TEACHER.kl(top)
    assert (ours - best).abs().max() < 2e-4


def test_the_same_ids_in_the_same_order_of_likelihood():
    top = TEACHER.top(64)
    out = through(SetCodedConfig(k=64).build(), top)
    assert (out.ids.diff(dim=1) > 0).all()
    assert torch.equal(out.ids, top.ids.sort(1).values)
    assert torch.equal(out.ranked().ids[:, 0], top.ids[:, 0])
    values = out.ranked().logprobs
    assert (values.diff(dim=1) <= 0).all()
    torch.testing.assert_close(values, top.logprobs, atol=0.12, rtol=0.0)


@pytest.mark.parametrize("bits", [3, 6, 8, 10])
def test_finer_values_cost_less_error(bits):
    top = TEACHER.top(16)
    error = TEACHER.kl(through(SetCodedConfig(k=16, value_bits=bits).build(), top)) - TEACHER.kl(
        top
    )
    assert 0 <= error.mean() < 20 / 4**bits


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**31), st.floats(0.01, 30))
def test_any_distribution_comes_back(k, places, seed, spread):
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(places, k + 1, generator=rng)
    logprobs = logits.log_softmax(1)[:, :-1].sort(1, descending=True).values
    ids = torch.stack([torch.randperm(VOCAB_SIZE, generator=rng)[:k] for _ in range(places)])
    given_ = Entries(ids, logprobs, tail_of(logprobs))
    out = through(SetCodedConfig(k=k).build(), given_, [places])
    assert torch.equal(out.ids, ids.sort(1).values)
    mass = out.logprobs.double().exp().sum(1) + out.tail.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    values = logprobs.gather(1, ids.argsort(1))
    depth = values.amax(1, keepdim=True) - values
    step = 2 * (depth * depth.amax(1, keepdim=True)).sqrt() / 255 + depth.amax() / 255**2
    found = out.logprobs.amax(1, keepdim=True) - out.logprobs
    assert ((found - depth).abs() <= 0.51 * step + 1e-3 * depth + 1e-5).all()


def test_samples_are_packed_apart():
    top = TEACHER.top(32)
    codec = SetCodedConfig(k=32, value_bits=7).build()
    together = codec.encode(top, torch.tensor([5, 0, 19]))
    for name in codec.columns:
        parts = [
            codec.encode(part, torch.tensor([len(part)]))[name].data
            for part in (top.select(torch.arange(5)), top.select(torch.arange(5, 24)))
        ]
        assert torch.equal(together[name].data, torch.cat(parts))
        assert together[name].sizes.tolist() == [len(parts[0]), 0, len(parts[1])]
    torch.testing.assert_close(
        through(codec, top, [5, 0, 19]).logprobs, through(codec, top).logprobs
    )


def test_bytes_that_are_no_codes_are_refused():
    codec, places = SetCodedConfig(k=8).build(), torch.tensor([24])
    columns = {n: c.data for n, c in codec.encode(TEACHER.top(8), places).items()}
    for name, column in columns.items():
        with pytest.raises(DataError, match=f"bytes of {name}"):
            codec.decode({**columns, name: column[:-1]}, places)
    positive = torch.tensor([1.0]).half().view(torch.uint8).repeat(24)
    with pytest.raises(DataError, match="a mass above one"):
        codec.decode({**columns, "tail": positive}, places)
    with pytest.raises(DataError, match="not a number"):
        codec.decode({**columns, "tail": columns["tail"] | 255}, places)
