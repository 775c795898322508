"""Attention on one GPU by FlexAttention: window, documents, penalties, sink; no [T, T] anywhere.

The mask is a table of blocks made once per batch from the first and last document of each block, so
that no [T, T] mask is ever computed. The sink is applied to the result through the log-sum-exp,
which FlexAttention differentiates: out * sigmoid(lse - sink) is the softmax with one more term.
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

BLOCK = 128  # tokens of a block of the mask
_PADDING = 2**30  # sorts padding, which comes last in a row, behind every document

# Fastest on an H200 of those tried: tiles of the forward, of the backward's two halves, warps.
TILES: FlexKernelOptions = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 32,
    "bwd_BLOCK_M1": 32,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 32,
    "num_warps": 4,
    "num_stages": 3,
    "FORCE_USE_FLEX_ATTENTION": True,  # short rows too: the decoding kernel has no gradient
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


def attend(
    queries: Float[Tensor, "batch seq heads dim"],
    keys: Float[Tensor, "batch seq kv_heads dim"],
    values: Float[Tensor, "batch seq kv_heads dim"],
    scope: BlockScope,
    *,
    sinks: Float[Tensor, " heads"] | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch seq heads dim"]:
    """What each query gathers; to be called inside a compiled region.

    Args:
        queries: After QK-norm and rotation.
        keys: The same.
        values: Unrotated.
        scope: Who sees whom.
        sinks: Logit of each head's sink, float32.
        slopes: Penalty in nats per token of distance, per head.

    References:
        Dong et al., "Flex Attention" (2024), arXiv:2412.05496; OpenAI, "gpt-oss model card"
        (2025), arXiv:2508.10925, for the sink; Press et al., "Train Short, Test Long" (ICLR 2022),
        arXiv:2108.12409, for the penalties.
    """

    def penalty(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del b
        assert slopes is not None
        return score - slopes[h] * (q - k)

    out, aux = flex_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        score_mod=None if slopes is None else penalty,
        block_mask=scope.mask,
        enable_gqa=True,
        kernel_options=TILES,
        return_aux=AuxRequest(lse=True),
    )
    out = out.transpose(1, 2)  # (B, T, N, H)
    if sinks is None:
        return out
    assert aux.lse is not None
    kept = torch.sigmoid(aux.lse - sinks[:, None]).transpose(1, 2)  # (B, T, N)
    return (out * kept[..., None]).to(out.dtype)
