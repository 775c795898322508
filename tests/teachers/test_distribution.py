"""Likeliest tokens and draws against a dense float64 table; ties, chunks and blocks of any size."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import TeacherError
from vpmoe.teachers.distribution import BLOCK, Head, invert, likeliest


def by_sorting(logits, k):
    """Largest first, of equal ones the lower column first."""
    return np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits))[:, :k]


@pytest.mark.parametrize("vocab", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 1_000, 3_001])
@pytest.mark.parametrize("kind", ["distinct", "few values", "all equal", "minus zero"])
def test_the_likeliest_are_those_of_a_stable_sort(vocab, kind):
    random = np.random.default_rng(vocab)
    logits = random.normal(size=(5, vocab)).astype(np.float32) * 4
    if kind == "few values":
        logits = np.round(logits)
    elif kind == "all equal":
        logits[:] = -2.5
    elif kind == "minus zero":
        logits = np.where(random.random(logits.shape) < 0.5, 0.0, -0.0).astype(np.float32)
    for k in sorted({1, min(2, vocab), min(7, vocab), min(64, vocab), vocab}):
        found = likeliest(torch.from_numpy(logits), k).numpy()
        np.testing.assert_array_equal(found, by_sorting(logits, k))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_any_size_and_any_number_of_ties(vocab, k, levels, seed):
    logits = np.random.default_rng(seed).integers(-levels, levels, (3, vocab)).astype(np.float32)
    k = min(k, vocab)
    found = likeliest(torch.from_numpy(logits), k).numpy()
    np.testing.assert_array_equal(found, by_sorting(logits, k))


@pytest.mark.parametrize("k", [0, 12])
def test_more_than_there_are_is_refused(k):
    with pytest.raises(TeacherError, match=f"the {k} likeliest of 11 tokens"):
        likeliest(torch.zeros(2, 11), k)


@pytest.fixture
def dense():
    """A head, states, labels and their float64 table of log-probs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 6), torch.randn(401, 6)
    labels = torch.randint(401, (23,))
    table = (hidden.double() @ weight.double().T).log_softmax(1)
    return hidden, weight, labels, table


@pytest.mark.parametrize("chunk_rows", [1, 5, 1_000])
def test_chunks_give_the_dense_distribution(dense, chunk_rows):
    hidden, weight, labels, table = dense
    head = Head(weight, chunk_rows)
    expected = table.gather(1, labels[:, None])[:, 0].float()
    torch.testing.assert_close(head.logprobs(hidden, labels), expected, rtol=0, atol=3e-6)
    logprobs, ids, top = head.top(hidden, labels, 10)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=3e-6)
    assert torch.equal(ids, table.topk(10, dim=1).indices)
    torch.testing.assert_close(top, table.topk(10, dim=1).values.float(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_draws_invert_the_distribution_function(dense, power):
    hidden, weight, labels, table = dense
    chances = torch.rand(23, 9, dtype=torch.float64).sort(dim=1).values
    logprobs, ids, drawn = Head(weight, 4).drawn(hidden, labels, chances, power=power)
    below = (table * power).softmax(1).cumsum(1)
    assert torch.equal(ids, torch.searchsorted(below, chances, right=True))
    torch.testing.assert_close(drawn, table.gather(1, ids).float(), rtol=0, atol=3e-6)
    torch.testing.assert_close(logprobs, table.gather(1, labels[:, None])[:, 0].float())


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, BLOCK + 1, 1_000, 8_193])
def test_two_steps_find_what_one_search_finds(vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(50, vocab) * 3
    logits[:, 1::3] = -torch.inf
    chances = logits.exp()
    numbers = torch.rand(50, 40, dtype=torch.float64)
    numbers[:, 0], numbers[:, -1] = 0.0, 1 - 2**-53
    found = invert(chances, numbers)
    below = chances.double().cumsum(1)
    expected = torch.searchsorted(below, numbers * below[:, -1:], right=True)
    assert (found == expected)[:, :-1].double().mean() > 0.995  # sums of blocks are float32
    assert (found - expected).abs()[:, :-1].max() <= 2
    assert torch.isfinite(logits.gather(1, found)).all()  # nothing impossible was drawn


def test_the_ends_of_the_unit_interval():
    """What has no probability is never drawn, not even by a uniform number of 0 or almost 1."""
    weight = torch.tensor([[-2000.0], [0.0], [1.0], [-2000.0]])
    chances = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    _, ids, _ = Head(weight, 1).drawn(torch.ones(1, 1), torch.tensor([1]), chances, power=1.0)
    assert ids.tolist() == [[1, 2]]
