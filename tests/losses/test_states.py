"""Matching inner states: worked example, gradients, projections, partitions, saved state."""

import pytest
import torch

from vpmoe.config import validate
from vpmoe.errors import ConfigError
from vpmoe.losses import CrossEntropyConfig, LossInputs, span_scales
from vpmoe.losses.states import (
    StateMatch,
    StateMatchConfig,
    cosine_distance,
    mean_square_distance,
)

ROWS, DIM, TEACHER_DIM, VOCAB = 40, 5, 7, 11
WEIGHTS = torch.tensor([0.0, 1.0, 0.7])


def rows_of(*, teacher_dim=TEACHER_DIM, layers=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LossInputs(
        hidden=draw(ROWS, DIM),
        head_weight=draw(VOCAB, DIM),
        labels=torch.randint(VOCAB, (ROWS,), generator=generator),
        span_ids=torch.randint(3, (ROWS,), generator=generator, dtype=torch.uint8),
        content_mask=torch.ones(ROWS, dtype=torch.bool),
        row_weights=torch.rand(ROWS, generator=generator, dtype=torch.float64),
        student_states=draw(ROWS, layers, DIM).requires_grad_(),
        teacher_states=draw(ROWS, layers, teacher_dim),
    )


def loss_of(*, teacher_dim=TEACHER_DIM, **changes):
    config = StateMatchConfig(**{"layers": ((1, 2), (3, 4)), "weight": 0.5, **changes})
    inner = CrossEntropyConfig().build()
    return StateMatch(inner, config, student_dim=DIM, teacher_dim=teacher_dim, seed=1)


def test_worked_example():
    h = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    value = cosine_distance(h, u)
    value.backward()
    assert value.item() == pytest.approx(0.403715, abs=5e-7)
    assert h.grad.tolist() == pytest.approx([-0.231889, 0.132508, -0.016563], abs=5e-7)
    assert mean_square_distance(h, u).item() == pytest.approx(2.0)


def test_a_state_of_zeros_is_no_nan():
    h = torch.zeros(3, requires_grad=True)
    cosine_distance(h, torch.ones(3)).backward()
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("measure", ["cosine", "mse"])
@pytest.mark.parametrize("teacher_dim", [DIM, TEACHER_DIM])
def test_total_and_gradients(measure, teacher_dim):
    """Cross-entropy plus weight x mean over the pairs; gradients in closed form."""
    inputs = rows_of(teacher_dim=teacher_dim)
    loss = loss_of(measure=measure, teacher_dim=teacher_dim)
    assert (loss.projection is None) == (teacher_dim == DIM)
    scales = span_scales(WEIGHTS, inputs.span_ids.bincount(minlength=3))
    output = loss(inputs, scales)
    plain = CrossEntropyConfig().build()(inputs, scales)
    coefficients = scales[inputs.span_ids.long()] * inputs.row_weights
    wanted, projected_grad = torch.zeros(()).double(), []
    state_grad = torch.zeros_like(inputs.student_states)
    for layer in range(2):
        h, u = inputs.student_states[:, layer].detach(), inputs.teacher_states[:, layer]
        matrix = None if loss.projection is None else loss.projection[layer].detach().double()
        x = h if matrix is None else h @ matrix
        if measure == "mse":
            values, slope = ((x - u) ** 2).mean(1), 2 * (x - u) / u.shape[1]
        else:
            xn, un = x / x.norm(dim=1, keepdim=True), u / u.norm(dim=1, keepdim=True)
            cosine = (xn * un).sum(1, keepdim=True)
            values, slope = 1 - cosine[:, 0], -(un - cosine * xn) / x.norm(dim=1, keepdim=True)
        slope = 0.5 / 2 * coefficients[:, None] * slope
        wanted += 0.5 / 2 * (coefficients * values).sum()
        state_grad[:, layer] = slope if matrix is None else slope @ matrix.T
        projected_grad.append(h.T @ slope)
    torch.testing.assert_close(output.total, plain.total + wanted, rtol=1e-10, atol=1e-12)
    total_of_sums = (scales * output.loss_sums).sum()
    torch.testing.assert_close(output.total.detach().double(), total_of_sums)
    output.total.backward()
    torch.testing.assert_close(inputs.student_states.grad, state_grad, rtol=1e-9, atol=1e-12)
    own = loss.own_gradients()
    if loss.projection is None:
        assert own == {}
    else:
        expected = torch.stack(projected_grad).float()
        torch.testing.assert_close(own["projection"], expected, rtol=1e-4, atol=1e-7)
        assert not loss.own_gradients()["projection"].any()


def step(loss, inputs, parts):
    """One optimizer step over micro-batches of some ranks, whose gradients are summed."""
    scales = span_scales(WEIGHTS, inputs.span_ids.bincount(minlength=3))
    sums = {}
    for part in parts:
        output = loss(inputs.select(part), scales)
        output.total.backward()
        for name, value in (output.sums | loss.own_gradients()).items():
            sums[name] = sums.get(name, 0) + value.double()
    loss.after_step(sums)
    return sums


def test_projections_do_not_depend_on_the_partition_and_survive_a_save():
    whole, parted = loss_of(), loss_of()
    parts = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).split(7)
    before = whole.projection.detach().clone()
    for seed in range(3):
        sums = step(whole, rows_of(seed=seed), [torch.arange(ROWS)])
        step(parted, rows_of(seed=seed), parts)
        assert sums["state_distance"].sum() > 0
    torch.testing.assert_close(whole.projection, parted.projection, rtol=1e-4, atol=1e-6)
    moved = (whole.projection - before).abs().mean().item()
    assert 0.5e-3 < moved < 3.5e-3  # three steps of about the learning rate
    resumed = loss_of()
    resumed.load_state_dict(whole.state_dict())
    for loss in (whole, resumed):
        step(loss, rows_of(seed=9), [torch.arange(ROWS)])
    assert torch.equal(whole.projection, resumed.projection)


def test_training_the_projection_brings_states_nearer():
    loss, inputs = loss_of(projection_lr=0.05, measure="mse"), rows_of()
    distances = [float(step(loss, inputs, [torch.arange(ROWS)])["state_distance"].sum())]
    for _ in range(60):
        distances.append(float(step(loss, inputs, [torch.arange(ROWS)])["state_distance"].sum()))
    assert distances[-1] < 0.75 * distances[0]


def test_a_map_of_no_layers_is_refused():
    with pytest.raises(ConfigError, match="from 1 on"):
        validate(StateMatchConfig, {"layers": []}, source="test")
    with pytest.raises(ConfigError, match="from 1 on"):
        validate(StateMatchConfig, {"layers": [[0, 1]]}, source="test")
