"""Rows of an embedding on one GPU: the gradient goes to the rows that were read and no others."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 16  # gradients of a token that are added up together


@triton.jit
def _row_sums_kernel(
    grad, tokens, order, out, num_rows,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per place in the sorted tokens; the first of each token adds all of them."""
    first = tl.program_id(0)
    token = tl.load(tokens + first)
    before = tl.load(tokens + first - 1, first > 0, other=-1)
    if before == token:
        return
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    total = tl.zeros((BLOCK,), tl.float32)
    place = first
    more = 1
    while more > 0:
        at = place + tl.arange(0, ROWS)
        same = tl.load(tokens + at, at < num_rows, other=-1) == token
        row = tl.load(order + at, same, other=0)
        part = tl.load(
            grad + row[:, None] * D + d[None, :], same[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(part.to(tl.float32), 0)
        place += ROWS
        more = (tl.sum(same.to(tl.int32), 0) == ROWS).to(tl.int32)
    here = out + token * D + d
    total += tl.load(here, inside, other=0.0).to(tl.float32)
    tl.store(here, total.to(out.dtype.element_ty), inside)


def add_rows_(
    total: Float[Tensor, "vocab dim"],
    tokens: Int[Tensor, " rows"],
    grads: Float[Tensor, "rows dim"],
) -> None:
    """Add each token's gradients to its row of the total, in the order of the tokens.

    References:
        own; `torch.nn.functional.embedding`'s backward is the reference.
    """
    ordered, order = torch.sort(tokens.long(), stable=True)
    dim = grads.shape[1]
    block = min(triton.next_power_of_2(dim), 1024)
    if tokens.numel():
        _row_sums_kernel[(tokens.numel(), triton.cdiv(dim, block))](
            grads, ordered, order, total, tokens.numel(), D=dim, ROWS=ROWS, BLOCK=block
        )


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, weight):
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return weight.detach()[tokens]

    @staticmethod
    def backward(ctx: Any, grad):
        (tokens,) = ctx.saved_tensors
        weight = ctx.weight
        rows = grad.reshape(-1, weight.shape[1]).contiguous()
        total = getattr(weight, "main_grad", None)
        if total is not None:
            add_rows_(total, tokens.flatten(), rows)
            return None, None
        total = torch.zeros_like(weight)
        add_rows_(total, tokens.flatten(), rows)
        return None, total


def embed(
    tokens: Int[Tensor, "*batch"], weight: Float[Tensor, "vocab dim"]
) -> Float[Tensor, "*batch dim"]:
    """Rows of the weight; its gradient is summed in float32.

    Where the weight has a `main_grad`, as parameters under Megatron-Core's wrapper have, the
    gradient is added to it in the backward pass and autograd gets none.

    References:
        own; `torch.nn.functional.embedding` is the reference.
    """
    return _Embed.apply(tokens, weight)  # pyright: ignore[reportReturnType]
