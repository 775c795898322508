"""Attention of a packed row without a gradient, for models that are not the student."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, FlexKernelOptions, flex_attention

from vpmoe.kernels.attention import BlockScope

# Fastest on an H200 of those tried, for heads of 64.
BLOCK = 64  # tokens of a block of the mask
TILES: FlexKernelOptions = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "num_warps": 4,
    "num_stages": 3,
    "FORCE_USE_FLEX_ATTENTION": True,
}  # pyright: ignore[reportAssignmentType]


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
