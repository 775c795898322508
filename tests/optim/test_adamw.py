"""AdamW: equal to PyTorch's, and at rest where experts saw nothing."""

import torch

from vpmoe.optim import AdamWConfig
from vpmoe.optim.adamw import AdamWList
from vpmoe.optim.weights import Weight

SHAPES = [(7,), (5, 3), (1,), (2, 3, 4)]


def params_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(*param.shape, generator=generator).to(param.dtype)


def test_equals_torch_adamw():
    ours, theirs = params_of(), params_of()
    config = AdamWConfig(adam_betas=(0.9, 0.95), adam_eps=1e-8)
    members = AdamWList([Weight(f"{i}.bias", p) for i, p in enumerate(ours)], config, decay=0.3)
    reference = torch.optim.AdamW(
        theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3, foreach=False
    )
    for step in range(1, 6):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        members.step(0.01, {}, step=step)
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_resting_slices_keep_value_and_moments_bit_for_bit():
    param = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    other = torch.nn.Parameter(torch.ones(4, 3))
    config = AdamWConfig()
    weights = [Weight("experts.up_bias", param), Weight("experts.down_bias", other)]
    members = AdamWList(weights, config, decay=0.1)
    set_gradients([param, other], 1)
    members.step(0.1, {}, step=1)
    tensors = [param.detach(), members.exp_avg[0], members.exp_avg_sq[0]]
    before = [tensor.clone() for tensor in tensors]
    resting = other.detach().clone()
    active = torch.tensor([True, False, True, False])
    members.step(0.1, {"experts.up_bias": active}, step=2)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[~active], old[~active])
        assert (tensor[active] != old[active]).all()
    assert (other != resting).all()
