"""The fused router: identical choices, ties included; weights, balance, counts, gradients."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu, relative_error
from vpmoe.models.router import (
    DeepseekV3Config,
    load_balance_sum,
    route_deepseek_v3,
    segments_of,
)

pytestmark = needs_gpu


def packed(batch, seq):
    documents = torch.zeros(batch, seq, dtype=torch.int64, device="cuda")
    documents[:, seq // 3 :] = 1
    documents[:, seq - seq // 8 :] = -1
    documents[0] = 0
    return documents


def choice_of(config, count=4):
    from vpmoe.kernels.router import GroupChoice

    return GroupChoice(
        config.num_groups, config.num_groups_kept, config.group_score_topk, count, config.scaling
    )


@pytest.mark.parametrize("judges", [1, 2])
@pytest.mark.parametrize("kind", ["normal", "ties", "saturated"])
def test_choices_are_identical(judges, kind):
    from vpmoe.kernels.router import choose

    torch.manual_seed(1)
    config = DeepseekV3Config(group_score_topk=judges)
    logits = torch.randn(5003, 256, device="cuda")
    if kind == "ties":
        logits = (2 * logits).round() / 2
    if kind == "saturated":
        logits *= 30  # many scores are exactly 1
    bias = torch.randn(256, device="cuda") * (0 if kind == "ties" else 0.01)
    made = choose(logits, None, bias, choice=choice_of(config), documents=None)
    expected = route_deepseek_v3(logits, bias, config=config, count=4)
    assert torch.equal(made.scores, expected.scores)
    assert torch.equal(made.expert_ids.long(), expected.expert_ids)
    torch.testing.assert_close(made.expert_weights, expected.expert_weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("batch", "seq", "judges"), [(3, 333, 2), (2, 1024, 1)])
def test_router_equals_float64(batch, seq, judges):
    from vpmoe.kernels.router import Documents, route

    torch.manual_seed(2)
    config = DeepseekV3Config(group_score_topk=judges)
    segments = segments_of(packed(batch, seq))
    rows = batch * seq
    x = torch.randn(rows, 1024, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(256, 1024, device="cuda") * 0.03).requires_grad_()
    bias = (torch.randn(256, device="cuda") * 0.1).requires_grad_()
    steering = torch.randn(256, device="cuda") * 0.05
    documents = Documents(segments.ids, segments.lengths, segments.num_documents)
    routed = route(x, weight, bias, steering, choice=choice_of(config), documents=documents)

    leaves = (x, weight, bias)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = torch.sigmoid(exact[0] @ exact[1].T + exact[2])
    ids = routed.expert_ids.long()
    chosen = scores.gather(1, ids)
    weights = config.scaling * chosen / chosen.sum(dim=1, keepdim=True)
    balance = load_balance_sum(scores, segments, count=4)
    free = route_deepseek_v3(torch.logit(scores), steering.double(), config=config, count=4)
    assert (free.expert_ids != ids).float().mean() < 1e-3  # near ties alone may differ
    assert relative_error(routed.expert_weights, weights) < 1e-5
    assert relative_error(routed.load_balance_sum, balance) < 1e-4

    grad = torch.randn_like(routed.expert_weights)
    loss = (routed.expert_weights * grad).sum() + 3 * routed.load_balance_sum
    expected = (weights * grad.double()).sum() + 3 * balance
    pairs = zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True
    )
    assert_close(dict(zip(("dx", "dw", "dbias"), pairs, strict=True)), BF16)

    real = ids[segments.is_real].flatten()
    assert torch.equal(routed.tokens_per_expert, torch.bincount(real, minlength=256).float())


def ids_of_layers(tokens, layers=3, count=4, experts=256):
    """Experts of every token in several layers; every fifth token is to choose."""
    ids = torch.rand(tokens, layers, experts, device="cuda").argsort(dim=2)[:, :, :count]
    ids = ids.to(torch.uint8)
    ids[::5] = 255
    return ids


def test_given_experts_equal_float64():
    from vpmoe.kernels.router import Documents, route

    torch.manual_seed(3)
    config = DeepseekV3Config()
    segments = segments_of(packed(3, 333))
    x = torch.randn(999, 1024, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(256, 1024, device="cuda") * 0.03).requires_grad_()
    bias = (torch.randn(256, device="cuda") * 0.1).requires_grad_()
    steering = torch.randn(256, device="cuda") * 0.05
    documents = Documents(segments.ids, segments.lengths, segments.num_documents)
    leaves = (x, weight, bias)
    settings = {"choice": choice_of(config), "documents": documents}
    given = ids_of_layers(999)[:, 1]  # a column: neither contiguous nor aligned
    free = route(*leaves, steering, **settings)
    routed = route(*leaves, steering, **settings, given=given)
    ids = torch.where((given == 255).all(dim=1)[:, None], free.expert_ids, given.int())
    assert torch.equal(routed.expert_ids, ids)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = torch.sigmoid(exact[0] @ exact[1].T + exact[2])
    chosen = scores.gather(1, ids.long())
    weights = config.scaling * chosen / chosen.sum(dim=1, keepdim=True)
    balance = load_balance_sum(scores, segments, count=4)
    assert relative_error(routed.expert_weights, weights) < 1e-5
    assert relative_error(routed.load_balance_sum, balance) < 1e-4
    grad = torch.randn_like(routed.expert_weights)
    loss = (routed.expert_weights * grad).sum() + 3 * routed.load_balance_sum
    expected = (weights * grad.double()).sum() + 3 * balance
    pairs = zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, exact), strict=True
    )
    assert_close(dict(zip(("dx", "dw", "dbias"), pairs, strict=True)), BF16)
    real = ids[segments.is_real].flatten()
    assert torch.equal(routed.tokens_per_expert, torch.bincount(real, minlength=256).float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_replay_of_own_choices_changes_no_bit(dtype):
    from vpmoe.kernels.router import Documents, choose

    torch.manual_seed(4)
    segments = segments_of(packed(3, 333))
    documents = Documents(segments.ids, segments.lengths, segments.num_documents)
    logits, bias = torch.randn(999, 256, device="cuda"), torch.randn(256, device="cuda") * 0.01
    settings = {"choice": choice_of(DeepseekV3Config()), "documents": documents}
    plain = choose(logits, None, bias, **settings)
    given = plain.expert_ids.to(dtype, copy=True)
    given[::7] = torch.zeros((), dtype=dtype).bitwise_not()
    again = choose(logits, None, bias, **settings, given=given)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_chosen_experts_are_recorded_where_they_belong():
    from vpmoe.kernels.decode_experts import Record, choose_experts

    torch.manual_seed(5)
    logits, zeros = torch.randn(50, 256, device="cuda"), torch.zeros(256, device="cuda")
    places = torch.randint(0, 30, (50,), device="cuda")
    kept = torch.full((50, 30, 3, 4), 255, dtype=torch.uint8, device="cuda")
    for layer in range(3):
        scores = torch.empty(50, 256, device="cuda")
        ids = torch.empty(50, 4, dtype=torch.int32, device="cuda")
        weights = torch.empty(50, 4, device="cuda")
        record = Record(kept[:, :, layer], places)
        choose_experts(
            logits.roll(layer, 1), None, zeros, choice_of(DeepseekV3Config()), scores, ids, weights,
            record,
        )  # fmt: skip
        expected = route_deepseek_v3(
            logits.roll(layer, 1), zeros, config=DeepseekV3Config(), count=4
        )
        assert torch.equal(ids.long(), expected.expert_ids)
        assert torch.equal(kept[torch.arange(50), places, layer].int(), ids)
    assert int((kept != 255).any(dim=3).sum()) == 3 * 50


def test_without_documents_there_are_no_statistics():
    from vpmoe.kernels.router import route

    config = DeepseekV3Config()
    x = torch.randn(70, 1024, device="cuda").bfloat16()
    weight, zeros = torch.randn(256, 1024, device="cuda"), torch.zeros(256, device="cuda")
    routed = route(x, weight, None, zeros, choice=choice_of(config), documents=None)
    assert routed.load_balance_sum == 0
    assert not routed.tokens_per_expert.any()
