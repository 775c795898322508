"""The table of blocks says what the mask says."""

import pytest
import torch

from vpmoe.kernels.packed import block_scope
from vpmoe.models.attention.sink import AttentionScope


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
