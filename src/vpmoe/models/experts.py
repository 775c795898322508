"""A layer's routed experts as stacked matrices, and the reference that applies them.

`moe_reference` is what a fused kernel has to equal, in values and in gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vpmoe.models.mlp import GATED, Activation, activate


@dataclass(frozen=True)
class ExpertWeights:
    """The stacked parameters of a layer's routed experts; gates are None where there are none."""

    up: Float[Tensor, "experts width dim"]
    down: Float[Tensor, "experts dim width"]
    up_bias: Float[Tensor, "experts width"] | None
    down_bias: Float[Tensor, "experts dim"] | None
    gate: Float[Tensor, "experts width dim"] | None
    gate_bias: Float[Tensor, "experts width"] | None


# BLAS adds in another order when rows are few (fewer than a dozen on two threads): filled up to
# this, a token's bits do not depend on how many others chose its expert.
MIN_ROWS = 32


def _times(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write rows @ matrix + bias into `out`."""
    count = rows.shape[0]
    if count < MIN_ROWS:
        filled = F.pad(rows, (0, 0, 0, MIN_ROWS - count))
        product = filled @ matrix if bias is None else torch.addmm(bias, filled, matrix)
        out.copy_(product[:count])
    elif bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)


class _GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert, each times its own expert's matrix: one product per used expert."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        ctx.has_bias = bias is not None
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        # Views of all experts at once cost Python less than slices one by one.
        parts = zip(rows.split(counts), weight.mT.unbind(), out.split(counts), strict=True)
        biases = [None] * len(counts) if bias is None else bias.unbind()
        for (x, matrix, product), own_bias in zip(parts, biases, strict=True):
            if len(x):
                _times(x, matrix, own_bias, product)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        grad_bias = weight.new_zeros(weight.shape[:2]) if ctx.has_bias else None
        given = zip(grad.split(ctx.counts), rows.split(ctx.counts), weight.unbind(), strict=True)
        wanted = zip(grad_rows.split(ctx.counts), grad_weight.unbind(), strict=True)
        for (g, x, matrix), (grad_x, grad_matrix) in zip(given, wanted, strict=True):
            if len(x):
                _times(g, matrix, None, grad_x)
                torch.mm(g.T, x, out=grad_matrix)
        if grad_bias is not None:
            for g, own_bias in zip(grad.split(ctx.counts), grad_bias.unbind(), strict=True):
                if len(g):
                    torch.sum(g, dim=0, out=own_bias)
        return grad_rows, grad_weight, grad_bias, None


class _Dispatch(torch.autograd.Function):
    """Each token once per expert it uses, in the experts' order; gathers both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, chosen: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.chosen = chosen
        return rows[order.div(chosen, rounding_mode="floor")]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.chosen)).sum(dim=1), None, None, None


class _Reorder(torch.autograd.Function):
    """Rows in the tokens' order again; gathers both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[inverse]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][order], None, None


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(rows sorted by expert, stacked matrices, stacked biases) -> each row times its expert's."""


def moe_reference(
    hidden: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows chosen"],
    expert_weights: Float[Tensor, "rows chosen"],
    experts: ExpertWeights,
    *,
    activation: Activation,
    residual: Float[Tensor, "rows dim"] | None = None,
) -> Float[Tensor, "rows dim"]:
    """Sum of each token's chosen experts, each output (its bias too) times its weight.

    Tokens are sorted by expert, every expert works on its own slice, and the results are gathered
    back: no token is dropped, no capacity, and no scattered addition, so a CPU repeats itself bit
    for bit. A residual is what the sum is added to.

    References:
        Shazeer et al., "Outrageously Large Neural Networks" (2017), arXiv:1701.06538; Gale et al.,
        "MegaBlocks" (2022), arXiv:2211.15841. Difference: one plain product per expert.
    """
    counts = torch.bincount(expert_ids.flatten(), minlength=experts.up.shape[0]).tolist()

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _GroupedLinear.apply(rows, weight, bias, counts)

    out = through_experts(hidden, expert_ids, expert_weights, experts, linear, activation)
    return out if residual is None else residual + out


def through_experts(
    hidden: Float[Tensor, "rows dim"],
    expert_ids: Int[Tensor, "rows chosen"],
    expert_weights: Float[Tensor, "rows chosen"],
    experts: ExpertWeights,
    linear: Linear,
    activation: Activation,
) -> Float[Tensor, "rows dim"]:
    """The same by any product of rows that are sorted by expert, equal experts in token order.

    References:
        As `moe_reference`.
    """
    chosen = expert_ids.shape[1]
    order = expert_ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    rows = _Dispatch.apply(hidden, order, inverse, chosen)
    up = linear(rows, experts.up, experts.up_bias)
    gate = None if experts.gate is None else linear(rows, experts.gate, experts.gate_bias)
    units = activate(up, gate, activation=activation)
    outputs = linear(units, experts.down, experts.down_bias)
    outputs = _Reorder.apply(outputs, order, inverse).unflatten(0, (-1, chosen))  # (rows, A, D)
    weights = expert_weights.to(outputs.dtype)[:, None]
    return (weights @ outputs).squeeze(1)


class Experts(nn.Module):
    """Stacks of a layer's routed experts, one matrix per expert and projection."""

    def __init__(
        self,
        num_experts: int,
        *,
        hidden_size: int,
        width: int,
        activation: Activation,
        bias: bool,
    ) -> None:
        super().__init__()
        wide, narrow = (num_experts, width), (num_experts, hidden_size)
        self.up_weight = nn.Parameter(torch.empty(*wide, hidden_size))
        self.down_weight = nn.Parameter(torch.empty(*narrow, width))
        self.gate_weight = self.gate_bias = self.up_bias = self.down_bias = None
        if activation in GATED:
            self.gate_weight = nn.Parameter(torch.empty(*wide, hidden_size))
        if bias:
            self.up_bias = nn.Parameter(torch.zeros(wide))
            self.down_bias = nn.Parameter(torch.zeros(narrow))
        if bias and activation in GATED:
            self.gate_bias = nn.Parameter(torch.zeros(wide))

    @property
    def weights(self) -> ExpertWeights:
        """The parameters as one argument."""
        return ExpertWeights(
            up=self.up_weight,
            down=self.down_weight,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            gate=self.gate_weight,
            gate_bias=self.gate_bias,
        )
