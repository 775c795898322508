"""Losses against a teacher's stored distribution: K entries per label, and a tail for the rest.

One pass reads the student's log-probs of the entries, of the label and of everything else
together; the loss is plain PyTorch on these few numbers, and the way back to the logits is closed.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vpmoe.head import CHUNK_ROWS
from vpmoe.losses.base import LossInputs
from vpmoe.losses.chunked import STUDENT_LOGPROBS, Direction, RowFunction, RowResult
from vpmoe.losses.divergences import forward_kl
from vpmoe.losses.rows import RowLoss
from vpmoe.losses.tails import stored_tail, unseen_kl_bound

TARGET_NEEDS = frozenset({"target_ids", "target_logprobs"})
_LEAST = -1e30  # in place of the log-sum-exp of nothing, which is -inf


@dataclass(frozen=True)
class StudentScores:
    """The student's log-probs as a loss on stored targets reads them, with grad.

    Attributes:
        label: Of the label, at temperature 1.
        entries: Of each entry, at the loss's temperature; -inf in unused places.
        tail: Of all ids without an entry together, at the loss's temperature.
        along: Sum over the vocabulary of a direction's weights times the log-probs, at the loss's
            temperature; None without a direction. The weights add up to one.
    """

    label: Float[Tensor, " rows"]
    entries: Float[Tensor, "rows entries"]
    tail: Float[Tensor, " rows"]
    along: Float[Tensor, " rows"] | None = None


TargetLossFunction = Callable[[StudentScores, LossInputs], Tensor]
"""(student's scores with grad, rows) -> loss of each row, in plain differentiable PyTorch."""


@dataclass(frozen=True)
class Reading:
    """What one pass over a chunk's logits finds; the logits of the entries are -inf afterwards.

    Attributes:
        label: Logit of the label.
        entries: Logits of the entries; -inf in unused places.
        rest: Log-sum-exp of all other logits.
        cool_rest: Log-sum-exp of all other logits over the temperature; `rest` at temperature 1.
        least: Smallest of all other logits.
    """

    label: Float[Tensor, " rows"]
    entries: Float[Tensor, "rows entries"]
    rest: Float[Tensor, " rows"]
    cool_rest: Float[Tensor, " rows"]
    least: Float[Tensor, " rows"]


@dataclass(frozen=True)
class Writing:
    """What the gradient by a chunk's logits is made of.

    Off the entries it is tail * exp(logit / temperature - cool_rest) + full * exp(logit - norm).

    Attributes:
        entries: Gradient at each entry, but for what the label adds.
        label: To be added at the label.
        tail: Factor of the distribution among ids without an entry.
        cool_rest: Its norm.
        full: Factor of the whole distribution at temperature 1.
        norm: Its norm.
    """

    entries: Float[Tensor, "rows entries"]
    label: Float[Tensor, " rows"]
    tail: Float[Tensor, " rows"]
    cool_rest: Float[Tensor, " rows"]
    full: Float[Tensor, " rows"]
    norm: Float[Tensor, " rows"]


def target_row_function(
    inputs: LossInputs,
    loss_function: TargetLossFunction,
    *,
    temperature: float = 1.0,
    direction: Direction | None = None,
) -> RowFunction:
    r"""Row function of a loss that sees the student's entries, tail and label.

    With slopes :math:`g_i` of the entries and :math:`g_T` of the tail, G their sum, T the
    temperature and :math:`\tilde p` the distribution among ids without entry, the gradient is
    :math:`(g_i - p_i G) / T` at an entry and :math:`\tilde p_j (g_T - r_S G) / T` elsewhere:
    nothing is divided by a small tail, and none is found by subtraction from 1. The slope along a
    direction is part of G, and that many times 1 / T of the direction comes on top.

    Args:
        inputs: The rows that the chunks are taken from; each id at most once per row.
        loss_function: Loss of each row.
        temperature: Divides the logits before the entries' and the tail's log-probs are taken.
        direction: What `StudentScores.along` is measured by.

    References:
        own; "Stored targets" in docs/losses.md.
    """
    power = 1 / temperature

    def function(logits: Tensor, rows: slice, coefficients: Tensor | None) -> RowResult:
        chunk = inputs.select(rows)
        places = _places(chunk)
        on_gpu = logits.is_cuda and logits.dtype == torch.bfloat16
        if not on_gpu:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        read = _read_on_gpu if on_gpu else read_reference
        found = read(logits, *places, power=power)
        norm = torch.logaddexp(found.rest, found.entries.logsumexp(dim=1))
        along = None if direction is None else direction.along(chunk.hidden)
        scores = _scores(found, norm, power, along)
        # Kept for `target_metrics`, which looks at all rows at once: a chunk costs launches.
        extras = {STUDENT_LOGPROBS: scores.label}
        extras |= {"entries": found.entries, "rest": found.rest, "least": found.least, "norm": norm}
        if coefficients is None:
            return RowResult(loss_function(scores, chunk), extras, None)
        values, slopes = _values_and_slopes(scores, chunk, loss_function)
        writing = _writing(found, norm, scores, slopes, coefficients, power)
        write = _write_on_gpu if on_gpu else write_reference
        slope = None if scores.along is None else slopes[-1]
        on_top = None if slope is None else power * coefficients * slope
        return RowResult(values, extras, write(logits, *places, writing, power=power), on_top)

    return function


# Triton, which comes with CUDA builds of PyTorch only, is imported in these two.


def _read_on_gpu(logits: Tensor, *places: Tensor, power: float) -> Reading:
    from vpmoe.kernels.targets import read_targets

    return Reading(*read_targets(logits, *places, power=power))


def _write_on_gpu(
    logits: Tensor, ids: Tensor, used: Tensor, labels: Tensor, writing: Writing, *, power: float
) -> Tensor:
    from vpmoe.kernels.targets import write_targets_

    return write_targets_(logits, ids, used, labels, *vars(writing).values(), power=power)


def _places(chunk: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which of them are in use, and labels."""
    assert chunk.target_ids is not None and chunk.target_logprobs is not None
    return chunk.target_ids, chunk.target_logprobs > -torch.inf, chunk.labels


def _scores(found: Reading, norm: Tensor, power: float, along: Tensor | None) -> StudentScores:
    entries, cool_norm = found.entries, norm
    if power != 1:
        entries = power * found.entries
        cool_norm = torch.logaddexp(found.cool_rest, entries.logsumexp(dim=1))
    return StudentScores(
        label=found.label - norm,
        entries=entries - cool_norm[:, None],
        tail=found.cool_rest - cool_norm,
        along=None if along is None else power * along - cool_norm,
    )


def target_metrics(
    extras: Mapping[str, Tensor], rows: LossInputs, *, drawn: bool
) -> dict[str, Tensor]:
    """What the entries hold of either distribution, and what is certain of the KL, temperature 1.

    Args:
        extras: Of `target_row_function`.
        rows: With the targets as they were stored.
        drawn: Whether they are weights of drawn ids, which say nothing for certain.

    References:
        own; "How much is not seen" in docs/losses.md.
    """
    assert rows.target_logprobs is not None
    norm, teacher = extras["norm"], rows.target_logprobs
    student, student_tail = extras["entries"] - norm[:, None], extras["rest"] - norm
    masses = {"teacher_mass": teacher.exp().sum(dim=1), "student_mass": student.exp().sum(dim=1)}
    if drawn:
        return masses
    tail = stored_tail(teacher, rows.target_tail)
    pairs = ((teacher, tail), (student, student_tail))
    both = [torch.cat([entries, rest[:, None]], dim=1) for entries, rest in pairs]
    cap = torch.zeros_like(tail) if rows.target_cap is None else rows.target_cap
    return masses | {
        "kl_at_least": forward_kl(*both),
        "unseen_kl_at_most": unseen_kl_bound(tail, cap, student_tail, extras["least"] - norm),
    }


def _values_and_slopes(
    scores: StudentScores, chunk: LossInputs, loss_function: TargetLossFunction
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss of each row, and its derivatives by what it read: None where it read none."""
    with torch.enable_grad():
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in vars(scores).items()
            if value is not None
        }
        values = loss_function(StudentScores(**leaves), chunk)
        slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
    return values.detach(), list(slopes)


def _writing(
    found: Reading,
    norm: Tensor,
    scores: StudentScores,
    slopes: list[Tensor | None],
    coefficients: Tensor,
    power: float,
) -> Writing:
    """The chain rule from what was read of the student to its logits."""
    label_slopes, entry_slopes, tail_slopes, *along_slopes = slopes
    zeros = torch.zeros_like(norm)
    if entry_slopes is None:
        entry_slopes = torch.zeros_like(scores.entries)
    tail_slopes = zeros if tail_slopes is None else tail_slopes
    shares = scores.entries.exp()
    entries_total = entry_slopes.sum(dim=1)  # and what comes on top: all but the tail's
    if along_slopes and along_slopes[0] is not None:
        entries_total = entries_total + along_slopes[0]
    cool = power * coefficients
    total = entries_total + tail_slopes
    entries = cool[:, None] * (entry_slopes - shares * total[:, None])
    # g_T - r_S G, without the difference of nearly equal numbers where the tail is nearly all.
    tail = cool * (tail_slopes * shares.sum(dim=1) - scores.tail.exp() * entries_total)
    label = zeros
    if label_slopes is not None:
        label = coefficients * label_slopes
        whole = shares if power == 1 else (found.entries - norm[:, None]).exp()
        entries = entries - label[:, None] * whole
    return Writing(entries, label, tail, found.cool_rest, -label, norm)


def read_reference(
    logits: Float[Tensor, "rows vocab"],
    ids: Int64[Tensor, "rows entries"],
    used: Bool[Tensor, "rows entries"],
    labels: Int64[Tensor, " rows"],
    *,
    power: float,
) -> Reading:
    """What there is to know of a chunk; the logits of the entries become -inf.

    References:
        own; what `kernels.targets.read_targets` must equal.
    """
    label = logits.gather(1, labels[:, None]).squeeze(1)
    entries = logits.gather(1, ids).masked_fill(~used, -torch.inf)
    least = logits.clone().masked_fill_(_named(logits, ids, used), torch.inf).amin(dim=1)
    logits.masked_fill_(_named(logits, ids, used), -torch.inf)
    rest = logits.logsumexp(dim=1)
    cool_rest = rest if power == 1 else (power * logits).logsumexp(dim=1)
    return Reading(label, entries, rest, cool_rest, least)


def write_reference(
    logits: Float[Tensor, "rows vocab"],
    ids: Int64[Tensor, "rows entries"],
    used: Bool[Tensor, "rows entries"],
    labels: Int64[Tensor, " rows"],
    writing: Writing,
    *,
    power: float,
) -> Float[Tensor, "rows vocab"]:
    """The gradient by the logits that `read_reference` left behind.

    References:
        own; what `kernels.targets.write_targets_` must equal.
    """
    cool = (power * logits - writing.cool_rest.clamp_min(_LEAST)[:, None]).exp_()
    grad = cool.mul_(writing.tail[:, None])
    grad += writing.full[:, None] * (logits - writing.norm[:, None]).exp_()
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    grad[rows[used], ids[used]] = writing.entries[used]
    return grad.scatter_add_(1, labels[:, None], writing.label[:, None])


def _named(logits: Tensor, ids: Tensor, used: Tensor) -> Tensor:
    """True at the entries; unused places name nothing, not even id 0."""
    named = torch.zeros_like(logits, dtype=torch.bool)
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    named[rows[used], ids[used]] = True
    return named


class TargetLoss(RowLoss):
    """A loss on stored targets: subclasses write `row_losses`, all else is here.

    `drawn` says whether targets are weights of drawn ids.

    Args:
        temperature: Of the student's entries and tail.
        chunk_rows: Rows whose logits are held together; any value gives the same result.
    """

    needs = TARGET_NEEDS
    drawn = False

    def __init__(self, *, temperature: float = 1.0, chunk_rows: int = CHUNK_ROWS) -> None:
        super().__init__(chunk_rows=chunk_rows)
        self.temperature = temperature

    @abstractmethod
    def row_losses(self, student: StudentScores, rows: LossInputs) -> Float[Tensor, " rows"]:
        """Loss of each row, differentiable in the student's scores; no row depends on another."""

    def row_function(self, rows: LossInputs) -> RowFunction:
        """What is done with a chunk of logits."""
        return target_row_function(rows, self.row_losses, temperature=self.temperature)

    def row_metrics(
        self,
        student_logprobs: Float[Tensor, " rows"],
        extras: dict[str, Tensor],
        rows: LossInputs,
    ) -> dict[str, Tensor]:
        """`target_metrics`."""
        return target_metrics(extras, rows, drawn=self.drawn)
