"""One optimizer step: sums over the global batch, then one division, one update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.errors import RunError
from vpmoe.losses.base import Loss, LossInputs, span_scales
from vpmoe.losses.load_balance import load_balance_loss
from vpmoe.losses.tails import stored_tail
from vpmoe.models.student import Student, StudentOutput
from vpmoe.spans import TRAINED_SPANS, Span
from vpmoe.train.config import SpanWeightsConfig, TrainConfig
from vpmoe.train.graph import forward
from vpmoe.train.metrics import Stopwatch, loss_metrics
from vpmoe.train.parallel import Replica
from vpmoe.train.plan import Plan
from vpmoe.train.reduce import add_sums, all_sums, global_counts

LOAD_BALANCE = "load_balance"
OWN = "own/"
PER_LABEL = (  # fields of a batch that a loss reads as they are
    "teacher_logprobs",
    "rollout_logprobs",
    "teacher_hidden",
    "teacher_states",
    "row_weights",
)


@dataclass(frozen=True)
class StepSums:
    """One step's sums over all micro-batches and ranks.

    Attributes:
        losses: `LossOutput.sums`.
        load_balance: Auxiliary loss of the routers, mean over documents, coefficient included.
        scales: What one token of each span counted for, w_c / N_c.
        num_tokens: Tokens of documents, padding left out.
        num_slots: Tokens with padding.
        own_gradients: Of the loss's parameters.
    """

    losses: dict[str, Float[Tensor, " span"]]
    load_balance: float
    scales: Float[Tensor, " span"]
    num_tokens: int
    num_slots: int
    own_gradients: dict[str, Tensor] = field(default_factory=dict)

    def metrics(self) -> dict[str, float | int]:
        """Means per span and counts, named for the log."""
        return loss_metrics(self.losses, self.scales) | {
            "train/load_balance_loss": self.load_balance,
            "train/tokens": self.num_tokens,
            "train/fill_pct": 100 * self.num_tokens / max(self.num_slots, 1),
        }


def take_step(
    replica: Replica, plan: Plan, config: TrainConfig, *, step: int, watch: Stopwatch
) -> tuple[StepSums, dict[str, float | int]]:
    """Batches, gradients, update: one optimizer step, and what there is to log of it."""
    with watch("data"):
        batches, loss = plan.micro_batches(step)
    with watch("forward_backward"):
        summed = sum_gradients(replica, batches, loss, config)
    with watch("optimizer"):
        applied = apply_gradients(replica, config, step=step, num_steps=plan.num_steps)
        loss.after_step(summed.losses | summed.own_gradients)
    return summed, applied


def sum_gradients(
    replica: Replica, batches: Sequence[Batch], loss: Loss, config: TrainConfig
) -> StepSums:
    """Forward and backward of every micro-batch; gradients end up summed over all ranks.

    The counts that losses are divided by are summed over the global batch before the first
    forward, so the gradient does not depend on how the batch is cut up.

    Raises:
        RunError: If a span's loss is not a finite number.
    """
    device = replica.world.device
    counts = global_counts(batches, device)
    num_documents = int(counts["documents"])
    scales = span_scales(span_weights(config.span_weights).to(device), counts["spans"])
    coefficient = replica.student.config.load_balance
    replica.zero_gradients()
    parts = []
    for index, batch in enumerate(batches):
        documents_here = batch.num_documents
        batch = loss.prepare(batch.to(device))
        with replica.last_backward(index == len(batches) - 1):
            student_output = replica.forward(batch, documents_here, layers=loss.layers)
            inputs = loss_inputs(replica.student, batch, student_output)
            output = loss(inputs, scales)
            balance = load_balance_loss(
                student_output.load_balance_sum,
                coefficient=coefficient,
                num_documents=num_documents,
            )
            (output.total + balance).backward()
            replica.after_backward()
        parts.append(output.sums | {LOAD_BALANCE: balance.detach().double()})
    replica.finish_gradients()
    own = {f"{OWN}{name}": value for name, value in loss.own_gradients().items()}
    sums = all_sums(add_sums(parts) | own)
    own = {name.removeprefix(OWN): sums.pop(name) for name in own}
    balance = float(sums.pop(LOAD_BALANCE))
    _refuse_non_finite({"loss": float(sums["loss"].sum()), "load-balance loss": balance})
    return StepSums(sums, balance, scales, int(counts["tokens"]), int(counts["slots"]), own)


def run_student(
    student: Student, batch: Batch, *, layers: tuple[int, ...] = ()
) -> tuple[LossInputs, Float[Tensor, ""]]:
    """A forward pass as a loss reads it, one row per label, and the routers' auxiliary sum."""
    output = forward(student, batch, batch.num_documents, layers=layers)
    return loss_inputs(student, batch, output), output.load_balance_sum


def loss_inputs(student: Student, batch: Batch, output: StudentOutput) -> LossInputs:
    """A forward pass as a loss reads it, one row per label."""
    # Ignored labels may lie outside a vocabulary subset; any id that is inside will do for them.
    is_trained = batch.span_ids != Span.IGNORE
    labels = student.rows_of(torch.where(is_trained, batch.labels, batch.tokens))
    states = torch.stack(output.states, dim=2).flatten(0, 1) if output.states else None
    return LossInputs(
        hidden=output.hidden.flatten(0, 1),
        head_weight=student.head_weight,
        labels=labels.flatten(),
        span_ids=batch.span_ids.flatten(),
        content_mask=batch.content_mask.flatten(),
        student_states=states,
        **{
            name: None if value is None else value.flatten(0, 1)
            for name in PER_LABEL
            for value in (getattr(batch, name),)
        },
        **_targets(student, batch),
    )


def _targets(student: Student, batch: Batch) -> dict[str, Tensor]:
    """A batch's stored distributions over the student's rows: what it lacks goes to the tail.

    Nothing is known of where the teacher would have put that mass, so the cap on a tail's ids,
    else the smallest entry, is 1 where some was moved.
    """
    if batch.target_ids is None or batch.target_logprobs is None:
        return {}
    ids, logprobs = batch.target_ids.flatten(0, 1), batch.target_logprobs.flatten(0, 1)
    tail = stored_tail(logprobs, None if batch.target_tail is None else batch.target_tail.flatten())
    used = logprobs > -torch.inf
    cap = torch.where(used, logprobs, 0.0).amin(dim=1)
    if student.row_of is not None:
        rows = student.row_of[ids]
        outside = used & (rows < 0)
        moved = logprobs.masked_fill(~outside, -torch.inf).logsumexp(dim=1)
        tail = torch.logaddexp(tail, moved)
        cap = cap.masked_fill(outside.any(dim=1), 0.0)
        logprobs = logprobs.masked_fill(outside, -torch.inf)
        ids = rows.masked_fill(rows < 0, 0)
    return {
        "target_ids": ids,
        "target_logprobs": logprobs,
        "target_tail": tail,
        "target_cap": cap,
    }


def apply_gradients(
    replica: Replica, config: TrainConfig, *, step: int, num_steps: int
) -> dict[str, float | int]:
    """Clip, update the parameters, then the routers' biases; returns norms and rates to log.

    Raises:
        RunError: If the gradient is not finite; nothing has been updated then.
    """
    norms = replica.gradient_norms()
    total = math.hypot(*norms.values())
    _refuse_non_finite({"gradient norm": total})
    scale = 1.0
    if config.clip_grad_norm and total > config.clip_grad_norm:
        scale = config.clip_grad_norm / total
    lr_factor = config.schedule.factor(step, num_steps=num_steps)
    expert_counts = replica.sum_expert_counts()
    replica.update(lr_factor, expert_counts, gradient_scale=scale)
    router = replica.balance_experts(expert_counts)
    return router | {
        "lr": lr_factor * config.optimizer.lr,
        "lr_factor": lr_factor,
        "grad_norm/all": total,
        **{f"grad_norm/{role}": norm for role, norm in norms.items()},
    }


def span_weights(config: SpanWeightsConfig) -> Float[Tensor, " span"]:
    """Weights indexed by `Span`; ignored labels weigh nothing."""
    values = {span: getattr(config, span.name.lower()) for span in TRAINED_SPANS}
    return torch.tensor([values.get(span, 0.0) for span in Span], dtype=torch.float64)


def _refuse_non_finite(values: dict[str, float | int]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise RunError(
                f"{name} is {value}: training has diverged",
                hint="resume from the last checkpoint with a lower learning rate in a new run",
            )
