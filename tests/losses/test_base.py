"""Sums and counts: the gradient does not know how a global batch was cut up."""

import pytest
import torch

from vpmoe.errors import DataError
from vpmoe.losses import (
    ConfidenceWeightedConfig,
    CrossEntropyConfig,
    ForwardKLConfig,
    GeneralizedJSDConfig,
    LossInputs,
    RandomSamplingConfig,
    ReverseKLConfig,
    SampledReverseKLConfig,
    span_means,
    span_scales,
)
from vpmoe.losses.base import sum_by_span

ROWS, DIM, VOCAB = 60, 5, 17
WEIGHTS = torch.tensor([0.0, 1.0, 0.7])
CONFIGS = [
    CrossEntropyConfig(chunk_rows=7),
    ConfidenceWeightedConfig(chunk_rows=7),
    SampledReverseKLConfig(chunk_rows=7, importance="truncated", advantage_clip=2.0),
    SampledReverseKLConfig(chunk_rows=7, importance="plain"),
    ForwardKLConfig(chunk_rows=7, label_weight=0.2),
    ReverseKLConfig(chunk_rows=7, temperature=2.0),
    GeneralizedJSDConfig(chunk_rows=7, against="hidden"),
    RandomSamplingConfig(chunk_rows=7),
]


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LossInputs(
        hidden=torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64),
        head_weight=torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64),
        labels=torch.randint(VOCAB, (ROWS,), generator=generator),
        span_ids=torch.randint(3, (ROWS,), generator=generator, dtype=torch.uint8),
        content_mask=torch.rand(ROWS, generator=generator) > 0.4,
        teacher_logprobs=-4 * torch.rand(ROWS, generator=generator),
        rollout_logprobs=-4 * torch.rand(ROWS, generator=generator),
        **teacher(generator),
    )


def teacher(generator):
    """Targets, four entries and a tail, and states with a head."""
    mass = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:4] for _ in range(ROWS)])
    return {
        "target_ids": ids,
        "target_logprobs": mass[:, :4],
        "target_tail": mass[:, 4],
        "row_weights": torch.rand(ROWS, generator=generator, dtype=torch.float64),
        "teacher_hidden": torch.randn(ROWS, 3, generator=generator, dtype=torch.float64),
        "teacher_head": torch.randn(VOCAB, 3, generator=generator, dtype=torch.float64),
    }


def step(config, inputs, parts):
    """Gradients, metric means and next state when the rows are cut into `parts`.

    Each part is a micro-batch of some rank: only the counts are shared before the forwards, only
    sums and gradients are added up after them.
    """
    loss = config.build()
    seen = {"tokens": torch.ones(3), "teacher_logprob": torch.full((3,), -2.0)}
    seen |= {"importance_ratio": torch.ones(3), "importance_ratio_squared": torch.ones(3)}
    loss.after_step(seen)
    counts = torch.bincount(inputs.span_ids.long(), minlength=3)
    scales = span_scales(WEIGHTS, counts)
    grad_hidden = torch.zeros_like(inputs.hidden)
    grad_head = torch.zeros_like(inputs.head_weight)
    sums = {}
    for part in parts:
        micro = inputs.select(part)
        hidden = micro.hidden.detach().requires_grad_()
        head = inputs.head_weight.detach().requires_grad_()
        parts_of = {name: getattr(micro, name) for name in vars(micro)}
        output = loss(LossInputs(**parts_of | {"hidden": hidden, "head_weight": head}), scales)
        output.total.backward()
        grad_hidden[part] = hidden.grad
        grad_head += head.grad
        for name, value in output.sums.items():
            sums[name] = sums.get(name, 0) + value
        assert output.total.item() == pytest.approx(
            (scales * output.loss_sums).sum().item(), rel=1e-12
        )
    loss.after_step(sums)
    return grad_hidden, grad_head, span_means(sums), loss.state_dict()


PARTITIONS = {
    "one row at a time": [torch.tensor([i]) for i in range(ROWS)],
    "ragged": [torch.arange(0, 41), torch.arange(41, 43), torch.arange(43, ROWS)],
    "shuffled": [torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))],
    "with an empty rank": [torch.arange(ROWS), torch.arange(0)],
    "two shuffled ranks": torch.randperm(ROWS, generator=torch.Generator().manual_seed(2)).split(
        31
    ),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_gradient_and_metrics_do_not_depend_on_the_partition(config, name):
    inputs = rows()
    whole = step(config, inputs, [torch.arange(ROWS)])
    parted = step(config, inputs, PARTITIONS[name])
    torch.testing.assert_close(parted, whole, rtol=1e-10, atol=1e-14, equal_nan=True)


def test_worked_example_over_two_ranks():
    """Losses [1,2,3,4] and [5,6,7,8], spans [1,1,1,2] and [0,1,2,2]: 12/4 + 19/3."""
    nll = torch.arange(1.0, 9.0)
    span_ids = torch.tensor([1, 1, 1, 2, 0, 1, 2, 2], dtype=torch.uint8)
    scales = span_scales(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1, 4, 3]))
    # hidden [x, 0] on a head [[1, .], [0, .]] gives log p_0 = -log(1 + exp(-x)) = -nll
    x = -(nll.double().expm1()).log()
    hidden = torch.stack([x, torch.zeros_like(x)], dim=1)
    ranks = [slice(0, 4), slice(4, 8)]
    total = 0.0
    for rank in ranks:
        inputs = LossInputs(
            hidden=hidden[rank],
            head_weight=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
            labels=torch.zeros(4, dtype=torch.long),
            span_ids=span_ids[rank],
            content_mask=torch.ones(4, dtype=torch.bool),
        )
        total += CrossEntropyConfig().build()(inputs, scales).total.item()
    assert total == pytest.approx(9.333333, abs=5e-7)


def test_scales_are_weight_over_count_and_never_of_ignored_labels():
    scales = span_scales(torch.tensor([5.0, 2.0, 3.0]), torch.tensor([10, 4, 0]))
    assert scales.tolist() == [0.0, 0.5, 0.0]


def test_ignored_rows_change_nothing():
    """Not one bit: ignored rows are taken out before the head sees them."""
    inputs = rows()
    ignored = inputs.span_ids == 0
    wild = inputs.hidden.clone()
    wild[ignored] = 1e30
    scales = span_scales(WEIGHTS, torch.bincount(inputs.span_ids.long(), minlength=3))
    loss = CrossEntropyConfig().build()
    tame = loss(inputs, scales)
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    loud = loss(LossInputs(**same | {"hidden": wild}), scales)
    assert torch.equal(tame.total, loud.total)
    assert tame.token_counts.tolist() == [0, *(inputs.span_ids.bincount()[1:].tolist())]


def test_content_metrics_leave_wrappers_out():
    inputs = rows()
    output = CrossEntropyConfig().build()(inputs, torch.ones(3))
    logprobs = (inputs.hidden @ inputs.head_weight.T).log_softmax(dim=1)
    nll = -logprobs.gather(1, inputs.labels[:, None]).squeeze(1)
    for span in (1, 2):
        chosen = inputs.content_mask & (inputs.span_ids == span)
        assert output.metrics["content_tokens"][span] == chosen.sum()
        means = span_means(output.sums)
        assert means["content_nll"][span].item() == pytest.approx(nll[chosen].mean().item())
        assert means["nll"][span].item() == pytest.approx(
            nll[inputs.span_ids == span].mean().item()
        )


def test_spread_of_the_teachers_logprobs():
    inputs = rows()
    means = span_means(CrossEntropyConfig().build()(inputs, torch.ones(3)).sums)
    for span in (1, 2):
        chosen = inputs.teacher_logprobs[inputs.span_ids == span]
        assert means["teacher_logprob"][span].item() == pytest.approx(chosen.mean().item())
        spread = chosen.std(correction=0).item()
        assert means["teacher_logprob_std"][span].item() == pytest.approx(spread)
    assert not [name for name in means if name.endswith("_squared")]


def test_sum_by_span_is_exact_over_a_long_batch():
    """Float32 would lose the small values behind the large one."""
    values = torch.full((100_001,), 1e-4)
    values[0] = 1e4
    span_ids = torch.ones(100_001, dtype=torch.uint8)
    exact = values.double().sum().item()
    assert sum_by_span(values, span_ids).tolist() == pytest.approx([0.0, exact, 0.0], rel=1e-12)


def test_a_missing_score_is_named():
    inputs = rows()
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    for need in ("teacher_logprobs", "rollout_logprobs"):
        with pytest.raises(DataError, match=f"needs {need}"):
            SampledReverseKLConfig().build()(LossInputs(**same | {need: None}), torch.ones(3))
