"""Matching a teacher's inner states: cosine or squared distance of mapped layers, projected."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.config import Config
from vpmoe.losses.base import Loss, LossInputs, LossOutput, sum_by_span

_EPS = 1e-8
_ADAM_DECAYS = (0.9, 0.95)
STATE_DISTANCE = "state_distance"


class StateMatchConfig(Config):
    """A pull of some of the student's layers towards a teacher's, beside the loss on logits."""

    measure: Literal["cosine", "mse"] = "cosine"
    """One minus the cosine, or the mean square of the difference over the teacher's width."""
    layers: tuple[tuple[int, int], ...]
    """Pairs of a student's and a teacher's layer, both counted from 1."""
    weight: float = Field(default=1.0, gt=0)
    """Of the mean over all pairs, in the sum with the other loss."""
    projection_lr: float = Field(default=1e-3, gt=0)
    """Of the matrices, one per pair, that are there where the widths differ."""

    @model_validator(mode="after")
    def _counts_from_one(self) -> Self:
        if not self.layers or any(number < 1 for pair in self.layers for number in pair):
            raise ValueError(
                f"layers is {list(self.layers)}; give pairs such as [[4, 2], [8, 4]], from 1 on"
            )
        return self


def cosine_distance(
    student: Float[Tensor, "*rows dim"], teacher: Float[Tensor, "*rows dim"]
) -> Float[Tensor, "*rows"]:
    r"""1 - <h, u> / (|h| |u|), norms no smaller than 1e-8.

    Gradient by h: :math:`-(\hat u - \cos \hat h) / |h|`.

    References:
        Sanh et al., "DistilBERT" (2019), arXiv:1910.01108.

    Example:
        >>> h, u = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0, 1.0])
        >>> round(cosine_distance(h, u).item(), 6)
        0.403715
    """
    norms = student.norm(dim=-1).clamp_min(_EPS) * teacher.norm(dim=-1).clamp_min(_EPS)
    return 1 - (student * teacher).sum(dim=-1) / norms


def mean_square_distance(
    student: Float[Tensor, "*rows dim"], teacher: Float[Tensor, "*rows dim"]
) -> Float[Tensor, "*rows"]:
    """Mean of (h - u)^2 over the width. Gradient by h: 2 (h - u) / width.

    References:
        Jiao et al., "TinyBERT" (2020), arXiv:1909.10351.
    """
    return (student - teacher).square().mean(dim=-1)


class StateMatch:
    """A loss on logits plus the distance of mapped layers, on the same rows and scales.

    Where the widths differ, a matrix per pair takes the student's state to the teacher's width. It
    is trained here, by AdamW without decay and without clipping, from gradients summed over all
    ranks, and kept with the loss's state.

    Args:
        loss: On logits.
        config: Which layers, how compared.
        student_dim: Width of the student's states.
        teacher_dim: Width of the teacher's.
        seed: Of the projections' first values.

    References:
        Romero et al., "FitNets" (2015), arXiv:1412.6550. Difference: many layers, span scales.
    """

    def __init__(
        self,
        loss: Loss,
        config: StateMatchConfig,
        *,
        student_dim: int,
        teacher_dim: int,
        seed: int = 0,
    ) -> None:
        self.loss = loss
        self.config = config
        self.layers = tuple(student for student, _ in config.layers)
        self.teacher_layers = tuple(teacher for _, teacher in config.layers)
        self.needs = loss.needs | {"student_states", "teacher_states"}
        self.projection: Tensor | None = None
        self._moments: list[Tensor] = []
        self._step = 0
        if student_dim != teacher_dim:
            shape = (len(config.layers), student_dim, teacher_dim)
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            self.projection = (drawn / student_dim**0.5).requires_grad_()
            self._moments = [torch.zeros(shape), torch.zeros(shape)]

    def prepare(self, batch: Batch) -> Batch:
        """What the loss on logits makes of it."""
        return self.loss.prepare(batch)

    def distances(self, rows: LossInputs) -> Float[Tensor, " rows"]:
        """Mean over the pairs for each row, with grad, in float32 or wider."""
        assert rows.student_states is not None and rows.teacher_states is not None
        wide = torch.promote_types(rows.student_states.dtype, torch.float32)
        student, teacher = rows.student_states.to(wide), rows.teacher_states.to(wide)
        if self.projection is not None:
            self._to(student.device)
            student = torch.einsum("rld,ldt->rlt", student, self.projection.to(wide))
        measure = cosine_distance if self.config.measure == "cosine" else mean_square_distance
        return measure(student, teacher).mean(dim=1)

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        inputs.require(self.needs)
        output = self.loss(inputs, span_scales)
        rows = inputs.trained()
        values = self.config.weight * self.distances(rows)
        coefficients = rows.coefficients(span_scales).to(values.dtype)
        weighted = values.detach()
        if rows.row_weights is not None:
            weighted = weighted * rows.row_weights
        plain = sum_by_span(values.detach() / self.config.weight, rows.span_ids)
        return replace(
            output,
            total=output.total + (coefficients * values).sum(),
            loss_sums=output.loss_sums + sum_by_span(weighted, rows.span_ids),
            metrics=output.metrics | {STATE_DISTANCE: plain},
        )

    def _to(self, device: torch.device) -> None:
        if self.projection is not None and self.projection.device != device:
            self.projection = self.projection.detach().to(device).requires_grad_()
            self._moments = [moment.to(device) for moment in self._moments]

    def own_gradients(self) -> dict[str, Tensor]:
        """Of the projections, and of whatever the loss on logits has."""
        gradients = self.loss.own_gradients()
        if self.projection is not None:
            found = self.projection.grad
            gradients["projection"] = torch.zeros_like(self.projection) if found is None else found
            self.projection.grad = None
        return gradients

    def after_step(self, sums: Mapping[str, Tensor]) -> None:
        """Train the projections on a whole step's gradient; let the loss on logits learn."""
        self.loss.after_step(sums)
        if self.projection is None:
            return
        gradient = sums["projection"].to(self.projection)
        self._step += 1
        corrected = []
        for moment, decay, value in zip(
            self._moments, _ADAM_DECAYS, (gradient, gradient.square()), strict=True
        ):
            moment.lerp_(value, 1 - decay)
            corrected.append(moment / (1 - decay**self._step))
        with torch.no_grad():
            update = corrected[0] / (corrected[1].sqrt() + _EPS)
            self.projection -= self.config.projection_lr * update

    def state_dict(self) -> dict[str, Tensor]:
        """The projections with their optimizer, beside the other loss's state."""
        state = {f"loss/{name}": value for name, value in self.loss.state_dict().items()}
        if self.projection is not None:
            state["projection"] = self.projection.detach().cpu().clone()
            state["mean"], state["mean_square"] = (m.cpu().clone() for m in self._moments)
            state["step"] = torch.tensor(self._step)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        prefix = "loss/"
        self.loss.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        if self.projection is not None:
            self.projection = state["projection"].clone().requires_grad_()
            self._moments = [state["mean"].clone(), state["mean_square"].clone()]
            self._step = int(state["step"])
