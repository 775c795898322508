"""A teacher in this process that reads each micro-batch just before the student's loss needs it."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.errors import DataError
from vpmoe.losses import Loss, LossInputs, LossOutput
from vpmoe.losses.base import WrappedLoss
from vpmoe.models.student import Student
from vpmoe.teachers.base import TEACHER_HIDDEN
from vpmoe.teachers.local import LocalTeacher


class TaughtLoss(WrappedLoss):
    """A loss whose batches bring no states of the teacher: it is asked as they come.

    Args:
        loss: What is learned from the teacher's states.
        teacher: Who is asked.
        student: Whose vocabulary the teacher's head is cut to.

    Raises:
        DataError: If the student has tokens that the teacher does not know, or one of the two has
            no layer of a number that the loss asks for.
    """

    def __init__(self, loss: Loss, teacher: LocalTeacher, student: Student) -> None:
        super().__init__(loss)
        self._teacher = teacher
        self._head = head_of(teacher, student) if TEACHER_HIDDEN in loss.needs else None
        self._teacher_layers: tuple[int, ...] = getattr(loss, "teacher_layers", ())
        self.needs = loss.needs - {TEACHER_HIDDEN, "teacher_head", "teacher_states"}
        _require_layers("student", self.layers, student.config.num_layers)
        _require_layers("teacher", self._teacher_layers, teacher.num_layers)

    def prepare(self, batch: Batch) -> Batch:
        """The batch with the teacher's states at every token of a document, from one forward."""
        batch = super().prepare(batch)
        if not self._teacher_layers:
            return replace(batch, teacher_hidden=states_of(self._teacher, batch))
        layers = self._teacher_layers
        if self._head is None:
            return replace(batch, teacher_states=states_of(self._teacher, batch, layers))
        last = self._teacher.num_layers  # its states are the final ones
        found = states_of(self._teacher, batch, (*layers, last))
        return replace(batch, teacher_states=found[:, :, :-1], teacher_hidden=found[:, :, -1])

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        head = None if self._head is None else self._head.to(inputs.hidden.device)
        return super().__call__(replace(inputs, teacher_head=head), span_scales)


def head_of(teacher: LocalTeacher, student: Student) -> Float[Tensor, "rows teacher_dim"]:
    """The teacher's output embedding, one row per token of the student's vocabulary, in its order.

    What else the teacher knows is left out, so that its distribution is the one among the
    student's tokens.

    Raises:
        DataError: If the student has tokens that the teacher does not know.
    """
    weight = teacher.head_weight
    rows = student.ids_of(torch.arange(student.config.num_rows, device=student.head_weight.device))
    rows = rows.cpu()
    if teacher.subset is not None:
        rows = torch.as_tensor(teacher.subset.row_of)[rows]
    unknown = (rows < 0) | (rows >= weight.shape[0])
    if bool(unknown.any()):
        raise DataError(
            f"the teacher does not know {int(unknown.sum())} of the student's {len(rows)} tokens",
            hint="give the student a vocab_subset that the teacher's vocabulary contains",
        )
    if torch.equal(rows, torch.arange(weight.shape[0])):
        return weight
    return weight[rows.to(weight.device)]


def states_of(
    teacher: LocalTeacher, batch: Batch, layers: tuple[int, ...] = ()
) -> Float[Tensor, "batch seq *layers teacher_dim"]:
    """Final states of the teacher, or those of some layers, at every token; 0 at padding.

    Each document is read by itself, as the student's attention sees it.
    """
    pieces = documents_of(batch.document_ids)
    tokens = batch.tokens.cpu().numpy()
    # The teacher gives no state of a sequence's last token, so that each gets one more to end on.
    asked = [np.append(tokens[row, begin:end], tokens[row, begin]) for row, begin, end in pieces]
    found = teacher.layer_states(asked, layers) if layers else teacher.hidden(asked)
    shape = (len(layers), teacher.width) if layers else (teacher.width,)
    states = torch.zeros(
        *batch.tokens.shape, *shape, dtype=teacher.head_weight.dtype, device=batch.tokens.device
    )
    for (row, begin, end), state in zip(pieces, found, strict=True):
        states[row, begin:end] = state.to(states.device)
    return states


def _require_layers(who: str, numbers: tuple[int, ...], depth: int) -> None:
    beyond = [number for number in numbers if number > depth]
    if beyond:
        raise DataError(
            f"states.layers names layer {beyond[0]} of the {who}, which has {depth}",
            hint="count from 1 to the number of layers",
        )


def documents_of(document_ids: Int64[Tensor, "batch seq"]) -> list[tuple[int, int, int]]:
    """Row, first token and one past the last token of every document."""
    pieces = []
    for row, ids in enumerate(document_ids.cpu().numpy()):
        cuts = np.flatnonzero(np.diff(ids)) + 1
        edges = [0, *cuts.tolist(), len(ids)]
        pieces += [(row, begin, end) for begin, end in pairwise(edges) if ids[begin] >= 0]
    return pieces
