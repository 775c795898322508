"""NorMuon: the worked example, and what must not matter."""

import pytest
import torch

from vpmoe.optim import NorMuonConfig
from vpmoe.optim.normuon import (
    MatrixBucket,
    matrix_buckets,
    normuon_update,
    second_moment_shape,
    update_scale,
)
from vpmoe.optim.polar_express import polar_express
from vpmoe.optim.weights import Weight

G1 = torch.tensor([[[3.0, 0], [0, 4], [1, 2]]], dtype=torch.float64)
G2 = torch.tensor([[[1.0, -1], [2, 0.5], [0, 1]]], dtype=torch.float64)


def random_stack(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def run(gradients, *, config=None, active=None):
    """Updates of successive gradients from a zero state, and the state after them."""
    config = config or NorMuonConfig()
    stack, rows, cols = gradients[0].shape
    momentum = torch.zeros(stack, rows, cols, dtype=torch.float64)
    kept = second_moment_shape(rows, cols, axis=config.second_moment_axis)
    second = torch.zeros(stack, *kept, dtype=torch.float64)
    updates = [
        normuon_update(g.clone(), momentum, second, active, config=config) for g in gradients
    ]
    return updates, momentum, second


def reference_update(gradient, momentum, second_moment, config):
    """One matrix, line by line from the formulas."""
    momentum = config.momentum * momentum + (1 - config.momentum) * gradient
    ahead = (1 - config.momentum) * gradient + config.momentum * momentum
    polar = polar_express(ahead, steps=config.polar_steps)
    axis = 1 if second_moment.shape[1] == 1 else 0
    mean = (polar * polar).mean(dim=axis, keepdim=True)
    second_moment = config.beta2 * second_moment + (1 - config.beta2) * mean
    scaled = polar / (second_moment + 1e-10).sqrt()
    scaled = scaled * polar.norm() / scaled.norm()
    return scaled * update_scale(*gradient.shape, scale=config.scale), momentum, second_moment


def test_worked_example_of_the_first_step():
    updates, _, second = run([G1])
    assert second.flatten().tolist() == pytest.approx([0.026408, 0.016528, 0.005545], abs=6e-7)
    assert updates[0].flatten().tolist() == pytest.approx(
        [0.981390, -0.080545, -0.135750, 0.975288, 0.596714, 0.783293], abs=6e-7
    )
    assert (updates[0] / 1.5**0.5).flatten().tolist() == pytest.approx(
        [0.801302, -0.065764, -0.110839, 0.796319, 0.487215, 0.639556], abs=6e-7
    )
    assert (updates[0] / 1.5**0.5).norm().item() == pytest.approx(1.392562, abs=6e-7)
    rms = run([G1], config=NorMuonConfig(scale="rms"))[0][0]
    assert rms.flatten().tolist() == pytest.approx(
        [0.277579, -0.022781, -0.038396, 0.275853, 0.168776, 0.221549], abs=6e-7
    )


def test_worked_example_of_the_second_step():
    updates, _, second = run([G1, G2])
    assert updates[1].flatten().tolist() == pytest.approx(
        [0.907956, -0.472419, 0.697302, 0.850080, 0.126528, 1.169736], abs=6e-7
    )
    assert second.flatten().tolist() == pytest.approx([0.051659, 0.038631, 0.016446], abs=6e-7)


@pytest.mark.parametrize("axis", ["row", "long"])
@pytest.mark.parametrize("shape", [(3, 4, 9), (3, 9, 4), (2, 5, 5)])
def test_a_stack_is_its_matrices_one_by_one(shape, axis):
    """No statistic is shared along the stack, even when one slice's gradient is enormous."""
    config = NorMuonConfig(second_moment_axis=axis, scale="rms")
    gradients = [random_stack(*shape, seed=seed) for seed in range(3)]
    for gradient in gradients:
        gradient[1] *= 1e8
    updates, momentum, second = run(gradients, config=config)
    for index in range(shape[0]):
        m = torch.zeros(shape[1:], dtype=torch.float64)
        v = torch.zeros_like(second[0])
        for step, gradient in enumerate(gradients):
            update, m, v = reference_update(gradient[index], m, v, config)
            torch.testing.assert_close(updates[step][index], update, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(momentum[index], m, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(second[index], v, rtol=1e-12, atol=1e-13)


def test_normalisation_keeps_the_norm():
    gradient = random_stack(4, 8, 5)
    update = run([gradient])[0][0] / update_scale(8, 5, scale="fork")
    polar = polar_express(0.0975 * gradient)
    torch.testing.assert_close(update.norm(dim=(1, 2)), polar.norm(dim=(1, 2)))


@pytest.mark.parametrize(
    ("rows", "cols", "expected"),
    [(128, 1024, 0.03125), (1024, 1024, 0.03125), (1024, 128, 0.08839), (1024, 512, 0.04419)],
)
def test_root_mean_square_of_an_orthogonal_update(rows, cols, expected):
    """Per unit of learning rate: the table of sizes, and .2 everywhere under `rms`."""
    entry = min(rows, cols) ** 0.5 / (rows * cols) ** 0.5  # of an orthogonal matrix
    assert entry * update_scale(rows, cols, scale="fork") == pytest.approx(expected, abs=5e-6)
    assert entry * update_scale(rows, cols, scale="rms") == pytest.approx(0.2)


def test_second_moment_keeps_rows_or_the_longer_side():
    assert second_moment_shape(3, 7, axis="row") == (3, 1)
    assert second_moment_shape(3, 7, axis="long") == (1, 7)
    assert second_moment_shape(7, 3, axis="long") == (7, 1)


def test_resting_slices_keep_their_state_bit_for_bit():
    shape = (3, 4, 6)
    config = NorMuonConfig()
    gradients = random_stack(*shape)
    momentum, second = random_stack(*shape, seed=1), random_stack(3, 4, 1, seed=2).square()
    before = momentum.clone(), second.clone()
    gradients[1] = 0
    active = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    update = normuon_update(gradients.clone(), momentum, second, active, config=config)
    assert torch.equal(update[1], torch.zeros(4, 6, dtype=torch.float64))
    assert torch.equal(momentum[1], before[0][1])
    assert torch.equal(second[1], before[1][1])
    free = normuon_update(gradients.clone(), before[0], before[1], config=config)
    torch.testing.assert_close(update[[0, 2]], free[[0, 2]], rtol=1e-12, atol=0)


def test_a_zero_gradient_from_a_zero_state_moves_nothing():
    update = run([torch.zeros(2, 3, 4, dtype=torch.float64)])[0][0]
    assert torch.equal(update, torch.zeros(2, 3, 4, dtype=torch.float64))


def weights_of(*shapes):
    return [
        Weight(f"layers.{i}.attention.q_proj.weight", torch.nn.Parameter(random_stack(*s, seed=i)))
        for i, s in enumerate(shapes)
    ]


def test_matrices_of_one_shape_share_a_bucket():
    weights = weights_of((4, 6), (6, 4), (4, 6), (3, 4, 6))
    buckets = matrix_buckets(weights, NorMuonConfig())
    assert [[w.name.split(".")[1] for w in b.weights] for b in buckets] == [["0", "2", "3"], ["1"]]
    assert buckets[0].momentum.shape == (5, 4, 6)


def test_a_bucket_moves_its_matrices_as_each_would_move_alone():
    config = NorMuonConfig(weight_decay=0.1)
    together, alone = weights_of((4, 6), (3, 4, 6)), weights_of((4, 6), (3, 4, 6))
    for step in range(2):
        for pair in zip(together, alone, strict=True):
            for weight in pair:
                weight.param.grad = random_stack(*weight.param.shape, seed=10 + step)
        if step == 0:
            bucket = MatrixBucket(together, config)
            lone = [MatrixBucket([weight], config) for weight in alone]
        for part in [bucket, *lone]:
            part.step(0.1, {})
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.param.data, other.param.data, rtol=1e-12, atol=1e-13)


def test_decay_and_update_are_decoupled():
    """W <- W (1 - lr wd) - lr c O3, here with lr = .5 and wd = .2."""
    weight = Weight("q_proj.weight", torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64)))
    weight.param.grad = G1[0].clone()
    MatrixBucket([weight], NorMuonConfig(weight_decay=0.2)).step(0.5, {})
    expected = 0.9 - 0.5 * run([G1])[0][0][0]
    torch.testing.assert_close(weight.param.data, expected, rtol=1e-12, atol=0)


def test_bfloat16_momentum_is_close_to_float32():
    gradients = [random_stack(2, 8, 6, seed=seed).float() for seed in range(5)]
    moved = {}
    for dtype in ("float32", "bfloat16"):
        weight = Weight("experts.up_weight", torch.nn.Parameter(torch.zeros(2, 8, 6)))
        bucket = MatrixBucket([weight], NorMuonConfig(momentum_dtype=dtype))
        assert str(bucket.momentum.dtype) == f"torch.{dtype}"
        for gradient in gradients:
            weight.param.grad = gradient
            bucket.step(0.1, {})
        moved[dtype] = weight.param.detach()
    difference = (moved["bfloat16"] - moved["float32"]).norm() / moved["float32"].norm()
    assert 0 < difference < 2e-2
