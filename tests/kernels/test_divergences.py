"""Divergences over the whole vocabulary on the GPU: in place of bf16 logits, against float64."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu, relative_error
from tests.kernels.test_targets import SCALES, in_float64
from vpmoe.losses import (
    ForwardKLConfig,
    GeneralizedJSDConfig,
    LossInputs,
    ReverseKLConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
)
from vpmoe.losses.exact import _on_gpu, _reference

pytestmark = needs_gpu

KINDS = [
    ForwardKLConfig,
    ReverseKLConfig,
    GeneralizedJSDConfig,
    SkewedForwardKLConfig,
    SkewedReverseKLConfig,
]
CHANGES = [{}, {"temperature": 2.0}, {"label_weight": 0.3, "temperature": 0.8}]


def draw(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize(("rows", "vocab"), [(48, 201_088), (77, 1001)])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_rows_equal_float64(kind, changes, rows, vocab, spread):
    """A spread of 8 puts all mass on few ids, and mixtures below what float32 can hold."""
    torch.manual_seed(0)
    student, teacher = draw(rows, vocab, scale=spread), draw(rows, vocab, scale=spread)
    labels = torch.randint(vocab, (rows,), device="cuda")
    form = kind(against="hidden", **changes).build().form
    coefficients = torch.rand(rows, device="cuda")
    wanted = _reference(student.double(), teacher.double(), labels, form, coefficients.double())
    found = _on_gpu(student.clone(), teacher, labels, form, coefficients)
    assert relative_error(found.values, wanted.values) < 2e-5
    # Where one id has all of p, u - E u there is a difference of equals: float32 leaves 1e-6 of it.
    error = (found.grad_logits.double() - wanted.grad_logits).norm()
    assert error < BF16 * wanted.grad_logits.norm() + 2e-6 * coefficients.norm()
    for name, value in wanted.extras.items():
        assert relative_error(found.extras[name], value) < 2e-5, name
    plain = _on_gpu(student.clone(), teacher, labels, form, None)
    assert torch.equal(plain.values, found.values)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whole_loss_is_near_float64(kind):
    torch.manual_seed(0)
    given = LossInputs(
        hidden=draw(300, 256).requires_grad_(),
        head_weight=draw(5003, 256, scale=0.15).requires_grad_(),
        labels=torch.randint(5003, (300,), device="cuda"),
        span_ids=torch.randint(1, 3, (300,), device="cuda", dtype=torch.uint8),
        content_mask=torch.ones(300, dtype=torch.bool, device="cuda"),
        teacher_hidden=draw(300, 384),
        teacher_head=draw(5003, 384, scale=0.15),
    )
    exact = in_float64(given)
    exact.hidden.requires_grad_()
    exact.head_weight.requires_grad_()
    loss = kind(against="hidden", chunk_rows=128, label_weight=0.1).build()
    found, wanted = loss(given, SCALES), loss(exact, SCALES.double())
    grads = torch.autograd.grad(found.total, (given.hidden, given.head_weight))
    exact_grads = torch.autograd.grad(wanted.total, (exact.hidden, exact.head_weight))
    pairs = zip(grads, exact_grads, strict=True)
    assert_close(dict(zip(("dhidden", "dhead"), pairs, strict=True)), 8 * BF16)
    assert relative_error(found.total, wanted.total) < BF16
    for name, value in wanted.metrics.items():
        if name != "unseen_kl_at_most":
            assert relative_error(found.metrics[name][1:], value[1:]) < 2 * BF16, name
