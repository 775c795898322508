"""Experts by PyTorch's grouped product: the same values and gradients as one by one."""

import pytest
import torch

from tests.kernels.test_fused import config_of, parameters_of
from vpmoe.errors import ConfigError
from vpmoe.models.experts import Experts, moe_reference
from vpmoe.models.experts_grouped import moe_grouped
from vpmoe.models.kernels import REFERENCE, kernels_named
from vpmoe.models.student import build_student

DIM, WIDTH, EXPERTS, CHOSEN = 16, 24, 6, 2


def routings(rows):
    even = torch.rand(rows, EXPERTS - 1).argsort(-1)[:, :CHOSEN]  # the last has no token
    hot = torch.stack([torch.full((rows,), 3), torch.randint(4, EXPERTS, (rows,))], dim=1)
    return {"an empty expert": even, "one hot expert": hot}


@pytest.mark.parametrize("activation", ["relu2", "swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", ["an empty expert", "one hot expert"])
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_values_and_gradients_are_the_references(activation, bias, routing, rows, device, dtype):
    torch.manual_seed(0)
    experts = Experts(EXPERTS, hidden_size=DIM, width=WIDTH, activation=activation, bias=bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    experts.to(device, dtype)
    exact = Experts(EXPERTS, hidden_size=DIM, width=WIDTH, activation=activation, bias=bias)
    exact.double().to(device).load_state_dict(experts.state_dict())
    ids = routings(rows)[routing].to(device)
    hidden, residual, upstream = (torch.randn(rows, DIM, device=device).to(dtype) for _ in range(3))
    weights = torch.rand(rows, CHOSEN, device=device)

    def run(function, stacks, wide):
        leaves = [t.detach().to(wide).requires_grad_() for t in (hidden, weights, residual)]
        out = function(
            leaves[0], ids, leaves[1], stacks.weights, activation=activation, residual=leaves[2]
        )
        grads = torch.autograd.grad(out, [*leaves, *stacks.parameters()], upstream.to(wide))
        return [out, *grads]

    expected = run(moe_reference, exact, torch.float64)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(run(moe_grouped, experts, dtype), expected, strict=True):
        scale = float(other.detach().abs().max()) + 1e-6
        assert float((one.double() - other).detach().abs().max()) <= tolerance * scale


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_biases_of_a_hot_expert_are_summed_without_rounding_in_half_precision(device):
    """A running sum in bfloat16 would stand still after a few hundred rows."""
    torch.manual_seed(1)
    rows = 4_000
    experts = Experts(2, hidden_size=DIM, width=WIDTH, activation="relu2", bias=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    experts.to(device, torch.bfloat16)
    hidden = torch.randn(rows, DIM, device=device).bfloat16()
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    weights, upstream = torch.ones(rows, 1, device=device), torch.ones(rows, DIM, device=device)
    out = moe_grouped(hidden, ids, weights, experts.weights, activation="relu2")
    (grad,) = torch.autograd.grad(out, [experts.down_bias], upstream.bfloat16())
    torch.testing.assert_close(grad[0].float(), torch.full_like(grad[0], rows).float())


def test_the_signatures_are_the_references():
    grouped = kernels_named("grouped")
    for name in ("moe", "require"):
        assert parameters_of(getattr(grouped, name)) == parameters_of(getattr(REFERENCE, name))


def test_a_student_of_either_kind_says_the_same():
    tokens = torch.randint(0, 512, (2, 30))
    places = torch.arange(30).expand(2, 30)
    outputs = []
    for kernels in ("reference", "grouped"):
        student = build_student(config_of(), seed=0, kernels=kernels)
        output = student(tokens, positions=places, document_ids=torch.zeros_like(places))
        outputs.append(output.hidden)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_what_the_product_does_not_take_is_refused():
    require = kernels_named("grouped").require
    with pytest.raises(ConfigError, match="float64 weights"):
        require(config_of(), device="cpu", dtype=torch.float64)
    with pytest.raises(ConfigError, match="hidden_size 20") as caught:
        require(config_of(hidden_size=20), device="cpu", dtype=torch.bfloat16)
    assert "a multiple of 8 fits" in caught.value.hint and "reference" in caught.value.hint
