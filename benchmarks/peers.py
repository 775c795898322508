"""What a user would take instead of each kernel: plain PyTorch, compiled where that helps it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

# The fastest tiles of those tried for FlexAttention on an H200.
FLEX_TILES: dict[str, Any] = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 32,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "num_warps": 4,
    "num_stages": 3,
}


def grouped_experts(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Routed experts by `torch._grouped_mm`, without biases: sort, gather, product, ReLU², product.

    Biases would cost it a scattered addition each in the backward pass; they are left out.
    """
    slots = ids.shape[1]
    sorted_ids, order = ids.flatten().to(torch.uint8).sort(stable=True)
    edges = torch.arange(1, w1.shape[0] + 1, device=x.device, dtype=torch.int32)
    offsets = torch.searchsorted(sorted_ids.int(), edges, out_int32=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=x.device)
    up = torch._grouped_mm(x[order // slots], w1.transpose(1, 2), offs=offsets)
    units = torch.relu(up).square() * weights.flatten()[order, None].to(x.dtype)
    out = torch._grouped_mm(units, w2.transpose(1, 2), offs=offsets)
    return out[inverse].unflatten(0, (-1, slots)).sum(dim=1)


def flex_attend(
    documents: Tensor, *, window_size: int | None, slopes: Tensor | None, tiles: dict[str, Any]
) -> Callable[..., Tensor]:
    """FlexAttention over packed documents; the sink is applied through the log-sum-exp."""

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        keep = (q >= k) & (documents[b, q] == documents[b, k])
        return keep if window_size is None else keep & (q - k < window_size)

    def penalty(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b
        assert slopes is not None
        return score - slopes[h] * (q - k)

    batch, seq = documents.shape
    blocks = create_block_mask(mask, batch, None, seq, seq, device=documents.device)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor) -> Tensor:
        out, aux = flex_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            score_mod=None if slopes is None else penalty,
            block_mask=blocks,
            enable_gqa=True,
            kernel_options=tiles,
            return_aux=AuxRequest(lse=True),
        )
        kept = torch.sigmoid(aux.lse - sinks[:, None])
        return (out * kept[..., None]).to(out.dtype).transpose(1, 2)

    return torch.compile(attend, dynamic=False, fullgraph=True)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_rows: int
) -> Tensor:
    """Head and cross-entropy in compiled chunks that are computed again in the backward pass."""

    def part(rows: Tensor, of: Tensor) -> Tensor:
        logits = (rows @ weight.T).float()
        return torch.nn.functional.cross_entropy(logits, of, reduction="sum")

    compiled = torch.compile(part, dynamic=False)
    parts = zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True)
    losses = [checkpoint(compiled, rows, of, use_reentrant=False) for rows, of in parts]
    return torch.stack(losses).sum() / labels.numel()  # pyright: ignore[reportArgumentType]
