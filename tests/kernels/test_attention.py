"""Attention: the table of blocks on the CPU, values and gradients on the GPU."""

import pytest
import torch

from tests.kernels.common import BF16, assert_close
from vpmoe.kernels.attention import attend, block_scope
from vpmoe.models.attention.sink import AttentionScope, attend_reference
from vpmoe.models.positions import alibi_slopes


def packed(seq, device="cpu"):
    documents = torch.zeros(3, seq, dtype=torch.int64, device=device)
    documents[0, seq // 5 :] = 1
    documents[0, seq // 2 + 3 :] = 2
    documents[1, seq - 37 :] = -1
    return documents


@pytest.mark.parametrize("window", [None, 1, 16, 17, 40])
@pytest.mark.parametrize("seq", [64, 200, 256])
def test_blocks_are_those_that_the_mask_needs(seq, window):
    documents = packed(seq)
    scope = AttentionScope(torch.arange(seq)[None], None, documents, window)
    keep = torch.nn.functional.pad(scope.mask == 0, (0, -seq % 16))
    # Queries beyond the end see nothing, and it does not matter what is computed for them.
    seen, free = (torch.nn.functional.pad(keep, (0, 0, 0, -seq % 16), value=v) for v in (0, 1))
    tiles = [t.unflatten(2, (-1, 16)).unflatten(1, (-1, 16)) for t in (seen, free)]
    needed, whole = tiles[0].any(dim=4).any(dim=2), tiles[1].all(dim=4).all(dim=2)
    mask = block_scope(documents, window_size=window, block=16).mask
    partial = torch.zeros_like(needed)
    full = torch.zeros_like(needed)
    for found, counts, order in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        rank = torch.arange(order.shape[-1])
        found.scatter_(2, order[:, 0].long(), rank < counts[:, 0, :, None])
    assert torch.equal(partial | full, needed)
    assert not (full & ~whole).any()  # what is not masked key by key is seen whole
    assert not (partial & full).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("seq", "window", "dim"), [(1024, 128, 128), (1000, None, 128), (300, 100, 64)]
)
def test_attention_equals_float64(seq, window, dim):
    torch.manual_seed(0)
    slopes = alibi_slopes(8).cuda() if window is None else None
    documents = packed(seq, "cuda")
    shape = lambda heads: (3, seq, heads, dim)  # noqa: E731
    leaves = [
        (torch.randn(*shape(heads), device="cuda") * scale).bfloat16().requires_grad_()
        for heads, scale in ((8, 2.0), (2, 1.0), (2, 1.0))
    ]
    sinks = torch.randn(8, device="cuda").requires_grad_()
    scope = block_scope(documents, window_size=window)
    compiled = torch.compile(attend, dynamic=False, fullgraph=True)
    out = compiled(*leaves, scope, sinks=sinks, slopes=slopes)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, [*leaves, sinks], grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in (*leaves, sinks)]
    whole = AttentionScope(torch.arange(seq, device="cuda")[None], None, documents, window)
    expected = attend_reference(*exact[:3], whole, sinks=exact[3], slopes=slopes)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    pairs = dict(
        zip(("dq", "dk", "dv", "dsinks"), zip(grads, expected_grads, strict=True), strict=True)
    )
    assert_close({"out": (out, expected), **pairs}, 2 * BF16)
