"""Routed experts on the GPU against float64: values, all gradients, every kind of routing."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu

pytestmark = needs_gpu


def inputs(tokens, kind, *, experts=256, dim=1024, width=128, slots=4):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    scores = torch.rand(tokens, experts, device="cuda")
    if kind == "hot":
        scores[:, 7] += 2
    elif kind == "empty":
        scores[:, experts // 2 :] -= 2
    elif kind == "zipf":
        share = torch.arange(1, experts + 1, device="cuda").float() ** -0.7
        scores = share.log() - (-scores.log()).log()
    floats = [
        new(tokens, dim),
        new(experts, width, dim) * 0.03,
        new(experts, width) * 0.1,
        new(experts, dim, width) * 0.03,
        new(experts, dim) * 0.1,
    ]
    floats = [t.bfloat16().requires_grad_() for t in floats]
    weights = (torch.rand(tokens, slots, device="cuda") + 0.2).requires_grad_()
    return [*floats, weights], scores.topk(slots).indices, new(tokens, dim).bfloat16()


def reference(leaves, expert_ids, residual):
    x, w1, b1, w2, b2, weights = leaves
    total = residual
    for expert in range(w1.shape[0]):
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        units = torch.relu(x[token] @ w1[expert].T + b1[expert]) ** 2
        out = (units @ w2[expert].T + b2[expert]) * weights[token, slot][:, None]
        total = total.index_add(0, token, out)
    return total


@pytest.mark.parametrize("kind", ["uniform", "hot", "empty", "zipf"])
@pytest.mark.parametrize("tokens", [1, 700, 5000])
def test_plan_covers_every_row_once(tokens, kind):
    from vpmoe.kernels.dispatch import MOST_PARTIALS, ROWS, plan_dispatch

    _, ids, _ = inputs(tokens, kind)
    plan = plan_dispatch(ids, num_experts=256)
    flat, rows = ids.flatten(), ids.numel()
    assert torch.equal(plan.order[:rows].long(), flat.argsort(stable=True))
    counts = torch.bincount(flat, minlength=256)
    ends = counts.cumsum(0)
    assert torch.equal(plan.offsets[1:257].long(), ends)
    tiles = [
        (e, row)
        for e, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True))
        for row in range(end - count, end, ROWS)
    ]
    used = plan.tile_expert >= 0
    found = zip(plan.tile_expert[used].tolist(), plan.tile_row[used].tolist(), strict=True)
    assert list(found) == tiles
    used = plan.chunk_expert >= 0
    chunks = [t[used].tolist() for t in (plan.chunk_expert, plan.chunk_begin, plan.chunk_end)]
    covered = sorted(zip(*chunks, strict=True))
    places = [row for _, begin, end in covered for row in range(begin, end)]
    assert places == list(range(rows))
    owners = [e for e, begin, end in covered for _ in range(begin, end)]
    assert owners == flat.sort().values.tolist()
    assert {e for e, _, _ in covered} == set(range(256))
    num_cut = plan.first_partial[256].item()
    assert num_cut <= MOST_PARTIALS
    assert len(set(chunks[0][num_cut:])) == len(chunks[0]) - num_cut  # the rest are whole experts
    for e, (begin, end) in enumerate(plan.first_partial[:257].unfold(0, 2, 1).tolist()):
        assert chunks[0][begin:end] == [e] * (end - begin)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("tokens", "kind"),
    [(1000, "uniform"), (777, "hot"), (2048, "empty"), (3, "uniform"), (4096, "zipf")],
)
def test_experts_equal_float64(tokens, kind, with_residual):
    from vpmoe.kernels.experts import routed_experts

    leaves, ids, residual = inputs(tokens, kind)
    out = routed_experts(*leaves, ids, residual if with_residual else None)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    start = residual.double() if with_residual else torch.zeros_like(exact[0])
    expected = reference(exact, ids, start)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    names = ("dx", "dw1", "db1", "dw2", "db2", "dweights")
    pairs = {n: p for n, *p in zip(names, grads, expected_grads, strict=True)}
    assert_close({"y": (out, expected), **pairs}, BF16)


@pytest.mark.parametrize("shape", [(16, 64, 16, 1), (32, 128, 64, 3)])
def test_other_shapes(shape):
    from vpmoe.kernels.experts import routed_experts

    experts, dim, width, slots = shape
    leaves, ids, residual = inputs(
        130, "uniform", experts=experts, dim=dim, width=width, slots=slots
    )
    out = routed_experts(*leaves, ids, residual)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = reference(exact, ids, residual.double())
    expected_grads = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    pairs = {str(i): p for i, p in enumerate(zip(grads, expected_grads, strict=True))}
    assert_close({"y": (out, expected), **pairs}, 2 * BF16)


def test_experts_repeat_themselves_bit_for_bit():
    from vpmoe.kernels.experts import routed_experts

    leaves, ids, _ = inputs(999, "zipf")

    def run():
        out = routed_experts(*leaves, ids)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_experts_without_tokens_have_no_gradient():
    from vpmoe.kernels.experts import routed_experts

    leaves, ids, _ = inputs(500, "empty")
    out = routed_experts(*leaves, ids)
    for grad in torch.autograd.grad(out.sum(), leaves[1:5]):
        assert not grad[128:].any()
        assert grad[:128].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("kind", ["uniform", "hot", "empty"])
def test_gradients_are_added_to_main_grad(kind):
    from torch.utils.checkpoint import checkpoint

    from vpmoe.kernels.experts import routed_experts

    leaves, ids, _ = inputs(900, kind)
    grad = torch.randn_like(leaves[0])
    expected = torch.autograd.grad(routed_experts(*leaves, ids), leaves, grad)
    stacks = {i: leaves[i] for i in (1, 3)}
    for stack in stacks.values():
        stack.main_grad = torch.ones(stack.shape, device="cuda")
    checkpoint(routed_experts, *leaves, ids, use_reentrant=False).backward(grad)
    routed_experts(*leaves, ids).backward(grad)
    for i, stack in stacks.items():
        assert stack.grad is None
        assert stack.grad_added_to_main_grad
        assert_close({str(i): (stack.main_grad - 1, 2 * expected[i].double())}, BF16)
        untouched = expected[i].flatten(1).count_nonzero(dim=1) == 0
        assert (stack.main_grad[untouched] == 1).all()
    for i in (0, 2, 4, 5):
        assert_close({str(i): (leaves[i].grad, 2 * expected[i])}, BF16)


def test_frozen_stacks_get_no_gradient():
    from vpmoe.kernels.experts import routed_experts

    leaves, ids, _ = inputs(300, "uniform")
    grad = torch.randn_like(leaves[0])
    expected = torch.autograd.grad(routed_experts(*leaves, ids), leaves, grad)
    for i in (1, 3, 4):
        leaves[i].requires_grad_(False)
    routed_experts(*leaves, ids).backward(grad)
    assert all(leaves[i].grad is None for i in (1, 3, 4))
    assert all(torch.equal(leaves[i].grad, expected[i]) for i in (0, 2, 5))
