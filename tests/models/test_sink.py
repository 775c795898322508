"""Attention with sink, window, documents and penalties: worked examples, gradients, both paths."""

import pytest
import torch
from torch import tensor

from vpmoe.models.attention.sink import AttentionScope, attend_reference, sink_softmax
from vpmoe.models.positions import alibi_slopes


def packed(documents: torch.Tensor, window: int | None = None) -> AttentionScope:
    return AttentionScope(torch.arange(documents.shape[1])[None], None, documents, window)


def one_document(seq: int, window: int | None = None) -> AttentionScope:
    return packed(torch.zeros(1, seq, dtype=torch.int64), window)


def naive(q, k, v, keep, *, sinks=None, slopes=None):
    """Loops over heads; the sink is one more key with logit s and value 0."""
    out = torch.zeros_like(q)
    place = torch.arange(q.shape[1])
    for head in range(q.shape[2]):
        key = head // (q.shape[2] // k.shape[2])
        logits = torch.einsum("bth,bsh->bts", q[:, :, head], k[:, :, key]) / q.shape[3] ** 0.5
        if slopes is not None:
            logits = logits - slopes[head] * (place[:, None] - place[None])
        logits = logits.masked_fill(~keep, -torch.inf)
        if sinks is not None:
            sink = sinks[head].expand(*logits.shape[:2], 1)
            weights = torch.cat((logits, sink), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = logits.softmax(dim=-1)
        out[:, :, head] = weights @ v[:, :, key]
    return out


def keep_of(documents, window):
    place = torch.arange(documents.shape[1])
    back = place[:, None] - place[None]
    keep = (back >= 0) & (documents[:, :, None] == documents[:, None, :])
    return keep if window is None else keep & (back < window)


def test_sink_worked_example():
    a = tensor([[1.0, 2, 3]]).double().requires_grad_()
    s = tensor([[0.5]]).double().requires_grad_()
    v = tensor([[1.0, 0], [0, 1], [2, -1]]).double().requires_grad_()
    p = sink_softmax(a, s)
    o = p @ v
    o.backward(tensor([[1.0, -0.5]]).double())
    close = {"abs": 1e-6}
    assert p.flatten().tolist() == pytest.approx([0.085369, 0.232057, 0.630796], **close)
    assert 1 - p.sum().item() == pytest.approx(0.051779, **close)
    assert o.flatten().tolist() == pytest.approx([1.346960, -0.398739], **close)
    assert a.grad.flatten().tolist() == pytest.approx([-0.046640, -0.474864, 0.601571], **close)
    assert s.grad.item() == pytest.approx(-0.080067, **close)
    assert v.grad.flatten().tolist() == pytest.approx(
        [0.085369, -0.042684, 0.232057, -0.116028, 0.630796, -0.315398], **close
    )


def test_sink_equals_rescaling_the_plain_softmax():
    torch.manual_seed(0)
    scores, sinks = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    rescaled = scores.softmax(-1) * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)
    torch.testing.assert_close(sink_softmax(scores, sinks), rescaled, atol=1e-12, rtol=0)


def test_no_sink_is_the_plain_softmax():
    scores = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(sink_softmax(scores, None), scores.softmax(-1))


def test_a_query_that_sees_nothing_gathers_nothing():
    scores = torch.full((2, 3), -torch.inf).requires_grad_()
    for sinks in (None, tensor([[0.5], [1.0]])):
        weights = sink_softmax(scores, sinks)
        (grad,) = torch.autograd.grad(weights.sum(), scores)
        assert weights.count_nonzero() == 0
        assert grad.count_nonzero() == 0


def test_sink_gradcheck():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sink_softmax, (scores, sinks))


def test_attention_gradcheck():
    torch.manual_seed(0)
    documents = tensor([[0, 0, 0, 1, 1, 1, 1]])
    q = torch.randn(1, 7, 4, 2, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 1, 7, 2, 2, dtype=torch.float64).unbind()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, sinks):
        scope = packed(documents, window=3)
        return attend_reference(q, k, v, scope, sinks=sinks, slopes=alibi_slopes(4))

    leaves = (q, k.requires_grad_(), v.requires_grad_(), sinks)
    assert torch.autograd.gradcheck(attend, leaves)


def test_window_and_documents_worked_example():
    documents = tensor([[0, 0, 0, 0, 1, 1, 1]])
    mask = packed(documents, window=3).mask[0]
    seen = [row.nonzero().flatten().tolist() for row in mask == 0]
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [4], [4, 5], [4, 5, 6]]
    assert int((mask == 0).sum()) == 15


def test_window_counts_the_query_itself():
    mask = one_document(300, window=128).mask[0]
    assert mask[200, 200 - 127] == 0
    assert mask[200, 200 - 128] == -torch.inf
    assert int((one_document(2_048, window=128).mask == 0).sum()) == 254_016


@pytest.mark.parametrize("window", [None, 4, 5])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("has_slopes", [True, False])
def test_reference_equals_naive(window, has_sinks, has_slopes):
    # 23 tokens and windows of 4 and 5: whole and broken blocks, documents across their borders.
    torch.manual_seed(0)
    documents = tensor([[0] * 9 + [1] * 3 + [2] * 11, [0] * 2 + [1] * 18 + [-1] * 3])
    q = torch.randn(2, 23, 6, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 23, 2, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 23, 2, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(6, dtype=torch.float64, requires_grad=True) if has_sinks else None
    slopes = alibi_slopes(6) if has_slopes else None
    upstream = torch.randn(2, 23, 6, 4, dtype=torch.float64)
    leaves = [q, k, v, *([sinks] if has_sinks else [])]
    scope = packed(documents, window)
    assert (scope.block_size is not None) == (window is not None)
    ours = attend_reference(q, k, v, scope, sinks=sinks, slopes=slopes)
    theirs = naive(q, k, v, keep_of(documents, window), sinks=sinks, slopes=slopes)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    grads = zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    )
    for mine, other in grads:
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-10)


def test_penalty_falls_with_distance():
    # Equal keys: weights differ by the penalty alone, exp(-slope) per token back.
    q = torch.zeros(1, 4, 1, 4, dtype=torch.float64)
    v = torch.eye(4, dtype=torch.float64).view(1, 4, 1, 4)
    weights = attend_reference(q, q, v, one_document(4), slopes=tensor([0.5]))[0, 3, 0]
    ratios = (weights[1:] / weights[:-1]).tolist()
    assert ratios == pytest.approx([2.718281828**0.5] * 3)


def test_head_groups_are_contiguous():
    q = torch.zeros(1, 1, 8, 2)
    v = tensor([1.0, 2.0]).view(1, 1, 2, 1).expand(1, 1, 2, 2)
    out = attend_reference(q, torch.zeros(1, 1, 2, 2), v, one_document(1))
    assert out[0, 0, :, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
