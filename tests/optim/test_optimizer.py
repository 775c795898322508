"""The whole optimizer: who is moved by which rule, masters, checkpoints, sharding."""

import pytest
import torch

from vpmoe.errors import CheckpointError
from vpmoe.optim import AdamWConfig, NorMuonAdamW, NorMuonConfig

SHAPES = {
    "embedding.weight": (10, 6),
    "head.weight": (10, 6),
    "layers.0.attention.q_proj.weight": (8, 6),
    "layers.0.attention.q_proj.bias": (8,),
    "layers.0.attention.value_lambda": (1,),
    "layers.1.attention.q_proj.weight": (8, 6),
    "layers.1.mlp.router.weight": (4, 6),
    "layers.1.mlp.experts.up_weight": (4, 8, 6),
    "layers.1.mlp.experts.up_bias": (4, 8),
    "final_norm.gamma": (6,),
}
EXPERTS = [name for name in SHAPES if "experts" in name]


def model_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.values():
        param.grad = torch.randn(*param.shape, generator=generator).to(param.dtype)


def train(model, optimizers, steps, *, active=None):
    for step in steps:
        set_gradients(model, step)
        for optimizer in optimizers:
            optimizer.step(0.9, active)


def assert_same(one, other, **tolerance):
    for name in SHAPES:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], **tolerance)
        else:
            assert torch.equal(one[name], other[name]), name


def test_each_role_has_its_rule():
    state = NorMuonAdamW(model_of().items(), NorMuonConfig()).state()
    normuon = {name for name, tensors in state.items() if "momentum" in tensors}
    assert normuon == {n for n in SHAPES if "q_proj.weight" in n or "up_weight" in n}
    assert {name for name, tensors in state.items() if "exp_avg" in tensors} == set(
        SHAPES
    ) - normuon
    baseline = NorMuonAdamW(model_of().items(), AdamWConfig()).state()
    assert all("exp_avg" in tensors for tensors in baseline.values())
    assert state["layers.1.mlp.experts.up_weight"]["second_moment"].shape == (4, 8, 1)


def test_only_matrices_decay_and_each_role_has_its_rate():
    """With no gradient but decay only matrices shrink; the first AdamW step is lr x sign."""
    config = NorMuonConfig(
        lr=0.5, adam_lr=0.01, weight_decay=0.1, embed_lr_mult=20, head_lr_mult=3,
        router_lr_mult=0.5, vector_lr_mult=2, value_lambda_lr_mult=7,
    )  # fmt: skip
    model, before = model_of(), model_of()
    for param in model.values():
        param.grad = torch.zeros_like(param)
    NorMuonAdamW(model.items(), config).step(1.0)
    for name, param in model.items():
        is_matrix = "q_proj.weight" in name or "up_weight" in name
        torch.testing.assert_close(param, before[name] * (0.95 if is_matrix else 1.0))
    model = model_of()
    set_gradients(model, 1)
    NorMuonAdamW(model.items(), config).step(0.5)
    for name, multiplier in {
        "embedding.weight": 20, "head.weight": 3, "layers.1.mlp.router.weight": 0.5,
        "final_norm.gamma": 2, "layers.0.attention.value_lambda": 7,
    }.items():  # fmt: skip
        moved = (before[name] - model[name]).abs()
        torch.testing.assert_close(
            moved, torch.full_like(moved, 0.5 * 0.01 * multiplier), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [NorMuonConfig(), AdamWConfig()], ids=lambda c: c.kind)
def test_resuming_from_state_is_bitwise(config, dtype):
    through = model_of(dtype)
    optimizer = NorMuonAdamW(through.items(), config)
    train(through, [optimizer], range(3))
    saved = {n: {k: t.clone() for k, t in ts.items()} for n, ts in optimizer.state().items()}
    resumed = {name: torch.nn.Parameter(p.detach().clone()) for name, p in through.items()}
    train(through, [optimizer], range(3, 6))
    again = NorMuonAdamW(resumed.items(), config)
    again.load_state(saved)
    train(resumed, [again], range(3, 6))
    assert_same(resumed, through)
    assert again.num_steps == 6


def test_two_owners_together_do_what_one_does():
    """Sharding by whole parameters: other neighbours in a bucket, the same update."""
    whole, shared = model_of(), model_of()
    names = list(SHAPES)
    train(whole, [NorMuonAdamW(whole.items(), NorMuonConfig())], range(3))
    owners = [
        NorMuonAdamW([(n, shared[n]) for n in names[i::2]], NorMuonConfig()) for i in range(2)
    ]
    train(shared, owners, range(3))
    assert_same(shared, whole, rtol=1e-5, atol=1e-6)
    states = [set(owner.state()) for owner in owners]
    assert states[0] | states[1] == set(SHAPES)
    assert not states[0] & states[1]


def test_state_moves_between_owners():
    model = model_of()
    whole = NorMuonAdamW(model.items(), NorMuonConfig())
    train(model, [whole], range(2))
    part = NorMuonAdamW([("head.weight", model["head.weight"])], NorMuonConfig())
    part.load_state(whole.state())
    assert torch.equal(
        part.state()["head.weight"]["exp_avg"], whole.state()["head.weight"]["exp_avg"]
    )


def test_bfloat16_parameters_train_as_float32_copies():
    """Steps far below bfloat16's resolution add up instead of vanishing."""
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = NorMuonAdamW([("final_norm.gamma", param)], AdamWConfig(lr=1e-4))
    for _ in range(100):
        param.grad = torch.ones(4, dtype=torch.bfloat16)
        optimizer.step(1.0)
    assert optimizer.state()["final_norm.gamma"]["master"].tolist() == pytest.approx(
        [0.99] * 4, abs=5e-6
    )
    assert param.tolist() == [torch.tensor(0.99).bfloat16().item()] * 4


def test_experts_without_tokens_rest():
    model, before = model_of(), model_of()
    optimizer = NorMuonAdamW(model.items(), NorMuonConfig(weight_decay=0.5))
    active = torch.tensor([True, False, True, False])
    masks = dict.fromkeys([*EXPERTS, "a.stack.of.another.rank"], active)
    train(model, [optimizer], range(2), active=masks)
    for name in EXPERTS:
        assert torch.equal(model[name][~active], before[name][~active])
        assert (model[name][active] != before[name][active]).all()
        for key, tensor in optimizer.state()[name].items():
            assert key == "step" or torch.equal(tensor[~active], torch.zeros_like(tensor[~active]))
    free = model_of()
    train(free, [NorMuonAdamW(free.items(), NorMuonConfig(weight_decay=0.5))], range(2))
    for name in EXPERTS:
        torch.testing.assert_close(model[name][active], free[name][active])
    name = "layers.0.attention.q_proj.weight"
    torch.testing.assert_close(model[name], free[name])


def test_foreign_state_is_refused():
    model = model_of()
    normuon = NorMuonAdamW(model.items(), NorMuonConfig())
    adamw = NorMuonAdamW(model.items(), AdamWConfig())
    with pytest.raises(CheckpointError, match=r"optimizer state of layers.* expected"):
        normuon.load_state(adamw.state())
    with pytest.raises(CheckpointError, match="is missing"):
        normuon.load_state({})


def test_a_quadratic_is_minimised():
    """A sanity check that signs are right: every rule walks downhill."""
    for config in (NorMuonConfig(lr=0.05, adam_lr=0.05), AdamWConfig(lr=0.05)):
        model, goal = model_of(), {n: torch.full(s, 0.5) for n, s in SHAPES.items()}
        optimizer = NorMuonAdamW(model.items(), config)
        losses = []
        for step in range(200):
            loss = sum((param - goal[name]).square().sum() for name, param in model.items())
            for param, grad in zip(
                model.values(), torch.autograd.grad(loss, list(model.values())), strict=True
            ):
                param.grad = grad
            optimizer.step(1 - step / 200)
            losses.append(loss.item())
        assert losses[-1] < 0.02 * losses[0]


def test_bfloat16_iterations_cost_a_few_percent_of_an_update():
    """On a CPU too: what a GPU's `auto` loses is the format's rounding, not the device's."""
    before, exact, rounded = model_of(), model_of(), model_of()
    train(exact, [NorMuonAdamW(exact.items(), NorMuonConfig(polar_dtype="float32"))], range(2))
    config = NorMuonConfig(polar_dtype="bfloat16")
    train(rounded, [NorMuonAdamW(rounded.items(), config)], range(2))
    for name, param in before.items():
        moved, wanted = rounded[name] - param, exact[name] - param
        assert (moved - wanted).norm() < 8e-2 * wanted.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize(("polar_dtype", "close"), [("float32", 1e-3), ("auto", 8e-2)])
def test_a_gpu_moves_as_a_cpu_does(polar_dtype, close):
    """`auto` iterates in bfloat16 there: 5.5 % off for these small matrices on an H200."""
    before, here = model_of(), model_of()
    there = {name: torch.nn.Parameter(param.detach().cuda()) for name, param in before.items()}
    active = dict.fromkeys(EXPERTS, torch.tensor([True, False, True, True]))
    train(here, [NorMuonAdamW(here.items(), NorMuonConfig())], range(2), active=active)
    config = NorMuonConfig(polar_dtype=polar_dtype)
    optimizer = NorMuonAdamW(there.items(), config)
    for step in range(2):
        set_gradients(before, step)
        for name, param in there.items():
            param.grad = before[name].grad.cuda()
        optimizer.step(0.9, active)
    for name, param in before.items():
        moved, wanted = there[name].cpu() - param, here[name] - param
        assert (moved - wanted).norm() < close * wanted.norm(), name
