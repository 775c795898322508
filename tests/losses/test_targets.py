"""Losses on stored targets: the worked table, dense float64 references, bounds, refusals."""

import pytest
import torch

from vpmoe.config import validate
from vpmoe.errors import ConfigError
from vpmoe.losses import (
    CrossEntropyConfig,
    ForwardKLConfig,
    GeneralizedJSDConfig,
    LossInputs,
    RandomSamplingConfig,
    ReverseKLConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
)
from vpmoe.losses.divergences import forward_kl
from vpmoe.losses.forward_kl import forward_kl_without_tail
from vpmoe.losses.tails import log1mexp, tempered

STUDENT = torch.tensor([2, 1, 0, -1, 0.5], dtype=torch.float64)
TEACHER = torch.tensor([1.5, 1.8, -0.5, -2, 0], dtype=torch.float64).log_softmax(0)
SCALES = torch.tensor([0.0, 1.0, 1.0])
KINDS = [
    ForwardKLConfig(),
    ForwardKLConfig(tail="renormalized"),
    ForwardKLConfig(tail="unnormalized"),
    ReverseKLConfig(),
    GeneralizedJSDConfig(beta=0.3),
    SkewedForwardKLConfig(),
    SkewedReverseKLConfig(),
]
NAMES = [f"{config.kind}-{getattr(config, 'tail', '')}" for config in KINDS]


def one_row(ids, *, label=1):
    """The worked table's student, and the teacher's entries at these ids."""
    entries = TEACHER[ids]
    rest = [i for i in range(5) if i not in ids]
    tail = TEACHER[rest].logsumexp(0) if rest else torch.tensor(-torch.inf).double()
    return LossInputs(
        hidden=STUDENT[None].clone().requires_grad_(),
        head_weight=torch.eye(5, dtype=torch.float64),
        labels=torch.tensor([label]),
        span_ids=torch.tensor([1], dtype=torch.uint8),
        content_mask=torch.tensor([True]),
        target_ids=torch.tensor([ids]),
        target_logprobs=entries[None],
        target_tail=tail[None],
        target_cap=entries.min()[None],
    )


ALL = [0, 1, 2, 3, 4]
TABLE = {
    "forward": (
        ForwardKLConfig(),
        ALL,
        0.202296,
        [0.197861, -0.285791, 0.026778, 0.017004, 0.044149],
    ),
    "reverse": (
        ReverseKLConfig(),
        ALL,
        0.177735,
        [0.143709, -0.216394, 0.019449, 0.021170, 0.032066],
    ),
    "jsd": (
        GeneralizedJSDConfig(),
        ALL,
        0.046387,
        [0.040532, -0.059437, 0.005485, 0.004375, 0.009044],
    ),
    "jsd .1": (
        GeneralizedJSDConfig(beta=0.1),
        ALL,
        0.017812,
        [0.016940, -0.024532, 0.002293, 0.001520, 0.003780],
    ),
    "skewed forward": (
        SkewedForwardKLConfig(),
        ALL,
        0.157021,
        [0.145336, -0.211063, 0.019669, 0.013629, 0.032429],
    ),
    "skewed reverse": (
        SkewedReverseKLConfig(),
        ALL,
        0.145727,
        [0.121334, -0.180269, 0.016421, 0.015442, 0.027073],
    ),
    "temperature 2": (
        ForwardKLConfig(temperature=2.0),
        ALL,
        0.202318,
        [0.119338, -0.277321, 0.043902, 0.057710, 0.056371],
    ),
    "bucket": (
        ForwardKLConfig(),
        [1, 0],
        0.200830,
        [0.197861, -0.285791, 0.029149, 0.010723, 0.048058],
    ),
    "renormalized": (
        ForwardKLConfig(tail="renormalized"),
        [1, 0],
        0.466858,
        [0.137464, -0.367319, 0.076197, 0.028031, 0.125627],
    ),
    "unnormalized": (
        ForwardKLConfig(tail="unnormalized"),
        [1, 0],
        0.269260,
        [0.117954, -0.315187, 0.065382, 0.024053, 0.107797],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_worked_table(name):
    config, ids, value, gradient = TABLE[name]
    inputs = one_row(ids)
    output = config.build()(inputs, SCALES)
    output.total.backward()
    assert output.total.item() == pytest.approx(value, abs=5.1e-7)
    assert inputs.hidden.grad[0].tolist() == pytest.approx(gradient, abs=5.1e-7)


def test_renormalizing_both_never_pulls_on_the_mass_and_is_refused():
    logits = STUDENT.clone().requires_grad_()
    student = logits.log_softmax(0)[None, [1, 0]]
    value = forward_kl_without_tail(TEACHER[None, [1, 0]], student, tail="renormalized_both")
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.item() == pytest.approx(0.205682, abs=5e-7)
    assert gradient.tolist() == pytest.approx([0.305501, -0.305501, 0, 0, 0], abs=5e-7)
    with pytest.raises(ConfigError, match="mass outside the entries is zero"):
        validate(ForwardKLConfig, {"tail": "renormalized_both"}, source="test")


def random_inputs(*, rows=23, entries=6, vocab=31, dtype=torch.float64, seed=0, spread=1.5):
    """Rows with 1 to `entries` of the likeliest ids; the dense teacher beside them."""
    generator = torch.Generator().manual_seed(seed)
    teacher = (spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).double()
    teacher = teacher.log_softmax(dim=1)
    logprobs, ids = teacher.topk(entries, dim=1)
    counts = torch.randint(1, entries + 1, (rows, 1), generator=generator)
    unused = torch.arange(entries) >= counts
    # Unused places keep id 0, which may be a used one elsewhere in the row: it must not matter.
    ids, logprobs = ids.masked_fill(unused, 0), logprobs.masked_fill(unused, -torch.inf)
    seen = torch.zeros_like(teacher, dtype=torch.bool)
    for row in range(rows):
        seen[row, ids[row, : counts[row, 0]]] = True
    inputs = LossInputs(
        hidden=torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype),
        head_weight=torch.randn(vocab, 6, generator=generator, dtype=torch.float64).to(dtype),
        labels=torch.randint(vocab, (rows,), generator=generator),
        span_ids=torch.randint(1, 3, (rows,), generator=generator, dtype=torch.uint8),
        content_mask=torch.ones(rows, dtype=torch.bool),
        target_ids=ids,
        target_logprobs=logprobs.to(dtype),
        target_tail=teacher.masked_fill(seen, -torch.inf).logsumexp(dim=1).to(dtype),
        target_cap=logprobs.masked_fill(unused, 0).amin(dim=1).to(dtype),
    )
    inputs.hidden.requires_grad_()
    inputs.head_weight.requires_grad_()
    return inputs, teacher, seen


def dense_classes(logits, seen, ids, used, temperature):
    """Log-probs of entries and tail, from log-probs of the whole vocabulary."""
    logprobs = (logits / temperature).log_softmax(dim=1)
    entries = logprobs.gather(1, ids).masked_fill(~used, -torch.inf)
    return entries, logprobs.masked_fill(seen, -torch.inf).logsumexp(dim=1)


def dense_loss(config, inputs, teacher, seen):
    """The definition, by dense logits and plain autograd."""
    used = inputs.target_logprobs > -torch.inf
    logits = inputs.hidden.double() @ inputs.head_weight.double().T
    student, tail = dense_classes(logits, seen, inputs.target_ids, used, config.temperature)
    vocab = logits.shape[1]
    power = 1 / config.temperature
    powered = teacher.gather(1, inputs.target_ids).masked_fill(~used, -torch.inf) * power
    others = (vocab - used.sum(dim=1)).double()
    mass = teacher.masked_fill(seen, -torch.inf).logsumexp(dim=1)
    powered_tail = others.log() + power * (mass - others.log())  # others times an equal share each
    norm = torch.cat([powered, powered_tail[:, None]], dim=1).logsumexp(dim=1)
    values = config.between_targets(powered - norm[:, None], powered_tail - norm, student, tail)
    nll = -logits.log_softmax(dim=1).gather(1, inputs.labels[:, None]).squeeze(1)
    share = config.label_weight
    return (1 - share) * config.temperature**2 * values + share * nll


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize(
    "changes",
    [{}, {"label_weight": 0.25}, {"temperature": 2.0}, {"temperature": 0.7, "label_weight": 0.25}],
    ids=str,
)
@pytest.mark.parametrize("config", KINDS, ids=NAMES)
def test_equals_the_dense_definition(config, changes, chunk_rows):
    config = type(config)(**dict(config) | changes | {"chunk_rows": chunk_rows})
    inputs, teacher, seen = random_inputs()
    scales = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)
    output = config.build()(inputs, scales)
    wanted = dense_loss(config, inputs, teacher, seen)
    expected = (scales[inputs.span_ids.long()] * wanted).sum()
    leaves = (inputs.hidden, inputs.head_weight)
    torch.testing.assert_close(output.total, expected, rtol=1e-11, atol=1e-12)
    for found, exact in zip(
        torch.autograd.grad(output.total, leaves),
        torch.autograd.grad(expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    nll = CrossEntropyConfig().build()(inputs, scales).metrics["nll"]
    torch.testing.assert_close(output.metrics["nll"], nll, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [*KINDS, RandomSamplingConfig()], ids=[*NAMES, "drawn"])
def test_float32_is_within_a_hundred_thousandth(config):
    wide, *_ = random_inputs(vocab=2000, rows=64, entries=16, spread=3.0)
    narrow, *_ = random_inputs(vocab=2000, rows=64, entries=16, spread=3.0, dtype=torch.float32)
    totals = [config.build()(inputs, SCALES).total for inputs in (wide, narrow)]
    grads = [
        torch.autograd.grad(total, (inputs.hidden, inputs.head_weight))
        for total, inputs in zip(totals, (wide, narrow), strict=True)
    ]
    assert totals[1].item() == pytest.approx(totals[0].item(), rel=1e-5)
    for exact, found in zip(*grads, strict=True):
        assert ((found - exact).norm() / exact.norm()).item() < 1e-5


def test_a_student_tail_far_below_roundings_of_one_is_exact_in_float32():
    """All but 1e-15 of the student lies on the entries: 1 - sum would be 0 or 1e-7."""
    logits = torch.tensor([[40.0, 39.0, 5.0, 4.0, 3.0]])
    inputs = LossInputs(
        hidden=logits.requires_grad_(),
        head_weight=torch.eye(5),
        labels=torch.tensor([0]),
        span_ids=torch.tensor([1], dtype=torch.uint8),
        content_mask=torch.tensor([True]),
        target_ids=torch.tensor([[0, 1]]),
        target_logprobs=torch.tensor([[0.6, 0.3]]).log(),
        target_tail=torch.tensor([0.1]).log(),
    )
    output = ForwardKLConfig().build()(inputs, SCALES)
    output.total.backward()
    exact = logits.detach().double().requires_grad_()
    student = exact.log_softmax(dim=1)
    classes = torch.cat([student[:, :2], student[:, 2:].logsumexp(dim=1, keepdim=True)], dim=1)
    teacher = torch.tensor([[0.6, 0.3, 0.1]]).double().log()
    expected = forward_kl(teacher, classes).sum()
    expected.backward()
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(inputs.hidden.grad.double(), exact.grad, rtol=3e-5, atol=1e-8)


def test_log1mexp_at_both_ends():
    x = torch.tensor([-1e-10, -1e-3, -0.7, -5.0, -40.0])
    exact = (-torch.expm1(x.double())).log()
    torch.testing.assert_close(log1mexp(x).double(), exact, rtol=1e-6, atol=1e-17)
    assert log1mexp(torch.tensor([0.0, 0.1])).tolist() == [-torch.inf, -torch.inf]


def test_temperature_of_a_stored_tail():
    entries, tail = tempered(
        torch.tensor([[0.5, 0.3]]).double().log(),
        torch.tensor([0.2]).double().log(),
        temperature=2.0,
        vocab=4,
    )
    assert [*entries.exp()[0].tolist(), tail.exp().item()] == pytest.approx(
        [0.374669, 0.290217, 0.335114], abs=5e-7
    )


@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_true_kl_lies_between_what_is_reported(seed, spread):
    inputs, teacher, _ = random_inputs(rows=200, entries=8, vocab=120, seed=seed, spread=spread)
    student = (inputs.hidden @ inputs.head_weight.T).log_softmax(dim=1)
    true = forward_kl(teacher, student)
    for row in range(200):
        metrics = ForwardKLConfig().build()(inputs.select(slice(row, row + 1)), SCALES).metrics
        least, unseen = (metrics[n].sum().item() for n in ("kl_at_least", "unseen_kl_at_most"))
        assert least <= true[row].item() + 1e-12
        assert true[row].item() <= least + unseen + 1e-12


def test_the_bound_is_reached_by_the_worst_teacher():
    """All unseen mass on the student's unlikeliest id, as far as the cap allows: no smaller bound.

    One id may hold the whole tail, whose size the cap equals.
    """
    student = torch.tensor([3.0, 2.0, 1.0, 0.0, -4.0]).double().log_softmax(0)
    teacher = torch.tensor([0.5, 0.25, 0.0, 0.0, 0.25]).double().log()
    inputs = one_row([0, 1])
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    same |= {"hidden": student[None], "target_logprobs": teacher[None, :2]}
    tail = torch.tensor([0.25]).double().log()
    metrics = (
        ForwardKLConfig()
        .build()(LossInputs(**same | {"target_tail": tail, "target_cap": tail}), SCALES)
        .metrics
    )
    total = (metrics["kl_at_least"] + metrics["unseen_kl_at_most"]).sum().item()
    assert total == pytest.approx(forward_kl(teacher, student).item(), rel=1e-12)


def test_reported_masses():
    inputs, teacher, seen = random_inputs()
    metrics = ReverseKLConfig(temperature=3.0).build()(inputs, SCALES).metrics
    student = (inputs.hidden @ inputs.head_weight.T).softmax(dim=1)
    assert metrics["teacher_mass"].sum().item() == pytest.approx(teacher.exp()[seen].sum().item())
    assert metrics["student_mass"].sum().item() == pytest.approx(student[seen].sum().item())


def test_bias_of_the_bucket_shrinks_with_entries():
    """Against the full KL: the value is below it, and the gradient nears it."""
    gaps = []
    for entries in (2, 8, 32, 128):
        inputs, teacher, _ = random_inputs(entries=entries, vocab=400, rows=50, spread=3.0)
        full = dict(vars(inputs))
        count = teacher.topk(entries, dim=1)
        full |= {
            "target_ids": count.indices,
            "target_logprobs": count.values,
            "target_tail": log1mexp(count.values.logsumexp(dim=1)),
        }
        output = ForwardKLConfig().build()(LossInputs(**full), SCALES)
        (found,) = torch.autograd.grad(output.total, inputs.hidden)
        true = forward_kl(teacher, (inputs.hidden @ inputs.head_weight.T).log_softmax(dim=1)).sum()
        (exact,) = torch.autograd.grad(true, inputs.hidden)
        assert output.total < true
        gaps.append(((found - exact).norm() / exact.norm()).item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.1 > gaps[-1]


def test_drawn_ids_give_the_full_gradient_on_average():
    """By enumeration of all pairs of draws, each weighing one half."""
    teacher = TEACHER.exp()
    expected = torch.zeros(5, dtype=torch.float64)
    for first in range(5):
        for second in range(5):
            weights = torch.bincount(torch.tensor([first, second]), minlength=5).double() / 2
            ids = weights.nonzero().squeeze(1)
            same = {name: getattr(one_row(ALL), name) for name in vars(one_row(ALL))}
            same |= {"target_ids": ids[None], "target_logprobs": weights[ids].log()[None]}
            inputs = LossInputs(**same)
            RandomSamplingConfig().build()(inputs, SCALES).total.backward()
            expected += teacher[first] * teacher[second] * inputs.hidden.grad[0]
    torch.testing.assert_close(expected, STUDENT.softmax(0) - teacher, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", KINDS[3:] + KINDS[:1], ids=[*NAMES[3:], NAMES[0]])
def test_a_student_equal_to_its_teacher_rests(config):
    inputs, *_ = random_inputs()
    logits = inputs.hidden @ inputs.head_weight.T
    ids = logits.topk(5, dim=1).indices
    logprobs = logits.log_softmax(dim=1)
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    same |= {
        "target_ids": ids,
        "target_logprobs": logprobs.gather(1, ids).detach(),
        "target_tail": logprobs.masked_fill(seen, -torch.inf).logsumexp(dim=1).detach(),
    }
    output = config.build()(LossInputs(**same), SCALES)
    (gradient,) = torch.autograd.grad(output.total, inputs.hidden)
    assert output.total.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max().item() < 1e-12


def test_a_store_without_tail_does_not_make_reverse_kl_infinite():
    inputs = one_row([1, 0])
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    sure = torch.tensor([[0.75, 0.25]]).double().log()
    same |= {"target_logprobs": sure, "target_tail": torch.tensor([-torch.inf]).double()}
    for config in (ReverseKLConfig(), SkewedReverseKLConfig(), GeneralizedJSDConfig()):
        output = config.build()(LossInputs(**same), SCALES)
        (gradient,) = torch.autograd.grad(output.total, inputs.hidden)
        assert torch.isfinite(output.total) and torch.isfinite(gradient).all()


def test_row_weights_multiply_losses_and_gradients_but_not_likelihoods():
    inputs, *_ = random_inputs()
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(23, generator=generator).double()
    weighted = LossInputs(**dict(vars(inputs)) | {"row_weights": weights})
    for config in (ForwardKLConfig(), CrossEntropyConfig()):
        loss = config.build()
        rows = [loss(inputs.select(slice(i, i + 1)), SCALES) for i in range(23)]
        whole = loss(weighted, SCALES)
        total = sum(w * row.total for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(whole.total, total, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(t, inputs.hidden)[0] for t in (whole.total, total)]
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(whole.loss_sums.sum(), whole.total.detach().double())
        torch.testing.assert_close(
            whole.metrics["nll"].sum(), sum(row.metrics["nll"].sum() for row in rows)
        )
