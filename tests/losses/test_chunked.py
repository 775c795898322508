"""The chunked head: equal to dense autograd, whatever the chunks, and never a [rows, vocab]."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpmoe.head import token_logprobs
from vpmoe.losses import LossInputs
from vpmoe.losses.chunked import (
    STUDENT_LOGPROBS,
    RowResult,
    chunked_loss,
    chunked_loss_reference,
    label_row_function,
)

ROWS, DIM, VOCAB = 23, 6, 31


def inputs_of(*, rows=ROWS, dim=DIM, vocab=VOCAB, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=dtype).requires_grad_()
    head_weight = torch.randn(vocab, dim, generator=generator, dtype=dtype).requires_grad_()
    return LossInputs(
        hidden=hidden,
        head_weight=head_weight,
        labels=torch.randint(vocab, (rows,), generator=generator),
        span_ids=torch.randint(1, 3, (rows,), generator=generator, dtype=torch.uint8),
        content_mask=torch.ones(rows, dtype=torch.bool),
    )


def curved(student_logprobs, rows=None):
    """A row loss whose slope depends on the student, so that a wrong chain rule shows."""
    return -student_logprobs + 0.3 * student_logprobs.square()


def grads_of(total, inputs):
    return torch.autograd.grad(total, (inputs.hidden, inputs.head_weight))


@pytest.mark.parametrize("chunk_rows", [1, 4, 23, 100])
def test_equals_dense_autograd(chunk_rows):
    inputs = inputs_of()
    coefficients = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    expected = chunked_loss_reference(
        inputs.hidden, inputs.head_weight, inputs.labels, coefficients, curved
    )
    result = chunked_loss(
        inputs.hidden,
        inputs.head_weight,
        coefficients,
        label_row_function(inputs, curved),
        chunk_rows=chunk_rows,
    )
    torch.testing.assert_close(result.total, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        grads_of(3 * result.total, inputs), grads_of(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    logprobs = token_logprobs(inputs.hidden, inputs.head_weight, inputs.labels)
    torch.testing.assert_close(result.extras[STUDENT_LOGPROBS], logprobs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.values, curved(logprobs), rtol=1e-12, atol=1e-12)


def test_worked_example():
    hidden = torch.tensor([[0.5, -1, 0.25], [1, 0.3, -0.7]], dtype=torch.float64)
    head_weight = torch.tensor(
        [[1, 0, 0.5], [-0.5, 1, 0], [0.2, 0.2, 0.2], [0, -1, 1]], dtype=torch.float64
    )
    inputs = LossInputs(
        hidden=hidden.requires_grad_(),
        head_weight=head_weight.requires_grad_(),
        labels=torch.tensor([2, 0]),
        span_ids=torch.tensor([1, 1], dtype=torch.uint8),
        content_mask=torch.tensor([True, True]),
    )
    halves = torch.full((2,), 0.5, dtype=torch.float64)
    function = label_row_function(inputs, lambda logprobs, rows: -logprobs)
    total = chunked_loss(inputs.hidden, inputs.head_weight, halves, function, chunk_rows=1).total
    grad_hidden, grad_head = grads_of(total, inputs)
    assert total.item() == pytest.approx(1.364316, abs=5e-7)
    wanted_hidden = [[0.045175, -0.328430, 0.249794], [-0.295293, 0.079954, -0.066634]]
    wanted_head = [
        [-0.202752, -0.223680, 0.226894],
        [0.107643, 0.007318, -0.062320],
        [-0.080664, 0.467882, -0.200274],
        [0.175772, -0.251521, 0.035700],
    ]
    tolerance = {"rtol": 0, "atol": 5.1e-7}
    torch.testing.assert_close(grad_hidden, torch.tensor(wanted_hidden).double(), **tolerance)
    torch.testing.assert_close(grad_head, torch.tensor(wanted_head).double(), **tolerance)


def test_a_row_function_on_the_whole_distribution():
    """The seam for later objectives: forward KL to a dense teacher, in its own few lines."""
    inputs = inputs_of()
    teacher = torch.randn(ROWS, VOCAB, dtype=torch.float64).softmax(dim=1)
    coefficients = torch.rand(ROWS, dtype=torch.float64)

    def forward_kl(logits, rows, coefficients):
        logprobs = logits.log_softmax(dim=1)
        values = (teacher[rows] * (teacher[rows].log() - logprobs)).sum(dim=1)
        return RowResult(values, {}, coefficients[:, None] * (logprobs.exp() - teacher[rows]))

    total = chunked_loss(
        inputs.hidden, inputs.head_weight, coefficients, forward_kl, chunk_rows=5
    ).total
    logprobs = (inputs.hidden @ inputs.head_weight.T).log_softmax(dim=1)
    expected = (coefficients * (teacher * (teacher.log() - logprobs)).sum(dim=1)).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(grads_of(total, inputs), grads_of(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation made, and every matrix product's shape."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // 4 for t in made)])
        if func is torch.ops.aten.mm.default:
            self.products.append(tuple(out.shape))
        return out


def test_no_tensor_grows_with_rows_times_vocabulary():
    rows, dim, vocab, chunk = 512, 8, 1000, 16
    inputs = inputs_of(rows=rows, dim=dim, vocab=vocab, dtype=torch.float32)
    with Largest() as largest:
        function = label_row_function(inputs, curved)
        ones = torch.ones(rows)
        total = chunked_loss(
            inputs.hidden, inputs.head_weight, ones, function, chunk_rows=chunk
        ).total
        total.backward()
    assert largest.elements <= chunk * vocab < rows * vocab


def test_a_frozen_head_costs_no_gradient_product():
    inputs = inputs_of()
    frozen = inputs.head_weight.detach()
    ones = torch.ones(ROWS)
    with Largest() as largest:
        function = label_row_function(inputs, curved)
        result = chunked_loss(inputs.hidden, frozen, ones, function, chunk_rows=ROWS)
    assert largest.products == [(ROWS, VOCAB), (ROWS, DIM)]  # logits and d hidden
    (grad,) = torch.autograd.grad(result.total, inputs.hidden)
    expected = chunked_loss_reference(inputs.hidden, frozen, inputs.labels, ones, curved)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, inputs.hidden)[0])


def test_evaluation_costs_logits_alone():
    inputs = inputs_of()
    with torch.no_grad(), Largest() as largest:
        function = label_row_function(inputs, curved)
        result = chunked_loss(inputs.hidden, inputs.head_weight, torch.ones(ROWS), function)
    assert largest.products == [(ROWS, VOCAB)]
    assert not result.total.requires_grad


def test_no_rows_give_zero_and_zero_gradients():
    inputs = inputs_of().select(slice(0, 0))
    function = label_row_function(inputs, curved)
    total = chunked_loss(inputs.hidden, inputs.head_weight, torch.ones(0), function).total
    (grad_head,) = torch.autograd.grad(total, inputs.head_weight)
    assert total.item() == 0
    assert torch.equal(grad_head, torch.zeros(VOCAB, DIM, dtype=torch.float64))


def test_bfloat16_gradients_are_rounded_once():
    """The head's gradient is summed in float32: many chunks cost no more than one."""
    wide = inputs_of(rows=512, dtype=torch.float32)
    narrow = {
        name: getattr(wide, name).detach().bfloat16().requires_grad_()
        for name in ("hidden", "head_weight")
    }
    inputs = LossInputs(
        **narrow, labels=wide.labels, span_ids=wide.span_ids, content_mask=wide.content_mask
    )
    coefficients = torch.full((512,), 1 / 512)
    function = label_row_function(inputs, lambda logprobs, rows: -logprobs)
    total = chunked_loss(
        inputs.hidden, inputs.head_weight, coefficients, function, chunk_rows=8
    ).total
    grads = grads_of(total, inputs)
    exact = [narrow[name].detach().double().requires_grad_() for name in narrow]
    expected = chunked_loss_reference(
        *exact, inputs.labels, coefficients.double(), lambda logprobs: -logprobs
    )
    for found, wanted in zip(grads, torch.autograd.grad(expected, exact), strict=True):
        assert found.dtype == torch.bfloat16
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 6e-3  # bfloat16 keeps 8 bits: half a unit in the last place is 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_against_float64(dtype):
    """The full vocabulary, in the precision of training."""
    rows, dim, vocab = 600, 64, 201_088
    wide = inputs_of(rows=rows, dim=dim, vocab=vocab, dtype=torch.float32)
    narrow = [
        tensor.detach().to("cuda", dtype).requires_grad_()
        for tensor in (wide.hidden * 0.2, wide.head_weight * 0.2)
    ]
    inputs = LossInputs(*narrow, wide.labels.cuda(), wide.span_ids.cuda(), wide.content_mask.cuda())
    coefficients = torch.full((rows,), 1 / rows, device="cuda")
    total = chunked_loss(
        *narrow, coefficients, label_row_function(inputs, curved), chunk_rows=256
    ).total
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    expected = chunked_loss_reference(*exact, inputs.labels, coefficients.double(), curved)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    assert total.item() == pytest.approx(expected.item(), rel=close)
    for found, wanted in zip(
        grads_of(total, inputs), torch.autograd.grad(expected, exact), strict=True
    ):
        assert (found.double() - wanted).norm() / wanted.norm() < close


@pytest.mark.gpu
def test_no_two_chunks_are_in_memory_together():
    """One chunk of logits, the head's float32 sums and its rounded gradient, and little more."""
    rows, dim, vocab, chunk = 1024, 64, 201_088, 256
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(rows, dim, **options).requires_grad_()
    head = torch.randn(vocab, dim, **options).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator, device="cuda")
    ones = torch.ones(rows, device="cuda")
    inputs = LossInputs(hidden, head, labels, ones.byte(), ones.bool())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function = label_row_function(inputs, lambda logprobs, _: -logprobs)
    chunked_loss(hidden, head, ones / rows, function, chunk_rows=chunk).total.backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 2 * vocab * (chunk + 3 * dim) * 1.2
