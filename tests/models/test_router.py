"""Routing: worked examples, ties, masking, gradients, parity with DeepSeek-V3's router."""

import pytest
import torch
from torch import tensor

from vpmoe.models.router import (
    DeepseekV3Config,
    Router,
    SoftmaxTopkConfig,
    aggregate_health,
    load_balance_sum,
    route_deepseek_v3,
    route_softmax_topk,
    router_health,
    segments_of,
    shifted_expert_bias,
    top_experts,
)

LOGITS = tensor(
    [
        [2, -1, 1.2, 1, 0.5, 0.4, -0.3, 1.9],
        [0.1, 0.3, -0.2, 0.8, 1.5, -1, 1.4, 0],
        [-0.5, 0.6, 0.7, -0.1, 0.2, 0.9, 1.1, -2],
        [1, 1.1, 0, -0.4, 0.3, -0.6, 0.5, 0.2],
    ],
    dtype=torch.float64,
)
BIAS = tensor([0, 0, 0.05, 0.05, 0, 0, -0.1, -0.1], dtype=torch.float64)
RULE = DeepseekV3Config(num_groups=4, num_groups_kept=2, group_score_topk=2, scaling=2.5)


def test_top_two_rule_worked_example():
    routing = route_deepseek_v3(LOGITS, BIAS, config=RULE, count=2)
    assert routing.expert_ids.tolist() == [[2, 3], [3, 6], [2, 5], [1, 0]]
    assert routing.expert_weights.flatten().tolist() == pytest.approx(
        [1.281231, 1.218769, 1.156001, 1.343999, 1.211242, 1.288758, 1.266203, 1.233797], abs=1e-6
    )


def test_top_one_rule_worked_example():
    rule = RULE.model_copy(update={"group_score_topk": 1})
    routing = route_deepseek_v3(LOGITS, BIAS, config=rule, count=2)
    assert routing.expert_ids.tolist() == [[0, 2], [4, 3], [2, 5], [1, 0]]
    assert routing.expert_weights.flatten().tolist() == pytest.approx(
        [1.335090, 1.164910, 1.355801, 1.144199, 1.211242, 1.288758, 1.266203, 1.233797], abs=1e-6
    )
    plain = top_experts(LOGITS.sigmoid() + BIAS, count=2)
    assert torch.equal(routing.expert_ids, plain)  # the group stage is vacuous here


def test_top_one_groups_never_matter_when_as_many_are_kept_as_experts_are_chosen():
    torch.manual_seed(0)
    rule = DeepseekV3Config(num_groups=8, num_groups_kept=4, group_score_topk=1)
    logits = torch.randn(2_000, 64)
    routing = route_deepseek_v3(logits, torch.zeros(64), config=rule, count=4)
    assert torch.equal(routing.expert_ids, top_experts(logits.sigmoid(), count=4))
    pairs = rule.model_copy(update={"group_score_topk": 2})
    changed = route_deepseek_v3(logits, torch.zeros(64), config=pairs, count=4).expert_ids
    assert (changed.sort().values != routing.expert_ids.sort().values).any(-1).float().mean() > 0.1


def test_load_balance_worked_example():
    plain = top_experts(LOGITS.sigmoid(), count=2)
    assert plain.tolist() == [[0, 7], [4, 6], [6, 5], [1, 0]]
    logits = LOGITS.clone().requires_grad_()
    segments = segments_of(tensor([[0, 0], [0, 0]]))
    total = load_balance_sum(logits.sigmoid(), segments, count=2)
    loss = 1e-4 * total / segments.num_documents
    loss.backward()
    assert total.item() == pytest.approx(1.113196 + 1.126453, abs=1e-6)
    assert loss.item() == pytest.approx(1.119824265e-04, rel=1e-9)
    assert (logits.grad[0] * 1e6).tolist() == pytest.approx(
        [0.465667, -1.030961, -0.932813, -1.030961, 1.042286, -1.259839, 1.084219, 0.501976],
        abs=1e-6,
    )


def test_load_balance_is_per_document_and_blind_to_padding():
    torch.manual_seed(0)
    scores = torch.rand(2, 9, 8, dtype=torch.float64)
    documents = tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 1, 2, 2, -1]])
    packed = load_balance_sum(scores.flatten(0, 1), segments_of(documents), count=2)
    alone = 0.0
    for row, ids in enumerate(documents):
        for document in range(int(ids.max()) + 1):
            own = scores[row, ids == document]
            here = segments_of(torch.zeros(1, own.shape[0], dtype=torch.int64))
            alone += load_balance_sum(own, here, count=2)
    torch.testing.assert_close(packed, alone)
    assert segments_of(documents).num_documents == 5


def test_even_scores_give_one_per_document():
    scores = torch.full((12, 8), 0.5, dtype=torch.float64)
    documents = tensor([[0] * 5 + [1] * 7])
    assert load_balance_sum(scores, segments_of(documents), count=2).item() == pytest.approx(2)


def test_a_batch_of_padding_balances_nothing():
    segments = segments_of(torch.full((2, 3), -1))
    assert segments.num_documents == 0
    assert load_balance_sum(torch.rand(6, 4), segments, count=2).item() == 0


def test_gradient_of_the_weights():
    torch.manual_seed(0)
    scores_of = LOGITS.clone().requires_grad_()
    routing = route_deepseek_v3(scores_of, BIAS, config=RULE, count=2)
    upstream = torch.randn(4, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad((routing.expert_weights * upstream).sum(), scores_of)
    s = LOGITS.sigmoid().gather(1, routing.expert_ids)
    total = s.sum(-1, keepdim=True)
    by_hand = 2.5 / total * (upstream - (s / total * upstream).sum(-1, keepdim=True))
    by_hand = by_hand * s * (1 - s)
    torch.testing.assert_close(grad.gather(1, routing.expert_ids), by_hand)
    assert grad.count_nonzero() == 8  # experts not chosen get nothing


def test_bias_steers_the_choice_and_never_the_weights():
    bias = torch.zeros(8, dtype=torch.float64)
    bias[6:] = 10
    routing = route_deepseek_v3(LOGITS, bias, config=RULE, count=2)
    assert sorted(routing.expert_ids[0].tolist()) == [6, 7]
    s = LOGITS.sigmoid().gather(1, routing.expert_ids)
    torch.testing.assert_close(routing.expert_weights, 2.5 * s / s.sum(-1, keepdim=True))


def test_masking_survives_negative_biased_scores():
    # All biased scores below 0: a fill of 0 for lost groups would choose among the lost.
    bias = torch.full((8,), -3.0, dtype=torch.float64) + BIAS
    shifted = route_deepseek_v3(LOGITS, bias, config=RULE, count=2)
    plain = route_deepseek_v3(LOGITS, BIAS, config=RULE, count=2)
    assert torch.equal(shifted.expert_ids, plain.expert_ids)


def test_ties_go_to_the_lowest_index():
    assert top_experts(torch.zeros(3, 40), count=4).tolist() == [[0, 1, 2, 3]] * 3
    values = tensor([[1.0, 3, 3, 2, 3]])
    assert top_experts(values, count=4).tolist() == [[1, 2, 4, 3]]
    rule = DeepseekV3Config(num_groups=4, num_groups_kept=2)
    tied = route_deepseek_v3(torch.zeros(2, 16), torch.zeros(16), config=rule, count=3)
    assert tied.expert_ids.tolist() == [[0, 1, 2]] * 2


def test_softmax_topk():
    routing = route_softmax_topk(LOGITS, torch.zeros(8).double(), count=3)
    values, ids = LOGITS.topk(3)
    assert torch.equal(routing.expert_ids, ids)
    torch.testing.assert_close(routing.expert_weights, values.softmax(-1))


def test_expert_bias_worked_example():
    counts = tensor([1, 1, 2, 2, 0, 1, 1, 0]).double()
    moved = shifted_expert_bias(BIAS, counts, rate=1e-3)
    expected = [0, 0, 0.049, 0.049, 0.001, 0, -0.1, -0.099]
    assert moved.tolist() == pytest.approx(expected, abs=1e-12)


def test_health_worked_example():
    health = router_health(tensor([1.0, 1, 2, 2, 0, 1, 1, 0]), BIAS)
    expected = {
        "cv_pct": 70.710678,
        "entropy": 1.732868,
        "max_load_pct": 25,
        "dead": 2,
        "experts_active": 6,
        "bias_range": 0.15,
    }
    assert health == pytest.approx(expected, abs=1e-6)
    even = router_health(torch.ones(256), torch.zeros(256))
    assert even["entropy"] == pytest.approx(5.545177, abs=1e-6)
    assert even["max_load_pct"] == pytest.approx(0.390625)
    both = aggregate_health([health, {**health, "cv_pct": 50.710678, "entropy": 1.0}])
    assert both["cv_pct_mean"] == pytest.approx(60.710678, abs=1e-6)
    assert both["cv_pct_std"] == pytest.approx(10, abs=1e-6)
    assert both["entropy_min"] == 1
    assert both["dead"] == 4


def test_router_module_is_float32_for_bfloat16_states():
    torch.manual_seed(0)
    router = Router(RULE, hidden_size=16, num_experts=8, num_experts_per_token=2)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(5, 16).bfloat16()
    routing = router(hidden)
    assert routing.scores.dtype == torch.float32
    exact = (hidden.double() @ router.weight.double().T).sigmoid()
    torch.testing.assert_close(routing.scores.double(), exact, atol=1e-6, rtol=0)


def test_softmax_router_never_moves_its_bias_by_default():
    router = Router(SoftmaxTopkConfig(), hidden_size=4, num_experts=4, num_experts_per_token=1)
    router.update_expert_bias(tensor([4.0, 0, 0, 0]))
    assert router.expert_bias.count_nonzero() == 0


def test_parity_with_transformers_deepseek_v3():
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import (
        DeepseekV3Config as TheirConfig,
    )
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_experts_per_tok": 4, "n_routed_experts": 64}
    groups = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    theirs = DeepseekV3TopkRouter(TheirConfig(**sizes, **groups))
    rule = DeepseekV3Config(num_groups=8, num_groups_kept=4, bias=False)
    ours = Router(rule, hidden_size=48, num_experts=64, num_experts_per_token=4)
    with torch.no_grad():
        theirs.weight.normal_(std=0.2)
        theirs.e_score_correction_bias.uniform_(0, 0.1)
        ours.weight.copy_(theirs.weight)
        ours.expert_bias.copy_(theirs.e_score_correction_bias)
    hidden = torch.randn(500, 48)
    _, weights, ids = theirs(hidden)
    routing = ours(hidden)
    order, their_order = routing.expert_ids.sort(), ids.sort()
    assert torch.equal(order.values, their_order.values)
    torch.testing.assert_close(
        routing.expert_weights.gather(1, order.indices), weights.gather(1, their_order.indices)
    )
