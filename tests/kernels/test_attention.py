"""Attention: the ranges on the CPU, values and gradients on the GPU."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close
from vpmoe.kernels.attention import attend, packed_scope
from vpmoe.models.attention.sink import AttentionScope, attend_reference
from vpmoe.models.positions import alibi_slopes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def packed(seq, device="cpu"):
    documents = torch.zeros(4, seq, dtype=torch.int64, device=device)
    documents[0, seq // 5 :] = 1
    documents[0, seq // 2 + 3 :] = 2
    documents[1, max(seq - 37, 0) :] = -1
    documents[2] = torch.arange(seq, device=device)  # documents of one token
    documents[3] = torch.arange(seq, device=device) // 5
    return documents


@pytest.mark.parametrize("window", [None, 1, 16, 17, 40, 500])
@pytest.mark.parametrize("seq", [1, 2, 64, 200])
def test_ranges_say_what_the_mask_says(seq, window):
    documents = packed(seq)
    keep = AttentionScope(torch.arange(seq)[None], None, documents, window).mask == 0
    scope = packed_scope(documents, window_size=window)
    place = torch.arange(seq)
    seen = (place >= scope.first[..., None]) & (place <= place[:, None])
    assert torch.equal(seen, keep)
    seeing = (place[:, None] <= scope.last[:, None, :]) & (place[:, None] >= place)
    assert torch.equal(seeing, keep)


def gradients(function, leaves, scope, grad, *, slopes):
    *states, sinks = leaves
    out = function(*states, scope, sinks=sinks, slopes=slopes)
    return out, *torch.autograd.grad(out, [x for x in leaves if x is not None], grad.to(out))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(
    ("seq", "window", "dim"),
    [
        (1024, 128, 128),
        (1000, None, 128),
        (300, 100, 64),
        (333, 256, 128),
        (257, 1, 32),
        (1, 128, 128),
        (70, None, 256),
    ],
)
def test_attention_equals_float64(seq, window, dim, heads):
    torch.manual_seed(0)
    slopes = alibi_slopes(heads[0]).cuda() if window in (None, 256) else None
    documents = packed(seq, "cuda")
    leaves = [
        (torch.randn(4, seq, count, dim, device="cuda") * scale).bfloat16().requires_grad_()
        for count, scale in ((heads[0], 2.0), (heads[1], 1.0), (heads[1], 1.0))
    ]
    has_sinks = window != 100
    leaves.append(torch.randn(heads[0], device="cuda").requires_grad_() if has_sinks else None)
    grad = torch.randn(4, seq, heads[0], dim, device="cuda").bfloat16()
    scope = packed_scope(documents, window_size=window)
    found = gradients(attend, leaves, scope, grad, slopes=slopes)
    exact = [leaf if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    whole = AttentionScope(torch.arange(seq, device="cuda")[None], None, documents, window)
    expected = gradients(attend_reference, exact, whole, grad, slopes=slopes)
    names = ("out", "dq", "dk", "dv", "dsinks")
    pairs = zip(found, expected, strict=True)
    close = dict(zip(names, pairs, strict=False))
    if seq == 1 or window == 1:  # a lone key: gradients of logits are the sink's alone
        close = {name: close[name] for name in ("out", "dv", "dsinks")}
    assert_close(close, 2 * BF16)


@pytest.mark.gpu
@needs_gpu
def test_attention_is_the_same_compiled_with_strides_and_twice():
    torch.manual_seed(0)
    documents = packed(500, "cuda")
    scope = packed_scope(documents, window_size=128)
    wide = torch.randn(4, 500, 12, 128, device="cuda").bfloat16().requires_grad_()
    sinks = torch.randn(8, device="cuda").requires_grad_()
    grad = torch.randn(4, 500, 8, 128, device="cuda").bfloat16()

    def run(wide, sinks):
        queries, keys, values = wide.split((8, 2, 2), dim=2)
        return attend(queries, keys, values, scope, sinks=sinks)

    def apart(wide, sinks):
        states = (x.contiguous() for x in wide.split((8, 2, 2), dim=2))
        return attend(*states, scope, sinks=sinks)

    results = []
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    for function in (run, compiled, apart, apart):
        out = function(wide, sinks)
        results.append([out, *torch.autograd.grad(out, [wide, sinks], grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
