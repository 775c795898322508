"""Divergences over the whole vocabulary from a teacher's states, against plain dense autograd."""

import pytest
import torch

from tests.losses.test_chunked import Largest
from vpmoe.config import validate
from vpmoe.errors import ConfigError, DataError
from vpmoe.losses import (
    ForwardKLConfig,
    GeneralizedJSDConfig,
    LossInputs,
    ReverseKLConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
)

SCALES = torch.tensor([0.0, 0.3, 0.7])
KINDS = [
    ForwardKLConfig,
    ReverseKLConfig,
    GeneralizedJSDConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
]


def random_inputs(*, rows=23, dim=6, teacher_dim=9, vocab=31, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return LossInputs(
        hidden=draw(rows, dim).requires_grad_(),
        head_weight=draw(vocab, dim).requires_grad_(),
        labels=torch.randint(vocab, (rows,), generator=generator),
        span_ids=torch.randint(3, (rows,), generator=generator, dtype=torch.uint8),
        content_mask=torch.ones(rows, dtype=torch.bool),
        teacher_hidden=draw(rows, teacher_dim),
        teacher_head=draw(vocab, teacher_dim) / 2,
    )


def dense_total(config, inputs):
    """The table of docs/losses.md, written with probabilities."""
    student = inputs.hidden.double() @ inputs.head_weight.double().T
    teacher = inputs.teacher_hidden.double() @ inputs.teacher_head.double().T
    p = (student / config.temperature).softmax(dim=1)
    t = (teacher / config.temperature).softmax(dim=1)

    def kl(a, b):
        return (a * (a / b).log()).sum(dim=1)

    share = getattr(config, "beta", getattr(config, "skew", 0.0))
    mixed = share * t + (1 - share) * p
    values = {
        "forward_kl": lambda: kl(t, p),
        "reverse_kl": lambda: kl(p, t),
        "generalized_jsd": lambda: share * kl(t, mixed) + (1 - share) * kl(p, mixed),
        "skewed_forward_kl": lambda: kl(t, mixed),
        "skewed_reverse_kl": lambda: kl(p, (1 - share) * t + share * p),
    }[config.kind]()
    nll = -student.log_softmax(dim=1).gather(1, inputs.labels[:, None]).squeeze(1)
    values = (1 - config.label_weight) * config.temperature**2 * values
    values = values + config.label_weight * nll
    return (SCALES.double()[inputs.span_ids.long()] * values).sum()


@pytest.mark.parametrize("chunk_rows", [1, 7, 100])
@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0, "label_weight": 0.4}], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_equals_the_dense_definition(kind, changes, chunk_rows):
    config = kind(against="hidden", chunk_rows=chunk_rows, **changes)
    inputs = random_inputs()
    leaves = (inputs.hidden, inputs.head_weight)
    found, wanted = config.build()(inputs, SCALES.double()).total, dense_total(config, inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for gradient, exact in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_float32_is_within_a_hundred_thousandth(kind):
    config = kind(against="hidden")
    inputs = random_inputs(rows=64, vocab=2000, dtype=torch.float32)
    leaves = (inputs.hidden, inputs.head_weight)
    found, wanted = config.build()(inputs, SCALES).total, dense_total(config, inputs)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for gradient, exact in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), strict=True
    ):
        assert ((gradient - exact).norm() / exact.norm()).item() < 1e-5


def test_entries_for_the_whole_vocabulary_say_the_same():
    """Two paths to one number: states, and a store that left nothing out."""
    inputs = random_inputs()
    logprobs = (inputs.teacher_hidden @ inputs.teacher_head.T).log_softmax(dim=1)
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    stored = LossInputs(
        **same
        | {
            "target_ids": torch.arange(31).expand(23, 31),
            "target_logprobs": logprobs,
            "target_tail": torch.full((23,), -torch.inf).double(),
        }
    )
    for kind in KINDS:
        exact = kind(against="hidden", temperature=1.5).build()(inputs, SCALES)
        listed = kind(temperature=1.5).build()(stored, SCALES)
        torch.testing.assert_close(exact.total, listed.total, rtol=1e-11, atol=1e-12)
        for name in ("kl_at_least", "teacher_mass", "student_mass", "nll"):
            torch.testing.assert_close(exact.metrics[name], listed.metrics[name])
        assert exact.metrics["unseen_kl_at_most"].tolist() == [0, 0, 0]


def test_no_tensor_grows_with_rows_times_vocabulary():
    inputs = random_inputs(rows=512, dim=8, vocab=1000, dtype=torch.float32)
    with Largest() as largest:
        config = ForwardKLConfig(against="hidden", chunk_rows=16)
        config.build()(inputs, SCALES).total.backward()
    assert largest.elements <= 16 * 1000


def test_what_is_missing_or_senseless_is_named():
    inputs = random_inputs()
    same = {name: getattr(inputs, name) for name in vars(inputs)}
    with pytest.raises(DataError, match="needs teacher_hidden"):
        ForwardKLConfig(against="hidden").build()(
            LossInputs(**same | {"teacher_hidden": None}), SCALES
        )
    with pytest.raises(ConfigError, match="leave tail out"):
        validate(ForwardKLConfig, {"against": "hidden", "tail": "renormalized"}, source="test")
