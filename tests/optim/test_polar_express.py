"""Polar Express: its tables from first principles, and what it promises of singular values."""

import numpy as np
import pytest
import torch

from vpmoe.optim.polar_express import COEFFICIENTS, SAFETY, polar_express, polar_reference

# Singular values that an input divided by its norm may end with, by number of steps.
BANDS = {5: (0.8466, 1.1411), 6: (0.9961, 1.0023), 7: (1 - 5e-7, 1 + 5e-7), 8: (1 - 1e-8, 1 + 1e-8)}


def random_matrices(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def powers(x):
    return np.array([x, x**3, x**5])


def minimax_quintic(lower, upper):
    """The odd quintic nearest to 1 on an interval, by Remez's exchange of four points."""
    if 1 - lower / upper < 5e-6:
        return np.array([15 / 8, -10 / 8, 3 / 8]) / powers(upper)
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = np.inf
    while True:
        points = np.array([lower, q, r, upper])
        system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
        a, b, c, new_error = np.linalg.solve(system, np.ones(4))
        if abs(error - new_error) < 1e-15:
            return np.array([a, b, c])
        error = new_error
        q, r = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))


def regenerate(steps, *, cushion=0.02, safety=SAFETY):
    """The table for a number of steps: each polynomial fits the interval the last one left."""
    lower, upper, table = 1e-3, 1.0, []
    for step in range(steps):
        polynomial = minimax_quintic(max(lower, cushion * upper), upper)
        if cushion * upper > lower:
            polynomial = polynomial * 2 / (polynomial @ powers(lower) + polynomial @ powers(upper))
        if step < steps - 1:
            polynomial = polynomial / powers(safety)
        table.append(polynomial)
        lower = polynomial @ powers(lower)
        upper = 2 - lower
    return np.array(table)


@pytest.mark.parametrize("steps", COEFFICIENTS)
def test_tables_are_the_minimax_polynomials(steps):
    assert len(COEFFICIENTS[steps]) == steps
    table, expected = np.array(COEFFICIENTS[steps]), regenerate(steps)
    np.testing.assert_allclose(table[:7], expected[:7], rtol=0, atol=1e-9)
    # The eighth interval is so narrow that the exchange's linear system loses half its digits.
    np.testing.assert_allclose(table[7:], expected[7:], rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", COEFFICIENTS)
def test_singular_values_land_in_the_band(steps):
    """Diagonal input: the matrix iteration acts on each singular value as the scalar one."""
    values = torch.logspace(-3, 0, 400, dtype=torch.float64)
    for value in values[::40]:
        rest = (1 - value.square()).sqrt()  # together of norm 1
        out = polar_express(torch.diag(torch.stack([value, rest])), steps=steps).diagonal()
        low, high = BANDS[steps]
        assert low - 5e-5 <= out[0] <= high + 5e-5
        assert out[1] <= high + 5e-5


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, 0.903537), (0.5, 1.086403), (0.1, 1.016459), (0.01, 0.996775), (0.001, 0.846647)],
)
def test_scalar_worked_example(value, expected):
    """x0 = s / 1.02 through the five polynomials."""
    x = value / SAFETY
    for a, b, c in COEFFICIENTS[5]:
        x = a * x + b * x**3 + c * x**5
    assert x == pytest.approx(expected, abs=5e-7)


def test_worked_example():
    gradient = torch.tensor([[3.0, 0], [0, 4], [1, 2]], dtype=torch.float64)
    out = polar_express(0.0975 * gradient)
    assert out.flatten().tolist() == pytest.approx(
        [1.024332, -0.084069, -0.112092, 0.805317, 0.285398, 0.374636], abs=6e-7
    )
    assert torch.linalg.svdvals(out).tolist() == pytest.approx([1.075477, 0.884634], abs=6e-7)
    assert polar_reference(gradient).flatten().tolist() == pytest.approx(
        [0.956661, -0.056274, -0.075032, 0.900387, 0.281371, 0.431435], abs=6e-7
    )


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
def test_eight_steps_are_the_svd(shape):
    matrices = random_matrices(4, *shape)
    torch.testing.assert_close(
        polar_express(matrices, steps=8), polar_reference(matrices), rtol=0, atol=1e-7
    )


def test_a_stack_is_its_matrices_one_by_one():
    matrices = random_matrices(2, 3, 4, 7)
    matrices[1, 2] *= 1e6  # a neighbour's size must not matter
    together = polar_express(matrices)
    for i in range(2):
        for j in range(3):
            alone = polar_express(matrices[i, j])
            torch.testing.assert_close(together[i, j], alone, rtol=1e-12, atol=1e-13)


def test_transposing_the_input_transposes_the_output():
    matrices = random_matrices(3, 4, 7)
    torch.testing.assert_close(
        polar_express(matrices.mT), polar_express(matrices).mT, rtol=1e-12, atol=1e-13
    )


def test_the_size_of_the_input_does_not_matter():
    matrices = random_matrices(4, 7)
    torch.testing.assert_close(
        polar_express(10 * matrices), polar_express(matrices), rtol=1e-5, atol=1e-6
    )


def test_zero_stays_zero():
    assert torch.equal(polar_express(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
