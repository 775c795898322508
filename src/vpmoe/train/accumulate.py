"""Gradients of small parameters, added to their float32 sums together.

Megatron-Core's wrapper adds each gradient by a kernel of its own, as it comes: thousands of them a
micro-batch for a student of 80 layers. Large parameters are left to it, unless their backward adds
into the sum itself and has no gradient left to give.
"""

# pyright: reportPrivateImportUsage=false
# PyTorch's list kernels have no public name; its own optimizers call them by this one.

from collections.abc import Iterable

import torch
from torch import Tensor, nn

SMALL = 2**22  # numbers below which a parameter waits for the others
PIECE = 2**26  # numbers that are widened at a time


class SmallGradients:
    """Keeps gradients back until `add`, which puts them into `main_grad`.

    Args:
        parameters: Of which small ones, with a float32 `main_grad`, are kept back.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        for parameter in parameters:
            total = getattr(parameter, "main_grad", None)
            if total is None or total.dtype != torch.float32:
                continue
            if parameter.numel() < SMALL:
                parameter.register_post_accumulate_grad_hook(self._keep)

    def _keep(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # its backward added to the sum itself
            return
        self._waiting.append((parameter.main_grad, parameter.grad))  # pyright: ignore[reportAttributeAccessIssue]
        parameter.grad = None  # nothing left for the wrapper's hook, which comes next

    @torch.no_grad()
    def add(self) -> None:
        """Add what was kept back; to be called after each backward pass."""
        waiting, self._waiting = self._waiting, []
        wide = [pair for pair in waiting if pair[1].dtype == torch.float32]
        if wide:
            torch._foreach_add_([total for total, _ in wide], [grad for _, grad in wide])
        piece: list[tuple[Tensor, Tensor]] = []
        size = 0
        for pair in waiting:
            if pair[1].dtype == torch.float32:
                continue
            piece.append(pair)
            size += pair[1].numel()
            if size >= PIECE:
                _add_narrow(piece)
                piece, size = [], 0
        if piece:
            _add_narrow(piece)


def _add_narrow(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Widened into one piece of memory first: list kernels add tensors of one dtype."""
    grads = [grad for _, grad in pairs]
    flat = torch.empty(sum(g.numel() for g in grads), dtype=torch.float32, device=grads[0].device)
    parts = flat.split([g.numel() for g in grads])
    widened = [part.view(g.shape) for part, g in zip(parts, grads, strict=True)]
    torch._foreach_copy_(widened, grads)
    torch._foreach_add_([total for total, _ in pairs], widened)
