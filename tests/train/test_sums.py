"""Stacks of experts that add to their own float32 sums, as kernels do, under the real wrapper."""

from dataclasses import replace

import pytest
import torch

from tests.train.toy import ToyPlan, student_config, train_config
from vpmoe.models.experts import moe_reference
from vpmoe.models.moe import Moe
from vpmoe.models.student import build_student
from vpmoe.train.device import world
from vpmoe.train.parallel import Replica
from vpmoe.train.step import sum_gradients


class _AddsItself(torch.autograd.Function):
    """What `kernels.weight_gradients` does with a parameter's gradient, without a GPU."""

    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight  # not saved: what is saved may come back as a copy
        return weight.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.weight.main_grad.add_(grad)
        ctx.weight.grad_added_to_main_grad = True


def moe_with_own_sums(hidden, expert_ids, expert_weights, experts, **options):
    own = {name: _AddsItself.apply(getattr(experts, name)) for name in ("up", "down")}
    return moe_reference(hidden, expert_ids, expert_weights, replace(experts, **own), **options)


def sums_of_steps(config, *, own, checkpointing):
    """Every parameter's sum after each of two steps of two micro-batches, and the biases'."""
    found = []
    with world("cpu", threads=1) as ranks:
        student = build_student(student_config(), seed=0)
        student.train()
        student.activation_checkpointing = checkpointing
        for layer in student.layers:
            if own and isinstance(layer.mlp, Moe):
                layer.mlp.kernels = replace(layer.mlp.kernels, moe=moe_with_own_sums)
        replica = Replica(student, config.optimizer, ranks)
        plan = ToyPlan(config)
        for step in range(2):
            batches, loss = plan.micro_batches(step)
            sum_gradients(replica, batches, loss, config)
            assert all(p.grad is None for p in replica.parameters.values())
            found.append({n: p.main_grad.clone() for n, p in replica.parameters.items()})
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_that_kernels_add_themselves_count_once(tmp_path, checkpointing):
    config = train_config(tmp_path / "run")
    expected = sums_of_steps(config, own=False, checkpointing=False)
    found = sums_of_steps(config, own=True, checkpointing=checkpointing)
    for step, other in zip(found, expected, strict=True):
        stacks = [name for name in step if ".experts.up" in name or ".experts.down" in name]
        assert stacks and all(other[name].any() for name in stacks)
        for name, gradient in step.items():
            torch.testing.assert_close(gradient, other[name], msg=name)
