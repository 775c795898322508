"""Draws that belong to their sequence; weights whose expectation is the distribution."""

import numpy as np
import pytest
import torch

from vpmoe.teachers import draws as module
from vpmoe.teachers.draws import uniforms

SEQUENCE = np.array([5, 9, 2, 9])


def weighted(ids, logprobs, *, power):
    found = module.weighted(torch.from_numpy(ids), torch.from_numpy(logprobs).float(), power=power)
    return [tensor.numpy() for tensor in found]


def test_uniform_numbers_follow_from_seed_and_content():
    first = uniforms(SEQUENCE, num_draws=8, seed=1)
    np.testing.assert_array_equal(first, uniforms(SEQUENCE.astype(np.int32), num_draws=8, seed=1))
    for other in (
        uniforms(SEQUENCE, num_draws=8, seed=2),
        uniforms(np.array([5, 9, 2, 8]), num_draws=8, seed=1),
    ):
        assert not np.isclose(first, other).any()
    assert first.shape == (3, 8)
    np.testing.assert_array_equal(np.floor(first * 8), np.broadcast_to(np.arange(8), (3, 8)))


def test_each_id_once_with_its_frequency():
    ids = np.array([[1, 1, 4, 7], [2, 2, 2, 2], [0, 3, 3, 9]])
    once, log_weights = weighted(ids, np.full(ids.shape, -1.0), power=1.0)
    assert once.tolist() == [[1, 4, 7, 0], [2, 0, 0, 0], [0, 3, 9, 0]]
    expected = [[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0.25, 0.5, 0.25, 0]]
    np.testing.assert_allclose(np.exp(log_weights), expected, atol=1e-7)


def test_weights_undo_the_power_that_was_drawn_from():
    ids, probabilities = np.array([[0, 0, 1]]), np.array([[0.9, 0.9, 0.1]])
    _, log_weights = weighted(ids, np.log(probabilities), power=0.5)
    raw = np.array([2 * 0.9**0.5, 0.1**0.5])
    np.testing.assert_allclose(np.exp(log_weights[0, :2]), raw / raw.sum(), rtol=1e-6)


@pytest.mark.parametrize("draws", [1, 5])
def test_frequencies_are_unbiased(draws):
    p = np.array([0.55, 0.02, 0.3, 0.13])
    mean = np.zeros(4)
    for seed in range(4_000):
        chances = uniforms(np.array([3, 1]), num_draws=draws, seed=seed)
        ids = np.searchsorted(p.cumsum(), chances, side="right")
        once, log_weights = weighted(ids, np.log(p)[ids], power=1.0)
        np.add.at(mean, once[0], np.exp(log_weights[0]) / 4_000)
    error = np.sqrt(p * (1 - p) / 4_000 / draws)  # of independent draws, an upper bound
    assert (np.abs(mean - p) < 4 * error).all()


def test_no_places():
    once, log_weights = weighted(np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3)), power=1.0)
    assert once.shape == log_weights.shape == uniforms(np.array([4]), num_draws=3, seed=0).shape
