"""Experts against a loop over all of them; the shared expert's weight."""

import pytest
import torch
import torch.nn.functional as F

from vpmoe.models.experts import Experts, moe_reference
from vpmoe.models.mlp import activate
from vpmoe.models.moe import AnnealWeight, ConstantWeight, WarmupWeight, shared_expert_weight


def build(activation="relu2", *, bias=True, num_experts=6):
    torch.manual_seed(0)
    experts = Experts(num_experts, hidden_size=5, width=3, activation=activation, bias=bias)
    experts.double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def dense(hidden, ids, weights, experts, activation):
    """Every expert works on every token; unused results get weight 0."""
    w = experts.weights
    out = torch.zeros_like(hidden)
    for e in range(w.up.shape[0]):
        up = F.linear(hidden, w.up[e], None if w.up_bias is None else w.up_bias[e])
        gate = None
        if w.gate is not None:
            gate = F.linear(hidden, w.gate[e], None if w.gate_bias is None else w.gate_bias[e])
        units = activate(up, gate, activation=activation)
        done = F.linear(units, w.down[e], None if w.down_bias is None else w.down_bias[e])
        out = out + (weights * (ids == e)).sum(-1, keepdim=True) * done
    return out


@pytest.mark.parametrize("activation", ["relu2", "swiglu", "clamped_swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_equals_a_loop_over_experts(activation, bias):
    experts = build(activation, bias=bias)
    hidden = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(40, 5).argsort(-1)[:, :2]  # expert 5 stays without tokens
    weights = torch.rand(40, 2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(40, 5, dtype=torch.float64)
    leaves = [hidden, weights, *experts.parameters()]
    ours = moe_reference(hidden, ids, weights, experts.weights, activation=activation)
    theirs = dense(hidden, ids, weights, experts, activation)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    mine = torch.autograd.grad(ours, leaves, upstream)
    others = torch.autograd.grad(theirs, leaves, upstream)
    for grad, other in zip(mine, others, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-11, rtol=1e-9)
    assert mine[2][5].count_nonzero() == 0


def test_renumbering_experts_changes_nothing():
    experts = build()
    hidden = torch.randn(20, 5, dtype=torch.float64)
    ids, weights = torch.rand(20, 6).argsort(-1)[:, :3], torch.rand(20, 3, dtype=torch.float64)
    before = moe_reference(hidden, ids, weights, experts.weights, activation="relu2")
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[order])
    renamed = order.argsort()[ids]
    after = moe_reference(hidden, renamed, weights, experts.weights, activation="relu2")
    torch.testing.assert_close(after, before, atol=1e-13, rtol=0)


def test_bits_of_a_token_do_not_depend_on_who_else_chose_its_expert():
    torch.manual_seed(0)
    experts = Experts(4, hidden_size=32, width=12, activation="relu2", bias=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    hidden, weights = torch.randn(60, 32), torch.rand(60, 2)
    ids = torch.rand(60, 4).argsort(-1)[:, :2]
    upstream = torch.randn(60, 32)

    def run(rows):
        given = hidden[rows].requires_grad_()
        out = moe_reference(given, ids[rows], weights[rows], experts.weights, activation="relu2")
        return out, torch.autograd.grad(out, given, upstream[rows])[0]

    everyone = run(slice(0, 60))
    for begin, end in ((0, 1), (3, 5), (7, 13), (2, 41)):
        few = run(slice(begin, end))
        assert torch.equal(few[0], everyone[0][begin:end])
        assert torch.equal(few[1], everyone[1][begin:end])


def test_the_weight_multiplies_the_output_bias_too():
    experts = build()
    hidden, ids = torch.randn(4, 5, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.int64)
    one, two = (
        moe_reference(hidden, ids, torch.full((4, 1), w), experts.weights, activation="relu2")
        for w in (1.0, 2.0)
    )
    torch.testing.assert_close(two, 2 * one)


def test_shared_expert_weight():
    assert shared_expert_weight(ConstantWeight(), tokens_seen=10**12) == 1
    grow = WarmupWeight(tokens=100)
    assert [shared_expert_weight(grow, tokens_seen=n) for n in (0, 25, 100, 900)] == [0, 0.25, 1, 1]
    fall = AnnealWeight(begin_tokens=100, tokens=200, final=0.5)
    seen = [shared_expert_weight(fall, tokens_seen=n) for n in (0, 100, 200, 300, 900)]
    assert seen == [1, 1, 0.75, 0.5, 0.5]
