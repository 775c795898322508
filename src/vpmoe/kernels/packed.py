"""Attention of a packed row without a gradient, for models that are not the student.

The mask is a table of blocks made once per batch from the first and last document of each block, so
that no [T, T] mask is ever computed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

# Fastest on an H200 of those tried, for heads of 64.
BLOCK = 64  # tokens of a block of the mask
_PADDING = 2**30  # sorts padding, which comes last in a row, behind every document
TILES: FlexKernelOptions = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "num_warps": 4,
    "num_stages": 3,
    "FORCE_USE_FLEX_ATTENTION": True,
}  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class BlockScope:
    """Which keys a query of a packed row sees, as a table of blocks.

    Attributes:
        mask: Blocks to visit; those seen in part are masked key by key.
    """

    mask: BlockMask


def block_scope(
    documents: Int[Tensor, "batch seq"], *, window_size: int | None, block: int = BLOCK
) -> BlockScope:
    """Blocks of keys that blocks of queries see: causal, inside the document and the window.

    Args:
        documents: Document of each token; ascending along a row, negative for padding at its end.
        window_size: Keys a query sees, itself included; None for all.
        block: Tokens of a block.

    References:
        Dong et al., "Flex Attention" (2024), arXiv:2412.05496. Difference: the table comes from
        each block's first and last document, not from a [T, T] mask.
    """
    seq = documents.shape[1]
    documents = torch.where(documents < 0, _PADDING, documents).to(torch.int32)
    num_blocks = -(-seq // block)
    short = num_blocks * block - seq
    blocks = torch.nn.functional.pad(documents, (0, short), value=_PADDING)
    blocks = blocks.unflatten(1, (num_blocks, block))
    first, last = blocks[..., 0], blocks[..., -1]  # (B, blocks)
    number = torch.arange(num_blocks, device=documents.device)
    back = (number[:, None] - number[None, :]) * block  # distance between blocks' first tokens
    seen = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])
    whole = (first[:, :, None] == last[:, None, :]) & (first[:, None, :] == last[:, :, None])
    seen, whole = seen & (back >= 0), whole & (back >= block)
    if window_size is not None:
        seen = seen & (back - block + 1 < window_size)
        whole = whole & (back + block - 1 < window_size)
    # A block beyond the end of the row holds no token that may be read unmasked.
    whole = whole & ((number + 1) * block <= seq)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del h
        keep = (q >= k) & (documents[b, q] == documents[b, k])
        return keep if window_size is None else keep & (q - k < window_size)

    mask = BlockMask.from_kv_blocks(
        *_ordered(seen & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(seq, seq),
    )
    return BlockScope(mask)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which, those first."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None], order.to(torch.int32)[:, None]


def attend_packed(
    queries: Float[Tensor, "batch heads seq dim"],
    keys: Float[Tensor, "batch kv_heads seq dim"],
    values: Float[Tensor, "batch kv_heads seq dim"],
    scope: BlockScope,
    *,
    scale: float,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch seq heads dim"]:
    """What each query gathers; to be called inside a compiled region.

    Args:
        queries: After rotation.
        keys: The same.
        values: Unrotated.
        scope: Who sees whom.
        scale: Of the products of queries and keys.
        sinks: Logit of each head's sink.

    References:
        Dong et al., "Flex Attention" (2024), arXiv:2412.05496; OpenAI, "gpt-oss model card"
        (2025), arXiv:2508.10925, for the sink, which is applied through the log-sum-exp: a softmax
        with one more term is the softmax without it times sigmoid(lse - sink).
    """
    out, aux = flex_attention(
        queries,
        keys,
        values,
        block_mask=scope.mask,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
        kernel_options=TILES,
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        assert aux.lse is not None
        kept = torch.sigmoid(aux.lse - sinks.float()[:, None])  # (B, N, T)
        out = (out * kept[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous()
