import pytest
import torch

from vpmoe.errors import RunError
from vpmoe.optim import global_grad_norm, grad_norms
from vpmoe.optim.gradients import gradient_of


def param_with(gradient):
    param = torch.nn.Parameter(torch.zeros_like(gradient))
    param.grad = gradient
    return param


def test_norm_of_all_and_of_each_role():
    named = [
        ("layers.0.attention.q_proj.weight", param_with(torch.tensor([[3.0, 0.0]]))),
        ("layers.0.attention.k_proj.weight", param_with(torch.tensor([[0.0, 4.0]]))),
        ("final_norm.gamma", param_with(torch.tensor([12.0]))),
    ]
    assert global_grad_norm(named).item() == pytest.approx(13.0)
    assert {role: norm.item() for role, norm in grad_norms(named).items()} == pytest.approx(
        {"matrix": 5.0, "vector": 12.0}
    )


def test_bfloat16_gradients_are_summed_in_float32():
    """4,096 ones: bfloat16 would stop counting at 256."""
    named = [("final_norm.gamma", param_with(torch.ones(4096, dtype=torch.bfloat16)))]
    assert global_grad_norm(named).item() == 64.0


def test_the_summed_gradient_of_a_wrapper_comes_first():
    param = param_with(torch.tensor([1.0]))
    param.main_grad = torch.tensor([2.0])
    assert gradient_of("final_norm.gamma", param).item() == 2.0


def test_no_gradient_is_an_error():
    with pytest.raises(RunError, match=r"final_norm\.gamma has no gradient"):
        gradient_of("final_norm.gamma", torch.nn.Parameter(torch.zeros(1)))
