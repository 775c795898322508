"""Kernels of a chain that are put on their way while the one before them still runs."""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ENABLED = True


@triton.jit
def follow(PDL: tl.constexpr) -> Any:
    """Wait for the kernel before, then let the next one come; before anything is written.

    In this order no more than two kernels of a chain share the machine. What stands before it runs
    beside the kernel before: it may read parameters, and what a kernel further back has written,
    never what the kernel just before writes.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_early(pointers, PDL: tl.constexpr) -> Any:
    """Have lines of memory brought to the L2, where later writes reach them too."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def overlap() -> dict[str, bool]:
    """What a launch of a kernel that begins with `follow` is given.

    Every kernel of the chain waits for the one before it, so that each sees all earlier ones' work.

    References:
        NVIDIA, "CUDA C++ Programming Guide": programmatic dependent launch.
    """
    return {"PDL": True, "launch_pdl": True} if ENABLED else {"PDL": False}
