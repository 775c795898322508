"""Rotations, distance penalties and YaRN: worked examples, invariants, formulas of gradients."""

import math

import pytest
import torch
from torch import tensor

from vpmoe.models.positions import (
    GrapeM,
    GrapeMConfig,
    NoPositionConfig,
    Rope,
    RopeConfig,
    YarnConfig,
    alibi_slopes,
    build_position,
    grape_frequencies,
    rope_log_frequencies,
    rotate,
    rotation_of,
    yarn_attention_factor,
    yarn_frequencies,
)


def turned(vector: torch.Tensor, position: int, omega: torch.Tensor) -> torch.Tensor:
    rotation = rotation_of(tensor([[position]]), omega)
    return rotate(vector.view(1, 1, 1, -1), rotation).flatten()


def test_log_freq_starts_at_ropes_spectrum():
    start = 16 * rope_log_frequencies(8, base=1e4)
    assert start.tolist() == pytest.approx([0, -36.841361, -73.682723, -110.524084], abs=1e-6)
    longest = 16 * rope_log_frequencies(128, base=1e4)
    assert longest[[0, 1, 63]].tolist() == pytest.approx([0, -2.302585, -145.062861], abs=1e-6)


def test_rotation_worked_example():
    x = torch.arange(1, 9, dtype=torch.float64) / 8
    omega = rope_log_frequencies(8, base=1e4).exp()
    expected = [-0.211949, 0.017194, 0.348585, 0.496998, -0.601105, 0.790382, 0.885855, 1.001495]
    assert turned(x, 3, omega).tolist() == pytest.approx(expected, abs=1e-6)


def test_score_and_gradient_worked_example():
    log_freq = (16 * rope_log_frequencies(8, base=1e4)).requires_grad_()
    omega = grape_frequencies(log_freq, log_freq_scale=16.0)
    q = torch.arange(1, 9, dtype=torch.float64) / 8
    k = torch.arange(8, dtype=torch.float64).cos()
    score = turned(q, 7, omega) @ turned(k, 3, omega)
    score.backward()
    assert score.item() == pytest.approx(1.887219, abs=1e-6)
    assert log_freq.grad.tolist() == pytest.approx(
        [0.061840, -0.011084, 0.001741, 0.000341], abs=1e-6
    )


def test_gradient_of_frequencies_equals_its_formula():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    log_freq = (torch.randn(8, dtype=torch.float64) * 8 - 16).requires_grad_()
    omega = grape_frequencies(log_freq, log_freq_scale=16.0)
    (turned(q, 50, omega) @ turned(k, 11, omega)).backward()
    w, distance = omega.detach(), 39
    a = q[:8] * k[:8] + q[8:] * k[8:]
    b = q[:8] * k[8:] - q[8:] * k[:8]
    slope = distance * w / 16 * (-a * (distance * w).sin() + b * (distance * w).cos())
    torch.testing.assert_close(log_freq.grad, slope)


def test_rotation_keeps_norms_and_sees_only_offsets():
    torch.manual_seed(1)
    q, k = torch.randn(2, 32, dtype=torch.float64)
    omega = rope_log_frequencies(32, base=1e4).exp()
    torch.testing.assert_close(turned(q, 91, omega).norm(), q.norm())
    near = turned(q, 20, omega) @ turned(k, 5, omega)
    far = turned(q, 1_020, omega) @ turned(k, 1_005, omega)
    torch.testing.assert_close(near, far)


def test_rotation_equals_the_rank_two_generator():
    # exp(theta L) with L = a b^T - b a^T in closed form, first row of G(2) at omega 0.3.
    a, b = tensor([1.0, 2, 0, 0]).double(), tensor([0.0, 1, 1, 0]).double()
    generator = torch.outer(a, b) - torch.outer(b, a)
    turn = torch.matrix_exp(0.6 * generator)
    s = math.sqrt(float(a @ a * (b @ b) - (a @ b) ** 2))
    assert s == pytest.approx(2.449490, abs=1e-6)
    assert turn[0].tolist() == pytest.approx([0.700310, 0.106474, 0.705853, 0], abs=1e-6)
    # A canonical plane is the same thing: our half-split rotation is exp(-theta L) for e_i, e_j.
    plane = torch.zeros(4, 4, dtype=torch.float64)
    plane[1, 3], plane[3, 1] = -1, 1
    x = torch.randn(4, dtype=torch.float64)
    ours = turned(x, 5, tensor([0.0, 0.2]).double())
    torch.testing.assert_close(ours, torch.matrix_exp(5 * 0.2 * plane) @ x)


def test_grape_m_starts_as_rope_bit_for_bit():
    positions = torch.arange(4_096)[None]
    rope = Rope(RopeConfig(base=1e6), 128).rotation(positions)
    grape = GrapeM(GrapeMConfig(base=1e6), 128).rotation(positions)
    assert torch.equal(rope[0], grape[0])
    assert torch.equal(rope[1], grape[1])


def test_angles_stay_float32_for_bfloat16_vectors():
    x = torch.randn(1, 3, 2, 8)
    rotation = Rope(RopeConfig(), 8).rotation(tensor([[0, 1_000, 100_003]]))
    assert rotation[0].dtype == torch.float32
    close = rotate(x.bfloat16(), rotation)
    assert close.dtype == torch.bfloat16
    torch.testing.assert_close(close.float(), rotate(x, rotation), atol=0.03, rtol=0.02)


def test_slopes():
    assert alibi_slopes(8).tolist() == [2.0 ** -(h + 1) for h in range(8)]
    six = alibi_slopes(6)
    assert six.tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert bool((alibi_slopes(64).diff() < 0).all())


def test_penalty_as_a_unipotent_action():
    # A^2 = 0 and G(n) = I + n m A: (G(i)^-T e1)^T (G(j) e2) is the penalty m (j - i).
    a = tensor([[0.0, 1], [0, 0]]).double()
    e1, e2 = torch.eye(2, dtype=torch.float64)
    m, i, j = 0.25, 9, 4
    group = [torch.eye(2, dtype=torch.float64) + n * m * a for n in (i, j)]
    assert float((torch.linalg.inv(group[0]).T @ e1) @ (group[1] @ e2)) == pytest.approx(-1.25)
    assert -m * (i - j) == -1.25


def test_yarn_worked_example():
    yarn = YarnConfig(factor=8, original_length=4_096)
    omega = rope_log_frequencies(128, base=1e4).exp()
    stretched = yarn_frequencies(omega, yarn=yarn)
    at = [20, 24, 32, 40, 44, 46]
    assert stretched[at].tolist() == pytest.approx(
        [5.62341325e-2, 2.81120808e-2, 5.98313344e-3, 9.72857759e-4, 2.88633032e-4, 1.66690179e-4],
        rel=1e-8,
    )
    ramp = (1 - stretched / omega) / (1 - 1 / 8)
    assert ramp[at].tolist() == pytest.approx(
        [0, 0.126878, 0.459070, 0.791263, 0.957360, 1], abs=1e-6
    )
    assert yarn_attention_factor(8.0) == pytest.approx(1.207944, abs=1e-6)
    assert yarn_attention_factor(1.0) == 1


def test_yarn_of_the_public_teacher():
    yarn = YarnConfig(factor=32, original_length=4_096)
    stretched = yarn_frequencies(rope_log_frequencies(64, base=150_000.0).exp(), yarn=yarn)
    assert stretched[[8, 9, 12, 16, 17, 18, 31]].tolist() == pytest.approx(
        [
            5.08132748e-2,
            3.17056962e-2,
            6.79495949e-3,
            4.56483919e-4,
            1.29318701e-4,
            3.83088124e-5,
            3.02351143e-7,
        ],
        rel=1e-8,
    )
    assert yarn_attention_factor(32.0) == pytest.approx(1.346574, abs=1e-6)


def test_yarn_without_stretching_changes_nothing():
    omega = rope_log_frequencies(64, base=1e4).exp()
    unit = YarnConfig(factor=1 + 1e-15, original_length=4_096)
    torch.testing.assert_close(yarn_frequencies(omega, yarn=unit), omega)


def test_no_position_neither_turns_nor_penalises():
    position = build_position(NoPositionConfig(), num_heads=4, head_dim=8)
    assert position.rotation(torch.arange(3)[None]) is None
    assert position.slopes is None
