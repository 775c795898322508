"""Sums over programs, in a fixed order: the second half of every sum over tokens."""

import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 256, 16, 8  # of a program


@triton.jit
def _sum_kernel(
    parts, small_out, wide_out, num_parts,
    SMALL: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_parts, ROWS):
        part = start + tl.arange(0, ROWS)
        inside = (part < num_parts)[:, None] & (column < SUMS)[None, :]
        acc += tl.load(parts + part[:, None].to(tl.int64) * SUMS + column[None, :], inside, 0.0)
    total = tl.sum(acc, 0)
    tl.store(small_out + column, total.to(small_out.dtype.element_ty), column < SMALL)
    wide = (column >= SMALL) & (column < SUMS)
    tl.store(wide_out + column - SMALL, total, wide)


def sum_parts(parts: Tensor, small: Tensor, wide: Tensor | None = None) -> None:
    """Write the sums of the columns of `parts`, the first ones to `small`, the others to `wide`.

    Args:
        parts: One row per program, float32.
        small: What the first columns become, in its own type.
        wide: What the others become, float32.

    References:
        own.
    """
    count, columns = parts.shape
    _sum_kernel[(triton.cdiv(columns, COLUMNS),)](
        parts, small, wide if wide is not None else parts, count,
        small.numel(), columns, ROWS, COLUMNS, num_warps=WARPS,
    )  # fmt: skip
