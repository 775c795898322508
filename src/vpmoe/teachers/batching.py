"""Which sequences share a forward, and how what is said of them comes back."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


class Arriving:
    """Tensors of a batch on their way to another device.

    Args:
        tensors: One row for each place that a token follows.
        to: Where they go; from a GPU without waiting for it.
        members: Which sequences the places belong to, in order.
    """

    def __init__(
        self, tensors: Sequence[Tensor], to: torch.device | str, members: list[int]
    ) -> None:
        on_gpu = tensors[0].is_cuda
        self._tensors = [tensor.to(to, non_blocking=on_gpu) for tensor in tensors]
        self._members = members
        self._done = torch.cuda.Event() if on_gpu else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def give(self, out: list[tuple[Tensor, ...]], lengths: Sequence[int]) -> None:
        """Cut them into sequences, once they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        places = [lengths[i] - 1 for i in self._members]
        parts = zip(*(tensor.split(places) for tensor in self._tensors), strict=True)
        for index, part in zip(self._members, parts, strict=True):
            out[index] = part


def pad_right(rows: list[np.ndarray]) -> tuple[Int64[Tensor, "batch seq"], Tensor]:
    """Sequences below one another, and which of the tokens are theirs."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.int64)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row)
        real[index, : len(row)] = True
    return tokens, real


def similar_lengths(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of similar length whose padded size stays within `batch_tokens`."""
    members: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if members and lengths[members[0]] * (len(members) + 1) > batch_tokens:
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def equal_lengths(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of the same length that hold at most `batch_tokens`."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length, members in sorted(groups.items()):
        size = max(1, batch_tokens // length)
        yield from (members[begin : begin + size] for begin in range(0, len(members), size))
