"""What every loss receives and returns: rows of labels in, sums and counts per span out."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.errors import DataError
from vpmoe.spans import NUM_SPANS, Span

TOKENS = "tokens"
CONTENT_PREFIX = "content_"
CONTENT_TOKENS = CONTENT_PREFIX + TOKENS
SQUARED_SUFFIX = "_squared"

_WHOLE = ("head_weight", "teacher_head", "target_prior")  # of all rows, not one per row


@dataclass(frozen=True)
class LossInputs:
    """One row per label, batch and sequence flattened.

    Attributes:
        hidden: Final normed states, with grad when training.
        head_weight: Output embedding, one row per token of the model's vocabulary.
        labels: Rows of `head_weight`, i.e. already mapped where the model keeps a subset.
        span_ids: `Span` of each label.
        content_mask: True where the label is message text, not a header or an end token.
        teacher_logprobs: log p of the label under the teacher, nats, no grad.
        rollout_logprobs: log p of the label under the student that sampled it, nats, no grad.
        target_ids: Rows of `head_weight` that a teacher's distribution names; 0 in unused places.
        target_logprobs: Their log-probs (or log-weights of drawn ids); -inf in unused places.
        target_tail: Log of the teacher's mass elsewhere; -inf where nothing is left.
        teacher_hidden: Final normed states of the teacher, no grad.
        teacher_head: The teacher's output embedding, rows as in `head_weight`, no grad.
        target_cap: Log of the largest probability that an id outside `target_ids` may have under
            the teacher; only for the bound that is logged.
        target_prior: Log-probs, one per row of `head_weight`, by which ids outside `target_ids`
            share `target_tail`.
        row_weights: Factor of each label's loss; absent = 1.
        student_states: Of the layers that the loss asked for, with grad when training.
        teacher_states: Of the layers they are compared with, no grad.
    """

    hidden: Float[Tensor, "rows dim"]
    head_weight: Float[Tensor, "vocab dim"]
    labels: Int64[Tensor, " rows"]
    span_ids: UInt8[Tensor, " rows"]
    content_mask: Bool[Tensor, " rows"]
    teacher_logprobs: Float[Tensor, " rows"] | None = None
    rollout_logprobs: Float[Tensor, " rows"] | None = None
    target_ids: Int64[Tensor, "rows entries"] | None = None
    target_logprobs: Float[Tensor, "rows entries"] | None = None
    target_tail: Float[Tensor, " rows"] | None = None
    teacher_hidden: Float[Tensor, "rows teacher_dim"] | None = None
    teacher_head: Float[Tensor, "vocab teacher_dim"] | None = None
    target_cap: Float[Tensor, " rows"] | None = None
    target_prior: Float[Tensor, " vocab"] | None = None
    row_weights: Float[Tensor, " rows"] | None = None
    student_states: Float[Tensor, "rows layers dim"] | None = None
    teacher_states: Float[Tensor, "rows layers teacher_dim"] | None = None

    def select(self, rows: Tensor | slice) -> "LossInputs":
        """The chosen rows; grad flows back through `hidden`."""
        chosen = {
            field.name: getattr(self, field.name)[rows]
            for field in fields(self)
            if field.name not in _WHOLE and getattr(self, field.name) is not None
        }
        return replace(self, **chosen)

    def trained(self) -> "LossInputs":
        """The rows that a loss reads; ignored labels cost nothing from here on."""
        return self.select((self.span_ids != Span.IGNORE).nonzero().squeeze(1))

    def require(self, needs: frozenset[str]) -> None:
        """Refuse to go on without what a loss reads.

        Raises:
            DataError: Naming what is missing.
        """
        for need in sorted(needs):
            if getattr(self, need) is None:
                raise DataError(
                    f"the loss needs {need}, and the batch has none",
                    hint="give the batches scores of the teacher, or choose another loss",
                )

    def coefficients(self, span_scales: Float[Tensor, " span"]) -> Float[Tensor, " rows"]:
        """What each row's loss counts for: the scale of its span times its own weight."""
        scales = span_scales.to(self.hidden.device)[self.span_ids.long()]
        return scales if self.row_weights is None else scales * self.row_weights


@dataclass(frozen=True)
class LossOutput:
    """Sums over this rank's rows; nothing in here has been divided by a count.

    Attributes:
        total: `(span_scales * loss_sums).sum()`, the scalar to call `backward` on.
        loss_sums: Per span, detached, float64.
        token_counts: Labels per span; `Span.IGNORE` is never counted.
        metrics: Per-span sums by name, detached, float64.
    """

    total: Float[Tensor, ""]
    loss_sums: Float[Tensor, " span"]
    token_counts: Int64[Tensor, " span"]
    metrics: dict[str, Float[Tensor, " span"]]

    @property
    def sums(self) -> dict[str, Tensor]:
        """Everything to add up over micro-batches and ranks, by name: "loss", "tokens", metrics."""
        return {"loss": self.loss_sums, TOKENS: self.token_counts.double(), **self.metrics}


def output_of(
    total: Tensor, values: Tensor, metrics: Mapping[str, Tensor], rows: LossInputs
) -> LossOutput:
    """What a loss returns, from one number per row of each kind.

    Args:
        total: Sum of coefficient x value, with grad.
        values: Loss of each row before its weight.
        metrics: Further numbers of each row, by name.
        rows: The rows.

    References:
        own; "Sums and counts" in docs/losses.md.
    """
    span_ids = rows.span_ids
    weighted = values if rows.row_weights is None else values * rows.row_weights
    return LossOutput(
        total=total,
        loss_sums=sum_by_span(weighted, span_ids),
        token_counts=sum_by_span(torch.ones_like(values), span_ids).long(),
        metrics={name: sum_by_span(value, span_ids) for name, value in metrics.items()},
    )


@runtime_checkable
class Loss(Protocol):
    """A training objective over the rows of one micro-batch; see `StatelessLoss` for the parts.

    Losses with state (a running mean) change it in `after_step` only, from sums over the whole
    global batch, so that every rank holds the same state at any partition of the batch.
    """

    needs: frozenset[str]
    layers: tuple[int, ...]

    def prepare(self, batch: Batch) -> Batch:
        """A micro-batch with what is found out as late as now, such as a live teacher's states."""
        ...

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        ...

    def after_step(self, sums: Mapping[str, Tensor]) -> None:
        """Learn from one optimizer step's `LossOutput.sums`, added up over all ranks."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        ...

    def own_gradients(self) -> dict[str, Tensor]:
        """Gradients of the loss's own parameters from this rank's micro-batches; then forgotten.

        Their sums over all ranks come back in `after_step`, under the same names.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        ...


class StatelessLoss:
    """What a loss is that reads nothing but the batch and remembers nothing.

    Attributes:
        needs: Fields of `LossInputs` that must be there.
        layers: Numbers of the student's layers, from 1, whose states it reads.
    """

    needs: frozenset[str] = frozenset()
    layers: tuple[int, ...] = ()

    def prepare(self, batch: Batch) -> Batch:
        """The batch as it is."""
        return batch

    def own_gradients(self) -> dict[str, Tensor]:
        """None: there are no parameters."""
        return {}

    def after_step(self, sums: Mapping[str, Tensor]) -> None:
        """Nothing to learn: this loss has no state."""
        del sums

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        del state


class WrappedLoss:
    """Another loss with something done to its batches or rows; its state is the other's.

    Args:
        loss: The other one.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.needs, self.layers = loss.needs, loss.layers

    def prepare(self, batch: Batch) -> Batch:
        """The batch as the other loss wants it."""
        return self._loss.prepare(batch)

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        return self._loss(inputs, span_scales)

    def own_gradients(self) -> dict[str, Tensor]:
        """Of the loss's own parameters."""
        return self._loss.own_gradients()

    def after_step(self, sums: Mapping[str, Tensor]) -> None:
        """Let the loss learn from a whole step's sums."""
        self._loss.after_step(sums)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the loss."""
        return self._loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self._loss.load_state_dict(state)


def sum_by_span(
    values: Float[Tensor, " rows"] | Bool[Tensor, " rows"], span_ids: UInt8[Tensor, " rows"]
) -> Float[Tensor, " span"]:
    """Sum of the values of each span, indexed by `Span`, in float64.

    Float64 keeps a long sum independent of its order to far below float32's rounding, which is
    what makes logged numbers agree between partitions of a batch. No atomic additions.

    References:
        own; spans are described in docs/losses.md.
    """
    spans = torch.arange(NUM_SPANS, device=span_ids.device)
    members = span_ids == spans[:, None]  # (S, rows)
    return torch.where(members, values.double(), 0.0).sum(dim=1)


def span_scales(
    weights: Float[Tensor, " span"], token_counts: Float[Tensor, " span"] | Int64[Tensor, " span"]
) -> Float[Tensor, " span"]:
    """What one token's loss counts for: w_c / N_c, and 0 for ignored and for empty spans.

    This is the only division of a loss. N_c depends on labels alone, so it is known before the
    first forward; summed over all micro-batches and ranks it makes the gradient independent of
    how a global batch was cut up.

    Args:
        weights: Weight of each span in the objective.
        token_counts: Labels of each span in the whole global batch.

    References:
        own; "Sums and counts" in docs/losses.md.

    Example:
        >>> from torch import tensor
        >>> span_scales(tensor([0.0, 1.0, 2.0]), tensor([7, 4, 0])).tolist()
        [0.0, 0.25, 0.0]
    """
    counts = token_counts.double()
    scales = torch.where(counts > 0, weights.double() / counts.clamp_min(1), 0.0)
    scales[Span.IGNORE] = 0.0
    return scales


def span_means(sums: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " span"]]:
    """Mean per token of each global sum, by name and span; NaN where a span holds no token.

    Sums named `content_*` are divided by the number of content tokens, all others by the number
    of tokens. A sum of squares `x_squared` beside `x` gives the standard deviation `x_std`.

    Args:
        sums: `LossOutput.sums`, added up over micro-batches and ranks.

    References:
        own; "Sums and counts" in docs/losses.md.
    """
    means = {
        name: value / sums[CONTENT_TOKENS if name.startswith(CONTENT_PREFIX) else TOKENS]
        for name, value in sums.items()
        if name not in (TOKENS, CONTENT_TOKENS)
    }
    for squared in [name for name in means if name.endswith(SQUARED_SUFFIX)]:
        name = squared.removesuffix(SQUARED_SUFFIX)
        variance = means.pop(squared) - means[name].square()
        means[f"{name}_std"] = variance.clamp_min(0.0).sqrt()
    return means
