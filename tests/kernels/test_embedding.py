"""Embedding rows on the GPU: values, gradients in float64, and sums kept in `main_grad`."""

import pytest
import torch

from tests.kernels.common import needs_gpu, relative_error

pytestmark = needs_gpu


def case(rows, vocab, dim, *, dtype, repeated):
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    tokens[torch.rand(rows, generator=generator) < repeated] = 3
    weight = torch.randn(vocab, dim, generator=generator).to(dtype)
    grads = torch.randn(rows, dim, generator=generator).to(dtype)
    return tokens.cuda(), weight.cuda().requires_grad_(), grads.cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (333, 192), (2048, 1024), (500, 2880)])
@pytest.mark.parametrize("repeated", [0.0, 0.4, 1.0])
def test_rows_and_their_gradients(rows, dim, dtype, repeated):
    from vpmoe.kernels.embedding import embed

    tokens, weight, grads = case(rows, 100, dim, dtype=dtype, repeated=repeated)
    exact = torch.zeros(100, dim, dtype=torch.float64, device="cuda")
    exact.index_add_(0, tokens, grads.double())
    out = embed(tokens, weight)
    assert torch.equal(out, weight.detach()[tokens])
    (found,) = torch.autograd.grad(out, weight, grads)
    assert found.dtype == dtype
    assert relative_error(found, exact) < (4e-3 if dtype == torch.bfloat16 else 1e-6)
    start = torch.randn(100, dim, device="cuda")
    weight.main_grad = start.clone()
    embed(tokens[None], weight).backward(grads[None])
    assert weight.grad is None
    assert relative_error(weight.main_grad, start.double() + exact) < 1e-6
    untouched = torch.ones(100, dtype=torch.bool, device="cuda")
    untouched[tokens] = False
    assert torch.equal(weight.main_grad[untouched], start[untouched])
