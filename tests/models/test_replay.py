"""Experts that are given: as the reference with the same choice, and nothing else changes."""

import pytest
import torch

from tests.models.test_student import packed_batch, shaken, student_of
from vpmoe.models.router import (
    DeepseekV3Config,
    Router,
    SoftmaxTopkConfig,
    compact_dtype,
    route_reference,
    segments_of,
)

KINDS = [DeepseekV3Config(num_groups=4, num_groups_kept=2), SoftmaxTopkConfig()]


def own_choices(student, *, dtype=torch.uint8, **inputs):
    """What every router chooses in a forward pass, compact: (batch, seq, mixture layers, A)."""
    seen = []
    hooks = [
        router.register_forward_hook(lambda _module, _inputs, out: seen.append(out.expert_ids))
        for router in student.routers()
    ]
    with torch.no_grad():
        student(**inputs)
    for hook in hooks:
        hook.remove()
    ids = torch.stack(seen, dim=1).unflatten(0, inputs["tokens"].shape)
    return ids.to(dtype)


def inputs_of():
    tokens, positions, documents, _ = packed_batch()
    return {"tokens": tokens, "positions": positions, "document_ids": documents}


def trained_on(student, **inputs):
    """States, gradients and loads of a training pass."""
    student.zero_grad()
    for router in student.routers():
        router.local_tokens_per_expert.zero_()
    output = student.train()(**inputs)
    (output.hidden.pow(3).sum() + 3 * output.load_balance_sum).backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    loads = torch.stack([router.local_tokens_per_expert for router in student.routers()])
    return {"hidden": output.hidden.detach(), "loads": loads.clone(), **grads}


@pytest.mark.parametrize(
    ("num_experts", "count", "dtype"),
    [
        (255, 1, torch.uint8),
        (256, 4, torch.uint8),
        (256, 1, torch.int16),
        (257, 4, torch.int16),
        (40_000, 4, torch.int32),
    ],
)
def test_ids_are_kept_in_the_smallest_type_that_can_say_none(num_experts, count, dtype):
    assert compact_dtype(num_experts, count=count) == dtype


def router_of(config, *, num_experts=8, count=2):
    router = Router(config, hidden_size=12, num_experts=num_experts, num_experts_per_token=count)
    generator = torch.Generator().manual_seed(0)
    router.weight.data = torch.randn(num_experts, 12, generator=generator, dtype=torch.float64)
    router.bias.data = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    return router, torch.randn(9, 12, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("config", KINDS, ids=["deepseek_v3", "softmax_topk"])
def test_weights_of_given_experts_are_those_of_the_scores_at_hand(config):
    router, hidden = router_of(config)
    hidden.requires_grad_()
    given = torch.randn(9, 8).argsort(dim=1)[:, :2].to(torch.uint8)
    ids, weights, _ = route_reference(router, hidden, None, given)
    assert torch.equal(ids, given.long())
    logits = hidden @ router.weight.T + router.bias
    if isinstance(config, DeepseekV3Config):
        chosen = torch.sigmoid(logits).gather(1, given.long())
        expected = 2.5 * chosen / chosen.sum(dim=1, keepdim=True)
    else:
        expected = logits.gather(1, given.long()).softmax(dim=1)
    pull = torch.randn_like(weights)
    leaves = [hidden, router.weight, router.bias]
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad((w * pull).sum(), leaves) for w in (weights, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", KINDS, ids=["deepseek_v3", "softmax_topk"])
def test_tokens_without_given_experts_choose_and_loads_count_what_was_used(config):
    router, hidden = router_of(config)
    own, own_weights, _ = route_reference(router, hidden, None)
    given = own.flip(0).to(torch.uint8)
    given[[0, 4, 8]] = 255
    given[2] = torch.tensor([7, 0])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1]])
    segments = segments_of(documents)
    ids, weights, statistics = route_reference(router, hidden, segments, given)
    assert torch.equal(ids[[0, 4, 8]], own[[0, 4, 8]])
    assert torch.equal(weights[[0, 4, 8]], own_weights[[0, 4, 8]])
    assert torch.equal(ids[[1, 2, 3]], given[[1, 2, 3]].long())
    counts = ids[:7].flatten().bincount(minlength=8).float()
    assert torch.equal(statistics.tokens_per_expert, counts)
    # The auxiliary loss judges the scores, as it does without replay.
    plain = route_reference(router, hidden, segments)[2]
    assert torch.equal(statistics.load_balance_sum, plain.load_balance_sum)


def test_the_last_of_256_experts_can_be_given():
    config = DeepseekV3Config()
    router, hidden = router_of(config, num_experts=256, count=4)
    given = torch.tensor([[255, 3, 254, 0], [1, 255, 2, 3]] + [[255] * 4] * 7).to(torch.uint8)
    ids, _, _ = route_reference(router, hidden, None, given)
    assert ids[:2].tolist() == given[:2].tolist()
    assert torch.equal(ids[2:], route_reference(router, hidden, None)[0][2:])


@pytest.mark.parametrize("override", ["moe.router={kind='softmax_topk'}", "activation='swiglu'"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replay_of_own_choices_changes_no_bit(override, checkpointing):
    student = shaken(student_of(override))
    student.activation_checkpointing = checkpointing
    inputs = inputs_of()
    expert_ids = own_choices(student, **inputs)
    expert_ids[1, -3:] = 255  # padding, as collate leaves it
    expert_ids[0, 8] = 255
    plain = trained_on(student, **inputs)
    wide = expert_ids.view(torch.int8).to(torch.int16)  # there -1 says none
    for given in (expert_ids, torch.full_like(expert_ids, 255), wide):
        replayed = trained_on(student, **inputs, expert_ids=given)
        assert replayed.keys() == plain.keys()
        for name, value in plain.items():
            assert torch.equal(replayed[name], value), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_given_experts_equal_a_reference_that_is_made_to_choose_them(checkpointing):
    """A large selection bias names the same experts for all tokens, and is in no weight."""
    free, steered = shaken(student_of()), shaken(student_of())
    free.activation_checkpointing = checkpointing
    inputs = inputs_of()
    pairs = torch.tensor([[5, 2], [0, 7], [3, 4], [6, 5]])
    assert len(pairs) == len(steered.routers())
    for router, (first, second) in zip(steered.routers(), pairs, strict=True):
        router.expert_bias[first] = 90.0
        router.expert_bias[second] = 80.0
    expert_ids = pairs.to(torch.uint8).expand(*inputs["tokens"].shape, -1, -1)
    assert torch.equal(own_choices(steered, **inputs), expert_ids)
    assert not torch.equal(own_choices(free, **inputs), expert_ids)
    wanted = trained_on(steered, **inputs)
    found = trained_on(free, **inputs, expert_ids=expert_ids)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def test_experts_of_another_student_are_refused():
    inputs = inputs_of()
    wrong = torch.zeros(*inputs["tokens"].shape, 3, 2, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match="of 3 mixture layers and 2 experts a token for a student of 4 and"
    ):
        student_of()(**inputs, expert_ids=wrong)
