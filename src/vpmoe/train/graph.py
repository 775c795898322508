"""A student's forward and backward pass as CUDA graphs: one launch per pass, not one per kernel.

The loss stays outside: its rows differ in number from batch to batch, and its kernels are few and
large. Memory of the captured passes is held for as long as the graphs are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpmoe.batch import Batch
from vpmoe.errors import RunError
from vpmoe.models.student import Student, StudentOutput

WARM_UP = 2  # passes of a shape that are launched kernel by kernel: compilers run in them
MIN_DOCUMENTS = 64  # that a graph has room for at least


@contextmanager
def graph_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a stream that graphs can be captured on.

    Everything that a captured backward pass touches has to be made in here, hooks of parameters
    included: they remember their stream.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


@dataclass
class _Captured:
    """Two graphs over the same memory, and the tensors that go in and come out."""

    inputs: dict[str, Tensor]
    room: int
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    hidden: Tensor
    balance: Tensor
    grad_hidden: Tensor
    grad_balance: Tensor


class _Replay(torch.autograd.Function):
    """The captured passes as one step of autograd; parameters get their gradients inside."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, captured: _Captured) -> tuple[Tensor, Tensor]:
        del anchor  # autograd wants one argument with grad, or it would not call backward
        captured.forward.replay()
        ctx.captured = captured
        return captured.hidden.detach(), captured.balance.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        captured = ctx.captured
        captured.grad_hidden.copy_(grads[0])
        captured.grad_balance.copy_(grads[1])
        captured.backward.replay()
        return None, None


class GraphedStudent:
    """A student whose passes over batches of a shape seen before are replayed.

    Args:
        student: In training mode, with fused kernels; it lives inside a `graph_stream`.
        after_backward: What ends each backward pass; captured with it.

    Raises:
        RunError: If the student keeps a subset of the vocabulary: looking ids up reads back.
    """

    def __init__(self, student: Student, after_backward: Callable[[], None]) -> None:
        if student.row_of is not None:
            raise RunError(
                "cuda_graph = true with a vocabulary subset",
                hint="set cuda_graph = false, or keep the whole vocabulary",
            )
        self.student = student
        self._after_backward = after_backward
        self._seen: dict[tuple[torch.Size, bool], int] = {}
        self._captured: dict[tuple[torch.Size, bool], _Captured] = {}
        self._anchor = torch.zeros((), device=student.embedding.weight.device, requires_grad=True)
        self._pool: Any = None

    def __call__(self, batch: Batch, num_documents: int) -> StudentOutput:
        """The student's output, with grad.

        Args:
            batch: On the student's device.
            num_documents: Documents in it.
        """
        shape = batch.tokens.shape, batch.expert_ids is not None
        seen = self._seen.get(shape, 0)
        self._seen[shape] = seen + 1
        if seen < WARM_UP:
            return forward(self.student, batch, num_documents)
        captured = self._captured.get(shape)
        if captured is None or captured.room < num_documents:
            captured = None  # its memory is free for the next
            self._captured.pop(shape, None)
            captured = self._captured[shape] = self._capture(batch, num_documents)
        for name, tensor in captured.inputs.items():
            tensor.copy_(getattr(batch, name))
        hidden, balance = _Replay.apply(self._anchor, captured)
        return StudentOutput(hidden, balance, num_documents)

    def _capture(self, batch: Batch, num_documents: int) -> _Captured:
        room = max(MIN_DOCUMENTS, 1 << (2 * num_documents - 1).bit_length())
        names = ["tokens", "positions", "document_ids"]
        names += ["expert_ids"] if batch.expert_ids is not None else []
        inputs = {name: getattr(batch, name).clone() for name in names}
        stream = torch.cuda.current_stream()
        passes = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        mode = "thread_local"  # threads that watch collectives may go on with what they do
        with torch.cuda.graph(passes[0], self._pool, stream, capture_error_mode=mode):
            output = self.student(**inputs, num_documents=room)
        self._pool = passes[0].pool()
        roots = output.hidden, output.load_balance_sum
        grads = torch.zeros_like(roots[0]), torch.zeros_like(roots[1])
        with torch.cuda.graph(passes[1], self._pool, stream, capture_error_mode=mode):
            torch.autograd.backward(roots, grads)
            self._after_backward()
        return _Captured(inputs, room, *passes, roots[0].detach(), roots[1].detach(), *grads)


def forward(
    student: Student, batch: Batch, num_documents: int, *, layers: Sequence[int] = ()
) -> StudentOutput:
    """A forward pass, launched kernel by kernel."""
    return student(
        batch.tokens,
        positions=batch.positions,
        document_ids=batch.document_ids,
        keep_layers=layers,
        num_documents=num_documents,
        expert_ids=batch.expert_ids,
    )
