"""Losses on stored targets on the GPU: in place of bf16 logits, against float64."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu, relative_error
from vpmoe.losses import (
    ForwardKLConfig,
    GeneralizedJSDConfig,
    LossInputs,
    RandomSamplingConfig,
    ReverseKLConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
)
from vpmoe.losses.chunked import STUDENT_LOGPROBS

pytestmark = needs_gpu

SCALES = torch.tensor([0.0, 0.4, 0.6])
CONFIGS = [
    ForwardKLConfig(),
    ForwardKLConfig(label_weight=0.3),
    ForwardKLConfig(temperature=2.0),
    ForwardKLConfig(temperature=2.0, label_weight=0.3),
    ForwardKLConfig(tail="renormalized"),
    ForwardKLConfig(tail="unnormalized", label_weight=0.3),
    ReverseKLConfig(),
    GeneralizedJSDConfig(beta=0.3),
    SkewedForwardKLConfig(),
    SkewedReverseKLConfig(temperature=0.8),
    RandomSamplingConfig(),
]


def random_inputs(rows, vocab, dim, entries):
    """Entries from a teacher near the student, some places unused, some labels among the ids."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, dim, device="cuda").bfloat16()
    head = (torch.randn(vocab, dim, device="cuda") * 0.15).bfloat16()
    teacher = hidden.float() @ head.float().T + torch.randn(rows, vocab, device="cuda")
    teacher = teacher.log_softmax(dim=1)
    logprobs, ids = teacher.topk(entries, dim=1)
    unused = torch.arange(entries, device="cuda") >= torch.randint(
        1, entries + 1, (rows, 1), device="cuda"
    )
    logprobs = logprobs.masked_fill(unused, -torch.inf)
    tail = torch.log1p(-logprobs.exp().sum(dim=1).clamp_max(1 - 1e-6))
    labels = torch.where(
        torch.rand(rows, device="cuda") < 0.5,
        ids[:, 0],
        torch.randint(vocab, (rows,), device="cuda"),
    )
    return LossInputs(
        hidden=hidden.requires_grad_(),
        head_weight=head.requires_grad_(),
        labels=labels,
        span_ids=torch.randint(1, 3, (rows,), device="cuda", dtype=torch.uint8),
        content_mask=torch.ones(rows, dtype=torch.bool, device="cuda"),
        target_ids=ids.masked_fill(unused, 0),
        target_logprobs=logprobs,
        target_tail=tail,
        target_cap=logprobs.masked_fill(unused, 0).amin(dim=1),
    )


def in_float64(inputs):
    """The same rows for the reference path."""
    return LossInputs(
        **{
            name: value.detach().double()
            if value is not None and value.is_floating_point()
            else value
            for name, value in vars(inputs).items()
        }
    )


def error_beyond_rounding(found, wanted):
    """Relative, where numbers near 0 may be differences of numbers near 0.1."""
    scale = wanted.norm() + 0.1 * len(wanted) ** 0.5
    return ((found.double() - wanted).norm() / scale).item()


def assert_same_rows(config, given, logits, coefficients):
    """The kernels on a chunk of bf16 logits against the reference on the same numbers."""
    exact = in_float64(given)
    rows = slice(0, len(logits))
    wanted = config.build().row_function(exact)(logits.double(), rows, coefficients.double())
    found = config.build().row_function(given)(logits.clone(), rows, coefficients)
    assert error_beyond_rounding(found.values, wanted.values) < 2e-5
    assert relative_error(found.grad_logits, wanted.grad_logits) < BF16
    metrics = config.build().row_metrics(found.extras[STUDENT_LOGPROBS], dict(found.extras), given)
    student = wanted.extras[STUDENT_LOGPROBS]
    expected = config.build().row_metrics(student, dict(wanted.extras), exact)
    for name, value in expected.items():
        assert error_beyond_rounding(metrics[name], value) < 2e-5, name
    plain = config.build().row_function(given)(logits.clone(), rows, None)
    assert torch.equal(plain.values, found.values)
    assert plain.grad_logits is None
    for name, value in found.extras.items():
        assert torch.equal(plain.extras[name], value), name


@pytest.mark.parametrize(("rows", "vocab", "entries"), [(96, 201_088, 64), (77, 1001, 5)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}")
def test_rows_equal_float64(config, rows, vocab, entries):
    given = random_inputs(rows, vocab, 256, entries)
    logits = (given.hidden @ given.head_weight.T).detach()
    assert_same_rows(config, given, logits, torch.rand(rows, device="cuda"))


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], CONFIGS[6]], ids=lambda c: f"{c.kind}")
def test_a_row_whose_entries_hold_everything(config):
    """The tail is far below a rounding of one, and every block but one is empty of mass."""
    given = random_inputs(40, 20_011, 256, 16)
    logits = torch.randn(40, 20_011, device="cuda").bfloat16() - 40
    logits.scatter_(1, given.target_ids, 8.0)
    assert_same_rows(config, given, logits, torch.rand(40, device="cuda"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}")
def test_whole_loss_is_near_float64(config):
    """Through both products, where rounding the logits to bfloat16 is most of the error."""
    given = random_inputs(300, 5003, 256, 16)
    exact = in_float64(given)
    exact.hidden.requires_grad_()
    exact.head_weight.requires_grad_()
    config = type(config)(**dict(config) | {"chunk_rows": 128})
    found = config.build()(given, SCALES)
    wanted = config.build()(exact, SCALES.double())
    grads = torch.autograd.grad(found.total, (given.hidden, given.head_weight))
    exact_grads = torch.autograd.grad(wanted.total, (exact.hidden, exact.head_weight))
    pairs = zip(grads, exact_grads, strict=True)
    assert_close(dict(zip(("dhidden", "dhead"), pairs, strict=True)), 8 * BF16)
    assert relative_error(found.total, wanted.total) < BF16
