"""Causal attention with a softmax sink, a window, packed documents and distance penalties.

`attend_reference` is what a fused kernel has to equal, in values and in gradients.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vpmoe.models.norm import widened


@dataclass(frozen=True)
class AttentionScope:
    """Which keys a query sees: its own document's, at or before it, inside the window.

    Places are counted in one sequence (a packed row, or a cached conversation); documents say which
    of them belong together. The masks are made once and shared by all layers of a kind.

    Attributes:
        query_places: Place of each query; one row serves the whole batch if there is one.
        key_places: Place of each key; negative for a slot that holds none. None where keys and
            queries are the same tokens, in the order of a packed row.
        documents: Document of each token of a packed row; None for a cached conversation.
        window_size: Keys a query sees, itself included; None for all.
    """

    query_places: Int[Tensor, "rows seq"]
    key_places: Int[Tensor, "batch keys"] | None
    documents: Int[Tensor, "batch seq"] | None
    window_size: int | None

    @cached_property
    def distances(self) -> Int[Tensor, "#batch seq keys"]:
        """How far back each key lies."""
        keys = self.query_places if self.key_places is None else self.key_places
        return self.query_places[:, :, None] - keys[:, None, :]

    @cached_property
    def mask(self) -> Float[Tensor, "#batch seq keys"]:
        """0 where a query sees a key, -inf elsewhere, float32."""
        keep = self.distances >= 0
        if self.window_size is not None:
            keep = keep & (self.distances < self.window_size)
        if self.key_places is not None:
            keep = keep & (self.key_places >= 0)[:, None, :]
        if self.documents is not None:
            keep = keep & (self.documents[:, :, None] == self.documents[:, None, :])
        return _additive(keep)

    @property
    def block_size(self) -> int | None:
        """Queries per block where blocks save work: rows of more than two windows."""
        if self.key_places is not None or self.window_size is None:
            return None
        return self.window_size if self.query_places.shape[1] > 2 * self.window_size else None

    @cached_property
    def block_distances(self) -> Int[Tensor, "block keys"]:
        """Distances of a block's queries to the keys of the block before it and of its own."""
        size = self.window_size or 0
        place = torch.arange(2 * size, device=self.query_places.device)
        return place[size:, None] - place[None, :]

    @cached_property
    def block_mask(self) -> Float[Tensor, "batch blocks block keys"]:
        """The mask of `blocked` queries, 0 or -inf."""
        size = self.window_size or 0
        assert self.documents is not None
        own, around = _blocks(self.documents[..., None], size, outside=_NO_DOCUMENT)
        same = own == around.transpose(-1, -2)  # (B, blocks, block, keys)
        return _additive(same & (self.block_distances >= 0) & (self.block_distances < size))


_NO_DOCUMENT = -2.0  # what fills up the last block; differs from every document and from padding


def _additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape, device=keep.device).masked_fill_(~keep, -torch.inf)


def _blocks(rows: Tensor, size: int, *, outside: float = 0.0) -> tuple[Tensor, Tensor]:
    """(…, T, H) as blocks of `size`, and as each block with the one before it in front."""
    short = -rows.shape[-2] % size
    padded = F.pad(rows, (0, 0, size, short), value=outside)
    blocks = padded.unflatten(-2, (-1, size))  # (…, 1 + blocks, size, H)
    own, before = blocks[..., 1:, :, :], blocks[..., :-1, :, :]
    return own, torch.cat((before, own), dim=-2)


class _SinkSoftmax(torch.autograd.Function):
    """Softmax whose denominator has one more term, exp(sink); saves one tensor, not five."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sinks: Tensor) -> Tensor:
        top = torch.maximum(scores.amax(dim=-1, keepdim=True), sinks)
        top = top.clamp_min(torch.finfo(scores.dtype).min)  # a query that sees nothing gives 0
        weights = (scores - top).exp_()
        sink_weight = (sinks - top).exp_()
        total = weights.sum(dim=-1, keepdim=True).add_(sink_weight)
        total.clamp_min_(torch.finfo(scores.dtype).tiny)
        weights.div_(total)
        ctx.save_for_backward(weights, sink_weight.div_(total))
        ctx.sinks_shape = sinks.shape
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, sink_weight = ctx.saved_tensors
        (grad,) = grads
        mean = (grad * weights).sum(dim=-1, keepdim=True)
        grad_sinks = None
        if ctx.needs_input_grad[1]:
            grad_sinks = (sink_weight * mean).neg_().sum_to_size(ctx.sinks_shape)
        return (grad - mean).mul_(weights), grad_sinks


def sink_softmax(
    scores: Float[Tensor, "*batch keys"], sinks: Float[Tensor, "*#batch 1"] | None
) -> Float[Tensor, "*batch keys"]:
    """Attention weights that sum to one minus the sink's share.

    p_j = exp(a_j) / (exp(s) + sum_k exp(a_k)): the sink competes and carries no value. A query that
    sees nothing (all scores -inf) gets zero weights.

    Args:
        scores: Scaled, biased and masked logits, float32 or wider.
        sinks: The sink's logit, broadcast over the scores; None for the plain softmax.

    References:
        OpenAI, "gpt-oss model card" (2025), arXiv:2508.10925; Xiao et al., "Efficient Streaming
        Language Models with Attention Sinks" (ICLR 2024), arXiv:2309.17453.
    """
    if sinks is None:
        sinks = scores.new_full((1,) * scores.ndim, -torch.inf)
    return _SinkSoftmax.apply(scores, sinks)  # pyright: ignore[reportReturnType]


def attend_reference(
    queries: Float[Tensor, "batch seq heads dim"],
    keys: Float[Tensor, "batch keys kv_heads dim"],
    values: Float[Tensor, "batch keys kv_heads value_dim"],
    scope: AttentionScope,
    *,
    sinks: Float[Tensor, " heads"] | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch seq heads value_dim"]:
    """What each query gathers from the values it sees.

    Logits are float32 or wider: q.k / sqrt(dim) - slope * distance, masked, then the softmax with
    sink. Query head i reads key head i // (heads / kv_heads). Rows longer than two windows go block
    by block, each block of queries against its own and the previous block of keys.

    Args:
        queries: After QK-norm and rotation.
        keys: The same; as many as `scope` has places.
        values: Unrotated, after the value residual.
        scope: Who sees whom.
        sinks: Logit of each head's sink.
        slopes: Penalty in nats per token of distance, per head.

    References:
        Vaswani et al., "Attention Is All You Need" (2017), arXiv:1706.03762; Ainslie et al., "GQA"
        (2023), arXiv:2305.13245; Beltagy et al., "Longformer" (2020), arXiv:2004.05150.
    """
    num_heads, dim = queries.shape[2:]
    groups = num_heads // keys.shape[2]
    wide_queries = widened(queries).mul(dim**-0.5).transpose(1, 2)  # (B, N, T, H)
    wide_keys, values = widened(keys).transpose(1, 2), values.transpose(1, 2)  # (B, K, S, H)
    size = scope.block_size
    if size is None:
        queries_of = wide_queries.unflatten(1, (-1, groups))  # (B, K, G, T, H)
        mask, distances = scope.mask[:, None, None], scope.distances[:, None, None]
    else:
        own, _ = _blocks(wide_queries, size)  # (B, N, blocks, W, H)
        queries_of = own.unflatten(1, (-1, groups)).transpose(2, 3)  # (B, K, blocks, G, W, H)
        wide_keys, values = _blocks(wide_keys, size)[1], _blocks(values, size)[1]
        mask, distances = scope.block_mask[:, None, :, None], scope.block_distances
    # One matrix product per key head serves all its query heads.
    scores = queries_of.flatten(-3, -2) @ wide_keys.transpose(-1, -2)
    scores = scores.unflatten(-2, queries_of.shape[-3:-1])
    scores.add_(mask)
    heads_shape = (1, -1) + (1,) * (scores.ndim - 5) + (groups, 1, 1)
    if slopes is not None:
        scores.sub_(slopes.view(heads_shape) * distances)
    weights = sink_softmax(scores, None if sinks is None else sinks.view(heads_shape))
    gathered = weights.to(values.dtype).flatten(-3, -2) @ values
    gathered = gathered.unflatten(-2, queries_of.shape[-3:-1])  # (B, K, …, G, T or W, H)
    if size is not None:
        gathered = gathered.transpose(2, 3).flatten(3, 4)[:, :, :, : queries.shape[1]]
    return gathered.flatten(1, 2).transpose(1, 2)  # (B, T, N, H)
