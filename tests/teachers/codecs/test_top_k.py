"""Plain top-K: float16 values and exact ids in their order, 4.25 bytes an entry."""

import pytest
import torch

from tests.teachers.codecs.made import distributions, size, through
from vpmoe.config import ConfigError, validate
from vpmoe.errors import DataError
from vpmoe.teachers.codecs.top_k import TopKConfig

TEACHER = distributions(12)


def test_ids_are_exact_and_values_are_float16():
    top = TEACHER.top(64)
    out = through(TopKConfig(k=64).build(), top)
    assert torch.equal(out.ids, top.ids)
    torch.testing.assert_close(out.logprobs, top.logprobs, atol=3e-4, rtol=2**-11)
    flat = slice(0, 4)  # where much is left, one minus the rounded sum still says how much
    torch.testing.assert_close(out.tail[flat], top.tail[flat], atol=0.01, rtol=0.0)


@pytest.mark.parametrize(("k", "size_then"), [(64, 274), (32, 138), (50, 215)])
def test_bytes(k, size_then):
    assert size(TopKConfig(k=k).build(), TEACHER.top(k)) == size_then


def test_rounding_never_lifts_the_mass_above_one():
    certain = torch.full((1, 4), -20.0)
    certain[0, 0] = -1e-8
    top = distributions(1).top(4)
    out = through(TopKConfig(k=4).build(), type(top)(top.ids, certain, top.tail))
    assert out.logprobs.double().exp().sum() <= 1 + 1e-7
    assert out.tail.isfinite().all()


def test_bytes_that_are_no_codes_are_refused():
    codec = TopKConfig(k=4).build()
    columns = {n: c.data for n, c in codec.encode(TEACHER.top(4), torch.tensor([12])).items()}
    for name, column in columns.items():
        with pytest.raises(DataError, match=f"bytes of {name}"):
            codec.decode({**columns, name: column[:-1]}, torch.tensor([12]))
    with pytest.raises(DataError, match="outside the vocabulary"):
        codec.decode({**columns, "ids": columns["ids"] | 255}, torch.tensor([12]))
    with pytest.raises(DataError, match="not a number"):
        codec.decode({**columns, "values": columns["values"] | 255}, torch.tensor([12]))


def test_k_is_bounded():
    with pytest.raises(ConfigError, match="k"):
        validate(TopKConfig, {"k": 0}, source="test")
