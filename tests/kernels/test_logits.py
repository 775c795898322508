"""Head and loss on the GPU: the chunked loss against float64, and no [rows, vocab] in memory."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close, needs_gpu, relative_error
from vpmoe.losses.base import LossInputs
from vpmoe.losses.chunked import chunked_loss, label_row_function

pytestmark = needs_gpu


def inputs(rows, vocab, dim):
    torch.manual_seed(0)
    return LossInputs(
        hidden=torch.randn(rows, dim, device="cuda").bfloat16().requires_grad_(),
        head_weight=(torch.randn(vocab, dim, device="cuda") * 0.1).bfloat16().requires_grad_(),
        labels=torch.randint(0, vocab, (rows,), device="cuda"),
        span_ids=torch.ones(rows, dtype=torch.uint8, device="cuda"),
        content_mask=torch.ones(rows, dtype=torch.bool, device="cuda"),
    )


@pytest.mark.parametrize(("rows", "vocab", "chunk"), [(300, 201_088, 128), (77, 1001, 1000)])
@pytest.mark.parametrize("loss", [lambda p, _: -p, lambda p, _: p.exp() * p])
def test_loss_and_gradients_equal_float64(rows, vocab, chunk, loss):
    given = inputs(rows, vocab, 256)
    coefficients = torch.rand(rows, device="cuda")
    result = chunked_loss(
        given.hidden,
        given.head_weight,
        coefficients,
        label_row_function(given, loss),
        chunk_rows=chunk,
    )
    leaves = (given.hidden, given.head_weight)
    grads = torch.autograd.grad(3 * result.total, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logprobs = (exact[0] @ exact[1].T).log_softmax(dim=1)
    logprobs = logprobs.gather(1, given.labels[:, None]).squeeze(1)
    values = loss(logprobs, given)
    expected = 3 * (coefficients.double() * values).sum()
    pairs = zip(grads, torch.autograd.grad(expected, exact), strict=True)
    assert_close(dict(zip(("dhidden", "dhead"), pairs, strict=True)), 2 * BF16)
    assert relative_error(3 * result.total, expected) < BF16
    with torch.no_grad():
        plain = chunked_loss(
            given.hidden,
            given.head_weight,
            coefficients,
            label_row_function(given, loss),
            chunk_rows=chunk,
        )
    assert torch.equal(plain.values, result.values)


def test_memory_stays_under_4_gib():
    given = inputs(16_384, 201_088, 1024)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = chunked_loss(
        given.hidden,
        given.head_weight,
        torch.ones(16_384, device="cuda"),
        label_row_function(given, lambda p, _: -p),
        chunk_rows=4096,
    )
    torch.autograd.grad(result.total, (given.hidden, given.head_weight))
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**30
