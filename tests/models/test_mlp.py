"""Feed-forward networks: worked examples and invariants."""

import pytest
import torch
from torch import tensor

from vpmoe.models.mlp import Mlp, clamped_swiglu, relu2, swiglu
from vpmoe.models.norm import rms_norm


@pytest.fixture
def mlp():
    mlp = Mlp(2, 3, activation="relu2", bias=True).double()
    with torch.no_grad():
        mlp.up.weight.copy_(tensor([[0.5, -1], [1, 0.5], [-0.5, 0.25]]))
        mlp.up.bias.copy_(tensor([0.1, -0.2, 0.3]))
        mlp.down.weight.copy_(tensor([[1, 0.5, -1], [0, 2, 1]]))
        mlp.down.bias.copy_(tensor([0.05, -0.05]))
    return mlp


def test_worked_example(mlp):
    x = tensor([1, 0.4], dtype=torch.float64, requires_grad=True)
    y = mlp(x)
    y.backward(tensor([1.0, -1.0]).double())
    assert y.tolist() == pytest.approx([0.59, 1.95])
    assert x.grad.tolist() == pytest.approx([-2.8, -1.9])
    assert mlp.up.weight.grad.flatten().tolist() == pytest.approx([0.4, 0.16, -3, -1.2, 0, 0])
    assert mlp.up.bias.grad.tolist() == pytest.approx([0.4, -3, 0])
    assert mlp.down.weight.grad.flatten().tolist() == pytest.approx([0.04, 1, 0, -0.04, -1, 0])
    assert mlp.down.bias.grad.tolist() == [1, -1]


def test_positive_homogeneity(mlp):
    x = torch.randn(5, 2, dtype=torch.float64)
    before = mlp(x) - mlp.down.bias
    with torch.no_grad():
        mlp.up.weight *= 3
        mlp.up.bias *= 3
        mlp.down.weight *= 0.5
    torch.testing.assert_close(mlp(x) - mlp.down.bias, before * 9 * 0.5)


def test_order_of_neurons_does_not_matter(mlp):
    x, order = torch.randn(5, 2, dtype=torch.float64), tensor([2, 0, 1])
    before = mlp(x)
    with torch.no_grad():
        mlp.up.weight.copy_(mlp.up.weight[order])
        mlp.up.bias.copy_(mlp.up.bias[order])
        mlp.down.weight.copy_(mlp.down.weight[:, order])
    torch.testing.assert_close(mlp(x), before)


def test_the_square_comes_after_the_relu():
    assert relu2(tensor([-3.0, 0.0, 2.0])).tolist() == [0, 0, 4]


def test_clamped_swiglu_worked_example():
    interleaved = tensor([8.0, -9, -2, 3], dtype=torch.float64, requires_grad=True)
    out = clamped_swiglu(interleaved[::2], interleaved[1::2])
    out.sum().backward()
    assert out.tolist() == pytest.approx([-41.999719, -0.257366], abs=1e-6)
    assert interleaved.grad[:2].tolist() == [0, 0]  # both clamped
    assert interleaved.grad[2:].count_nonzero() == 2


def test_swiglu_definition():
    gate, up = torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)


def test_rms_norm_definition_and_dtype():
    x, gamma = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gamma
    torch.testing.assert_close(rms_norm(x, gamma, eps=1e-6), by_hand)
    half = rms_norm(x.bfloat16(), gamma.bfloat16(), eps=1e-6)
    wide = rms_norm(x.bfloat16().float(), gamma.bfloat16().float(), eps=1e-6)
    assert torch.equal(half, wide.bfloat16())  # one rounding, at the end
