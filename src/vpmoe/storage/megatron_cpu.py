"""What Megatron-Core 0.16 needs on a run without CUDA: one name.

Its gradient buffers and the last collective of a distributed save are allocated on
`torch.cuda.current_device()`, with no way to say another device; where torch has no CUDA the call
raises. Everything else this package uses of Megatron-Core runs on gloo as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def megatron_device(device: torch.device) -> Iterator[None]:
    """Inside, Megatron-Core allocates on `device`; nothing is touched when that is a GPU."""
    if device.type == "cuda":
        yield
        return
    original = torch.cuda.current_device
    torch.cuda.current_device = lambda: device  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.current_device = original
