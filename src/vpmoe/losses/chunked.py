"""Linear head and loss in one pass over chunks of rows, so that [rows, vocab] never exists.

The coefficient of every row is known before the forward, hence the gradient of a chunk can be
taken while its logits are at hand: nothing is stored for the backward but the two gradients, and
nothing is computed twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import LossInputs

STUDENT_LOGPROBS = "student_logprobs"
_HEAD_ROWS = 16_384  # of the head that are widened together

LabelLossFunction = Callable[[Tensor, LossInputs], Tensor]
"""(student_logprobs with grad, rows) -> loss of each row, in plain differentiable PyTorch."""


@dataclass(frozen=True)
class RowResult:
    """What a row function makes of one chunk.

    Attributes:
        values: Loss of each row.
        extras: Further numbers of each row, by name; without grad.
        grad_logits: coefficient x d value / d logits, or None when no gradient was asked for.
        grad_along: What is to be added of a `Direction` to each row of `grad_logits`, if any.
    """

    values: Float[Tensor, " chunk"]
    extras: dict[str, Float[Tensor, " chunk"]]
    grad_logits: Float[Tensor, "chunk vocab"] | None
    grad_along: Float[Tensor, " chunk"] | None = None


@dataclass(frozen=True)
class Direction:
    """A vector over the vocabulary that is part of every row's gradient, kept out of the chunks.

    Along it the logits are one number a row, `hidden @ state`, and a gradient is one number a row
    too: the head's gradient gets an outer product, the states' a multiple of `state`.

    Attributes:
        weights: One per row of the head.
        state: weights @ head, in the type that losses are computed in.
    """

    weights: Float[Tensor, " vocab"]
    state: Float[Tensor, " dim"]

    @classmethod
    @torch.no_grad()
    def of(cls, weights: Float[Tensor, " vocab"], head: Float[Tensor, "vocab dim"]) -> "Direction":
        """The same with its state; a head in half precision is multiplied without rounding."""
        if head.dtype.itemsize >= 4:
            weights = weights.to(head.dtype)
            return cls(weights, weights @ head)
        weights = weights.float()
        parts = zip(weights.split(_HEAD_ROWS), head.split(_HEAD_ROWS), strict=True)
        return cls(weights, torch.stack([part @ rows.float() for part, rows in parts]).sum(0))

    def along(self, hidden: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
        """The logits' product with `weights`."""
        return hidden.to(self.state.dtype) @ self.state


@runtime_checkable
class RowFunction(Protocol):
    """Loss and gradient of a chunk of rows: all that a new objective on logits has to write."""

    def __call__(
        self,
        logits: Float[Tensor, "chunk vocab"],
        rows: slice,
        coefficients: Float[Tensor, " chunk"] | None,
    ) -> RowResult:
        """The chunk's result; `coefficients` None = no grad.

        `logits` come in the dtype of the head's product and are the function's to overwrite.
        """
        ...


def _is_sum_of(total: Tensor | None, grad: Tensor) -> bool:
    """Whether a GPU's `main_grad` takes the gradient as it is, without rounding."""
    return total is not None and total.is_cuda and total.dtype == grad.dtype


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known already; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        hidden: Tensor,
        head_weight: Tensor,
        hidden_grad: Tensor | None,
        head_grad: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.head_dtype = head_weight.dtype
        ctx.head_total = getattr(head_weight, "main_grad", None)
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # the decorator loses the parameters' names
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grad_outputs[0]
        if hidden_grad is not None:
            hidden_grad = hidden_grad * scale.to(hidden_grad.dtype)
        if head_grad is not None and _is_sum_of(ctx.head_total, head_grad):
            ctx.head_total.addcmul_(head_grad, scale.to(head_grad.dtype))
            head_grad = None
        elif head_grad is not None:
            rounded = torch.empty_like(head_grad, dtype=ctx.head_dtype)
            head_grad = torch.mul(head_grad, scale.to(head_grad.dtype), out=rounded)
        return None, hidden_grad, head_grad, None, None


@dataclass(frozen=True)
class ChunkedResult:
    """Losses of all rows, and their weighted sum with grad.

    Attributes:
        total: Sum of coefficient x value, with grad to `hidden` and `head_weight`.
        values: Loss of each row, detached.
        extras: Further numbers of each row, by name, detached.
    """

    total: Float[Tensor, ""]
    values: Float[Tensor, " rows"]
    extras: dict[str, Float[Tensor, " rows"]]


def chunked_loss(
    hidden: Float[Tensor, "rows dim"],
    head_weight: Float[Tensor, "vocab dim"],
    coefficients: Float[Tensor, " rows"],
    row_function: RowFunction,
    *,
    chunk_rows: int = CHUNK_ROWS,
    direction: Direction | None = None,
) -> ChunkedResult:
    """Sum of coefficient x row loss over a linear head, with gradients taken in the forward.

    Logits are a GEMM in the inputs' dtype; softmax, loss, dlogits and the head's summed gradient
    are float32 (float64 for float64 inputs). An input that needs no grad costs no GEMM.

    Args:
        hidden: Final normed states.
        head_weight: Output embedding.
        coefficients: Factor of each row in the total, e.g. w_c / N_c of its span; no grad.
        row_function: Loss and gradient of a chunk given its logits.
        chunk_rows: Rows whose logits are held together; any value gives the same result.
        direction: What `RowResult.grad_along` counts in.

    References:
        Hsu et al., "Liger Kernel" (2024), arXiv:2410.10989. Difference: coefficients per row, any
        row loss, chunk size chosen by the caller.
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (ICLR 2025),
        arXiv:2411.09009. Difference: chunks over rows in plain PyTorch.
    """
    grad_of_hidden = torch.is_grad_enabled() and hidden.requires_grad
    grad_of_head = torch.is_grad_enabled() and head_weight.requires_grad
    with_grad = grad_of_hidden or grad_of_head
    with torch.no_grad():
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weights = coefficients.to(wide)
        hidden_grad = torch.empty_like(hidden) if grad_of_hidden else None
        head_grad = torch.zeros_like(head_weight, dtype=wide) if grad_of_head else None
        results = []
        # One chunk even of no rows, so that the extras' names are always there.
        for begin in range(0, max(hidden.shape[0], 1), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            logits = hidden[rows] @ head_weight.T  # (chunk, V)
            result = row_function(logits, rows, weights[rows] if with_grad else None)
            results.append((result.values, result.extras))
            if result.grad_logits is None:
                continue
            grad_logits = result.grad_logits.to(hidden.dtype)
            along = result.grad_along
            if hidden_grad is not None:
                hidden_grad[rows] = _states_grad(grad_logits, head_weight, direction, along)
            if head_grad is not None:
                _add_head_grad(head_grad, grad_logits, hidden[rows], direction, along)
            del logits, result, grad_logits  # or the next chunk's would need memory beside them
        values = torch.cat([values for values, _ in results])
        extras = {
            name: torch.cat([extras[name] for _, extras in results]) for name in results[0][1]
        }
        total = (weights.double() * values.double()).sum()
    if with_grad:
        total = _WithGradients.apply(total, hidden, head_weight, hidden_grad, head_grad)
    return ChunkedResult(total, values, extras)


def _states_grad(
    grad_logits: Float[Tensor, "chunk vocab"],
    head: Float[Tensor, "vocab dim"],
    direction: Direction | None,
    along: Float[Tensor, " chunk"] | None,
) -> Float[Tensor, "chunk dim"]:
    """A chunk's gradient by the states.

    The two parts beside a direction nearly cancel where rows of the head have much in common, so
    that only their sum is rounded.
    """
    if direction is None or along is None:
        return grad_logits @ head
    wide = direction.state.dtype
    if grad_logits.dtype == wide:
        product = grad_logits @ head
    elif grad_logits.is_cuda:
        product = torch.mm(grad_logits, head, out_dtype=wide)
    else:
        product = grad_logits.to(wide) @ head.to(wide)
    return product.addr_(along, direction.state)


def _add_head_grad(
    total: Float[Tensor, "vocab dim"],
    grad_logits: Float[Tensor, "chunk vocab"],
    states: Float[Tensor, "chunk dim"],
    direction: Direction | None,
    along: Float[Tensor, " chunk"] | None,
) -> None:
    """Add a chunk's gradient by the head."""
    _add_product(total, grad_logits.T, states)
    if direction is not None and along is not None:
        total.addr_(direction.weights, along @ states.to(along.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total that may be wider than they are."""
    if total.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def label_row_function(inputs: LossInputs, loss_function: LabelLossFunction) -> RowFunction:
    """Row function of a loss that knows the student by the label's log-probability alone.

    The loss is written in plain PyTorch on a vector of log-probabilities; its slope
    s = d value / d log p_y comes from autograd on that vector, and the chain rule through the
    softmax is closed: d log p_y / dz = e_y - p. Cross-entropy is s = -1; a weighted one s = -w;
    sampled reverse KL s = -A.

    Args:
        inputs: The rows that the chunks are taken from.
        loss_function: Loss of each row, from its log-probability and the rest of the row.

    References:
        own; "Chunks" in docs/losses.md.
    """

    def function(logits: Tensor, rows: slice, coefficients: Tensor | None) -> RowResult:
        if logits.is_cuda and logits.dtype == torch.bfloat16:
            return _label_rows_on_gpu(logits, inputs.select(rows), loss_function, coefficients)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = inputs.labels[rows, None]
        chosen = logits.gather(1, labels).squeeze(1)
        peak = logits.amax(dim=1, keepdim=True)
        masses = logits.sub_(peak).exp_()  # (chunk, V), in place of the logits
        norm = masses.sum(dim=1)
        logprobs = chosen - peak.squeeze(1) - norm.log()
        chunk = inputs.select(rows)
        if coefficients is None:
            values = loss_function(logprobs, chunk)
            return RowResult(values, {STUDENT_LOGPROBS: logprobs}, None)
        values, slopes = _values_and_slopes(logprobs, chunk, loss_function)
        slopes = slopes * coefficients
        grad_logits = masses.mul_((-slopes / norm)[:, None])
        grad_logits.scatter_add_(1, labels, slopes[:, None])
        return RowResult(values, {STUDENT_LOGPROBS: logprobs}, grad_logits)

    return function


def _values_and_slopes(
    logprobs: Tensor, chunk: LossInputs, loss_function: LabelLossFunction
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and its derivative by the label's log-probability."""
    with torch.enable_grad():
        leaf = logprobs.clone().requires_grad_()
        values = loss_function(leaf, chunk)
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes


def _label_rows_on_gpu(
    logits: Tensor,
    chunk: LossInputs,
    loss_function: LabelLossFunction,
    coefficients: Tensor | None,
) -> RowResult:
    """The row function in two kernels that never widen the chunk's logits."""
    # Triton, which comes with CUDA builds of PyTorch only, is imported from here on.
    from vpmoe.kernels.logits import label_gradient_, label_logprobs

    logprobs, lse = label_logprobs(logits, chunk.labels)
    if coefficients is None:
        values = loss_function(logprobs, chunk)
        return RowResult(values, {STUDENT_LOGPROBS: logprobs}, None)
    values, slopes = _values_and_slopes(logprobs, chunk, loss_function)
    grad_logits = label_gradient_(logits, chunk.labels, lse, slopes * coefficients)
    return RowResult(values, {STUDENT_LOGPROBS: logprobs}, grad_logits)


def chunked_loss_reference(
    hidden: Float[Tensor, "rows dim"],
    head_weight: Float[Tensor, "vocab dim"],
    labels: Int64[Tensor, " rows"],
    coefficients: Float[Tensor, " rows"],
    loss_function: Callable[[Tensor], Tensor],
) -> Float[Tensor, ""]:
    """The same total by dense logits and plain autograd, for tests.

    References:
        own; the definition that `chunked_loss` must equal.
    """
    logprobs = (hidden @ head_weight.T).log_softmax(dim=1)
    return (coefficients * loss_function(logprobs.gather(1, labels[:, None]).squeeze(1))).sum()


def label_metrics(
    student_logprobs: Float[Tensor, " rows"], rows: LossInputs
) -> dict[str, Float[Tensor, " rows"]]:
    """What is logged with every loss: likelihoods of the labels, over all and over content tokens.

    References:
        own; "Sums and counts" in docs/losses.md.
    """
    content = rows.content_mask.to(student_logprobs.dtype)
    metrics = {
        "nll": -student_logprobs,
        "content_nll": -student_logprobs * content,
        "content_tokens": content,
    }
    if rows.teacher_logprobs is not None:
        metrics["teacher_logprob"] = rows.teacher_logprobs
        metrics["teacher_logprob_squared"] = rows.teacher_logprobs.double().square()
    return metrics
