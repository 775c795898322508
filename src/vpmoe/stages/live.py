"""A teacher in this process that reads each micro-batch just before the student's loss needs it."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.errors import DataError
from vpmoe.losses import Loss, LossInputs, LossOutput
from vpmoe.models.student import Student
from vpmoe.teachers.local import LocalTeacher


class TaughtLoss:
    """A loss whose batches bring no word of the teacher: it is asked as they come.

    Args:
        loss: What is learned from the teacher's states.
        teacher: Who is asked.
        student: Whose vocabulary the teacher's head is cut to.

    Raises:
        DataError: If the student has tokens that the teacher does not know.
    """

    def __init__(self, loss: Loss, teacher: LocalTeacher, student: Student) -> None:
        self._loss = loss
        self._teacher = teacher
        self._head = head_of(teacher, student)
        self.layers = loss.layers
        self.needs = frozenset({"teacher_hidden"})

    def prepare(self, batch: Batch) -> Batch:
        """The batch with the teacher's states at every token of a document."""
        return replace(batch, teacher_hidden=states_of(self._teacher, batch))

    def __call__(self, inputs: LossInputs, span_scales: Float[Tensor, " span"]) -> LossOutput:
        """Sums and counts of one micro-batch, with the scalar to differentiate."""
        head = self._head.to(inputs.hidden.device)
        return self._loss(replace(inputs, teacher_head=head), span_scales)

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


def states_of(teacher: LocalTeacher, batch: Batch) -> Float[Tensor, "batch seq teacher_dim"]:
    """Final states of the teacher at every token of a document; 0 at padding.

    Each document is read by itself, as the student's attention sees it.
    """
    pieces = documents_of(batch.document_ids)
    tokens = batch.tokens.cpu().numpy()
    # The teacher gives no state of a sequence's last token, so that each gets one more to end on.
    asked = [np.append(tokens[row, begin:end], tokens[row, begin]) for row, begin, end in pieces]
    found = teacher.hidden(asked)
    width = found[0].shape[1] if found else teacher.head_weight.shape[1]
    states = torch.zeros(
        *batch.tokens.shape,
        width,
        dtype=found[0].dtype if found else torch.float32,
        device=batch.tokens.device,
    )
    for (row, begin, end), state in zip(pieces, found, strict=True):
        states[row, begin:end] = state.to(states.device)
    return states


def documents_of(document_ids: Int64[Tensor, "batch seq"]) -> list[tuple[int, int, int]]:
    """Row, first token and one past the last token of every document."""
    pieces = []
    for row, ids in enumerate(document_ids.cpu().numpy()):
        cuts = np.flatnonzero(np.diff(ids)) + 1
        edges = [0, *cuts.tolist(), len(ids)]
        pieces += [(row, begin, end) for begin, end in pairwise(edges) if ids[begin] >= 0]
    return pieces
