"""Optimizer steps on the GPU against the same steps in float64 on the CPU."""

import pytest
import torch

from tests.kernels.common import needs_gpu, relative_error
from vpmoe.optim.config import NorMuonConfig
from vpmoe.optim.gradients import global_grad_norm
from vpmoe.optim.optimizer import NorMuonAdamW
from vpmoe.optim.polar_express import (
    COEFFICIENTS,
    EPS,
    SAFETY,
    polar_express,
    polar_express_folded,
)

pytestmark = needs_gpu

SHAPES = {
    "experts.up_weight": (64, 128, 512),
    "experts.down_weight": (64, 512, 128),
    "experts.up_bias": (64, 128),
    "attention.o_proj.weight": (512, 512),
    "attention.k_a.weight": (4, 512),
    "shared.down.weight": (512, 256),
    "layers.1.shared.down.weight": (512, 256),
    "layers.2.shared.down.weight": (512, 256),
    "embedding.weight": (4096, 512),
    "attention_norm.gamma": (512,),
}


def polar_error(shape):
    matrices = torch.randn(*shape, device="cuda") * 1e-4
    exact = polar_express(matrices.double())
    folded = polar_express_folded(matrices.bfloat16())
    return relative_error(folded, exact), relative_error(polar_express(matrices.bfloat16()), exact)


@pytest.mark.parametrize("shape", [(64, 128, 1024), (64, 1024, 128), (2, 512, 512)])
def test_folded_polar_express_is_as_exact_as_the_plain_one(shape):
    folded, plain = polar_error(shape)
    assert folded < 1.4 * plain, (folded, plain)


def low_rank(stack, rows, cols, rank):
    left = torch.randn(stack, rows, rank, device="cuda")
    return left @ torch.randn(stack, rank, cols, device="cuda") * 1e-3


@pytest.mark.parametrize("shape", [(64, 128, 1024), (64, 1024, 128), (3, 64, 512), (5, 192, 64)])
def test_iterations_in_gram_space_equal_float64(shape):
    """As exact as bf16 products for well conditioned matrices, far better for others."""
    from vpmoe.kernels.polar import polar_, polar_fits

    torch.manual_seed(0)
    stack, rows, cols = shape
    assert polar_fits(rows, cols, steps=5) and not polar_fits(rows, cols, steps=6)
    table = torch.tensor(COEFFICIENTS[5], device="cuda")
    cases = {"random": torch.randn(*shape, device="cuda") * 1e-4}
    cases |= {f"rank {rank}": low_rank(*shape, rank) for rank in (3, 40)}
    for name, values in cases.items():
        matrices = values.bfloat16()
        exact = polar_express(matrices.double())
        around = torch.full((stack + 2, rows, cols), 7.0, dtype=torch.bfloat16, device="cuda")
        inside = around[1:-1].copy_(matrices)
        squares = polar_(inside, table, safety=SAFETY, eps=EPS)
        plain = relative_error(polar_express(matrices), exact)
        found = relative_error(inside, exact)
        assert found < (2 * plain if name == "random" else plain / 3), (name, found, plain)
        sums = inside.double().square().sum(dim=2, keepdim=True)
        assert relative_error(squares, sums) < 1e-6, name
        assert (around[0] == 7).all() and (around[-1] == 7).all()
    nothing = torch.zeros(2, rows, cols, dtype=torch.bfloat16, device="cuda")
    assert not polar_(nothing, table, safety=SAFETY, eps=EPS).any() and not nothing.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rest", [False, True])
def test_steps_equal_float64(dtype, rest):
    torch.manual_seed(0)
    config = NorMuonConfig(weight_decay=0.1)
    values = {n: torch.randn(*s).to(dtype) for n, s in SHAPES.items()}
    ours = {n: v.cuda().requires_grad_() for n, v in values.items()}
    exact = {n: v.double().requires_grad_() for n, v in values.items()}
    one, other = NorMuonAdamW(ours.items(), config), NorMuonAdamW(exact.items(), config)
    start = {n: v.clone() for n, v in exact.items()}
    mask = torch.arange(64) % 3 > 0
    active = {n: mask for n in SHAPES if n.startswith("experts")} if rest else {}
    for _ in range(3):
        for name, shape in SHAPES.items():
            gradient = torch.randn(*shape).to(dtype)
            ours[name].grad, exact[name].grad = gradient.cuda(), gradient.double()
        one.step(0.5, {n: m.cuda() for n, m in active.items()}, gradient_scale=0.3)
        other.step(0.5, active, gradient_scale=0.3)
    for name, state in one.state().items():
        value = state.get("master", ours[name])
        moved = value.cpu().double() - start[name]
        assert relative_error(moved, exact[name].detach() - start[name]) < 0.06, name
        for key in ("momentum", "exp_avg", "exp_avg_sq"):
            if key in state:
                expected = other.state()[name][key]
                assert relative_error(state[key].cpu(), expected) < 1e-5, (name, key)
        if dtype == torch.bfloat16:
            assert torch.equal(state["master"].bfloat16(), ours[name].detach())
    if rest:
        momentum = one.state()["experts.up_weight"]["momentum"].cpu()
        assert not momentum[~mask].any()
        assert not one.state()["experts.up_bias"]["exp_avg"].cpu()[~mask].any()
        assert torch.equal(
            ours["experts.up_weight"].detach().cpu()[~mask], values["experts.up_weight"][~mask]
        )


def test_norms_of_many_gradients_equal_float64():
    named = []
    for name, shape in SHAPES.items():
        param = torch.nn.Parameter(torch.zeros(shape, device="cuda", dtype=torch.bfloat16))
        param.main_grad = torch.randn(shape, device="cuda")
        named.append((name, param))
    exact = torch.cat([p.main_grad.double().flatten() for _, p in named]).norm()
    assert relative_error(global_grad_norm(named), exact) < 1e-6
