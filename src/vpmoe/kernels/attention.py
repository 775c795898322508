"""Attention over packed rows on one GPU: windows, documents, penalties, sink; no [T, T] anywhere.

What a query sees is one range of keys that ends with itself, and who sees a key is one range of
queries that begins with itself. Two numbers per token say it all; they are made once per batch. The
operators are opaque to the compiler, which calls them from inside a compiled region.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class PackedScope:
    """Which keys a query of a packed row sees.

    Attributes:
        first: First key that each query sees; the last is its own.
        last: Last query that sees each key; the first is its own.
    """

    first: Int[Tensor, "batch seq"]
    last: Int[Tensor, "batch seq"]


def packed_scope(documents: Int[Tensor, "batch seq"], *, window_size: int | None) -> PackedScope:
    """Ranges of keys that queries see: causal, inside the document and the window.

    Args:
        documents: Document of each token; equal ones stand together, padding is a document, too.
        window_size: Keys a query sees, itself included; None for all.

    References:
        own.
    """
    seq = documents.shape[1]
    place = torch.arange(seq, device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    ends = starts.roll(-1, dims=1)
    first = torch.where(starts, place, 0).cummax(dim=1).values
    last = torch.where(ends, place, seq).flip(1).cummin(dim=1).values.flip(1)
    if window_size is not None:
        first = torch.maximum(first, place - (window_size - 1))
        last = torch.minimum(last, place + (window_size - 1))
    return PackedScope(first.int(), last.int())


@torch.library.custom_op("vpmoe::attend", mutates_args=(), device_types="cuda")
def attend_op(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    last: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What queries gather, and the log-sum-exp of each, base 2, the sink among its terms."""
    from vpmoe.kernels import flash

    del last
    return flash.forward(queries, keys, values, first, sinks, slopes)


@attend_op.register_fake
def _(queries, keys, values, first, last, sinks, slopes) -> tuple[Tensor, Tensor]:
    del keys, values, first, last, sinks, slopes
    batch, seq, heads, _ = queries.shape
    lse = queries.new_empty(batch, heads, seq, dtype=torch.float32)
    return queries.new_empty(queries.shape), lse


@torch.library.custom_op("vpmoe::attend_backward", mutates_args=(), device_types="cuda")
def attend_backward_op(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    last: Tensor,
    sinks: Tensor | None,
    slopes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and sinks (empty without them)."""
    from vpmoe.kernels import flash

    d_out = d_out.contiguous()
    dq, delta, d_sinks = flash.backward_queries(
        queries, keys, values, first, sinks, slopes, out, lse, d_out
    )
    dk, dv = flash.backward_keys(queries, keys, values, first, last, slopes, lse, delta, d_out)
    return dq, dk, dv, d_sinks


@attend_backward_op.register_fake
def _(queries, keys, values, first, last, sinks, *rest: Any) -> tuple[Tensor, ...]:
    del first, last, rest
    heads = 0 if sinks is None else sinks.shape[0]
    d_sinks = queries.new_empty(heads, dtype=torch.float32)
    same = [tensor.new_empty(tensor.shape) for tensor in (queries, keys, values)]
    return *same, d_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: None) -> tuple[Tensor | None, ...]:
    del d_lse
    *tensors, out, lse = ctx.saved_tensors
    dq, dk, dv, d_sinks = attend_backward_op(*tensors, out, lse, d_out)
    return dq, dk, dv, None, None, None if tensors[5] is None else d_sinks, None


attend_op.register_autograd(_differentiate, setup_context=_keep)


def attend(
    queries: Float[Tensor, "batch seq heads dim"],
    keys: Float[Tensor, "batch seq kv_heads dim"],
    values: Float[Tensor, "batch seq kv_heads dim"],
    scope: PackedScope,
    *,
    sinks: Float[Tensor, " heads"] | None = None,
    slopes: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch seq heads dim"]:
    """What each query gathers; may be called inside a compiled region.

    Args:
        queries: After QK-norm and rotation, bf16.
        keys: The same.
        values: Unrotated.
        scope: Who sees whom.
        sinks: Logit of each head's sink, float32, with grad.
        slopes: Penalty in nats per token of distance, per head; no grad.

    References:
        Dao et al., "FlashAttention" (2022), arXiv:2205.14135; OpenAI, "gpt-oss model card" (2025),
        arXiv:2508.10925, for the sink; Press et al., "Train Short, Test Long" (ICLR 2022),
        arXiv:2108.12409, for the penalties. Difference: the sink starts the running softmax, and
        ranges of keys take the place of masks.
    """
    out, _ = attend_op(queries, keys, values, scope.first, scope.last, sinks, slopes)
    return out
