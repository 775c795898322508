"""Tensor-product attention: the worked example, special cases, order of operations."""

import pytest
import torch

from vpmoe.models.attention.base import AttentionShape, LayerView
from vpmoe.models.attention.sink import AttentionScope
from vpmoe.models.attention.tpa import TpaConfig, contract
from vpmoe.models.norm import rms_norm
from vpmoe.models.positions import rotate, rotation_of


def wave(shape: tuple[int, ...], off: float) -> torch.Tensor:
    count = torch.tensor(shape).prod().item()
    n = torch.arange(1, count + 1, dtype=torch.float64)
    return (0.5 * torch.sin(0.7 * n + off)).view(shape)


@pytest.fixture
def layer():
    shape = AttentionShape(
        hidden_size=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        bias=True,
        has_sinks=True,
        has_qk_norm=True,
        is_mixed=False,
        norm_eps=1e-6,
    )
    tpa = TpaConfig(rank=2, q_rank=3).build(shape).double()
    with torch.no_grad():
        for off, name in enumerate(("q_a", "k_a", "v_a", "q_b", "k_b", "v_b"), start=1):
            part = getattr(tpa, name)
            part.weight.copy_(wave(tuple(part.weight.shape), off / 10))
            if part.bias is not None:
                part.bias.zero_()
    return tpa


TOKENS = torch.cos(torch.arange(8, dtype=torch.float64)).view(1, 2, 4)
KEYS = [-0.268240, 0.222653, -0.151337, 0.062533, -0.423254, 0.299097, -0.140378, -0.034563]


def test_worked_example(layer):
    q, k, v = (part[0, 1].flatten().tolist() for part in layer.project(TOKENS))
    assert q[:8] == pytest.approx(
        [-0.114788, 0.159356, -0.185509, 0.190227, 0.183678, -0.164315, 0.125964, -0.073058],
        abs=1e-6,
    )
    assert q[8:] == pytest.approx(
        [-0.075976, 0.011298, 0.054686, -0.114351, -0.104771, 0.152581, -0.182760, 0.191820],
        abs=1e-6,
    )
    assert k == pytest.approx(KEYS, abs=1e-6)
    assert v == pytest.approx(
        [-0.237024, 0.213345, -0.165013, 0.097612, -0.436929, 0.334176, -0.192806, 0.029157],
        abs=1e-6,
    )


def test_norm_comes_before_rotation():
    k = torch.tensor(KEYS, dtype=torch.float64).view(1, 1, 2, 4)
    gamma = torch.tensor([1, 2, 0.5, 1.5], dtype=torch.float64)
    omega = torch.tensor([1, 0.01], dtype=torch.float64)
    rotation = rotation_of(torch.tensor([[5]]), omega)
    assert rotate(k, rotation).flatten().tolist() == pytest.approx(
        [-0.221210, 0.219249, 0.214294, 0.073583, -0.254673, 0.300451, 0.366049, -0.019571],
        abs=2e-6,
    )
    ours = rotate(rms_norm(k, gamma, eps=1e-6), rotation)
    assert ours.flatten().tolist() == pytest.approx(
        [-0.771897, 2.285113, 1.224222, 0.602037, -0.696455, 2.230378, 1.434633, -0.081338],
        abs=2e-5,
    )
    other = rms_norm(rotate(k, rotation), gamma, eps=1e-6)
    assert other.flatten()[:4].tolist() == pytest.approx(
        [-1.148682, 2.276998, 0.556382, 0.573144], abs=2e-5
    )


def test_layer_follows_the_pinned_order(layer):
    """Contract, bias, QK-norm, rotation, value mix: rebuilt by hand from the parts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name in ("q_bias", "k_bias", "v_bias"):
            getattr(layer, name).normal_()
        layer.q_norm.gamma.copy_(torch.tensor([1, 2, 0.5, 1.5]))
        layer.k_norm.gamma.copy_(torch.tensor([0.7, 1, 2, 0.1]))
    layer.value_lambda = torch.nn.Parameter(torch.tensor([0.8], dtype=torch.float64))
    rotation = rotation_of(torch.arange(2)[None], torch.tensor([1, 0.01], dtype=torch.float64))
    first = torch.randn(1, 2, 2, 4, dtype=torch.float64)
    seen = {}

    def attend(q, k, v, scope, *, sinks, slopes):
        seen.update(q=q, k=k, v=v)
        return q

    scope = AttentionScope(torch.arange(2)[None], None, torch.zeros(1, 2).long(), None)
    view = LayerView(scope, rotation, None, attend)
    _, own = layer(TOKENS, view, first)
    q, k, v = layer.project(TOKENS)
    torch.testing.assert_close(seen["q"], rotate(layer.q_norm(q), rotation))
    torch.testing.assert_close(seen["k"], rotate(layer.k_norm(k), rotation))
    torch.testing.assert_close(seen["v"], 0.8 * v + 0.2 * first)
    assert own is None
    layer.value_lambda = None
    torch.testing.assert_close(layer(TOKENS, view, None)[1], v)


def test_contraction_equals_a_double_loop():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 10, dtype=torch.float64)
    heads = contract(a, b, rank=2)
    for head in range(4):
        by_hand = sum(a[..., head * 2 + r, None] * b[..., r * 5 : r * 5 + 5] for r in range(2)) / 2
        torch.testing.assert_close(heads[:, :, head], by_hand)


def test_scaled_mixtures_scale_queries_and_vanish_under_the_norm(layer):
    q = layer.project(TOKENS)[0]
    with torch.no_grad():
        layer.q_a.weight *= 3
    scaled = layer.project(TOKENS)[0]
    torch.testing.assert_close(scaled, 3 * q)
    unit = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(scaled, unit, eps=1e-18), rms_norm(q, unit, eps=1e-18))


def test_rotating_the_vectors_equals_rotating_the_product():
    torch.manual_seed(0)
    a, b = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 3, 12, dtype=torch.float64)
    rotation = rotation_of(torch.arange(3)[None], torch.tensor([1, 0.1, 0.01]).double())
    turned = rotate(b.unflatten(-1, (2, 6)), rotation).flatten(-2)
    after = rotate(contract(a, b, rank=2), rotation)
    torch.testing.assert_close(contract(a, turned, rank=2), after, atol=1e-14, rtol=0)


def test_query_rank_is_bounded(layer):
    queries = layer.project(torch.randn(1, 5, 4, dtype=torch.float64))[0]
    assert torch.linalg.matrix_rank(queries).max() <= 3


def test_constant_mixtures_are_grouped_query_attention(layer):
    torch.manual_seed(0)
    key_map = torch.randn(8, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.k_a.weight.zero_()
        layer.k_a.bias.copy_(2 * torch.eye(2).flatten())
        layer.k_b.weight.copy_(key_map)
    keys = layer.project(TOKENS)[1].flatten(2)
    torch.testing.assert_close(keys, TOKENS @ key_map.T)
