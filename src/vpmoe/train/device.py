"""Where a run computes, and the processes that compute it together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import HashStore

from vpmoe.errors import RunError

DeviceName = Literal["cpu", "cuda"]
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: Number of this process; rank 0 owns the run folder.
        size: How many processes there are; all of them are data-parallel.
        device: Where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on the process that writes."""
        return self.rank == 0


def require_device(device: torch.device | str) -> None:
    """Return if tensors can be put there.

    Raises:
        RunError: If CUDA is asked for and is not there.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} has no CUDA" if not torch.version.cuda else "no GPU"
        raise RunError(
            f'device "cuda" was asked for, but found {built}',
            hint='set device = "cpu", or install a CUDA build of torch on a machine with a GPU',
        )


def find_device(name: DeviceName) -> torch.device:
    """The device of this process.

    Raises:
        RunError: If CUDA is asked for and is not there.
    """
    if name == "cpu":
        return torch.device("cpu")
    require_device(name)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise RunError(
            f"{local_rank + 1} processes were started here for {torch.cuda.device_count()} GPUs",
            hint="start one process per GPU",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def world(name: DeviceName, *, threads: int = 0) -> Iterator[World]:
    """The processes of this run, joined through Megatron-Core's process groups.

    Started by `torchrun` it joins the others; started by hand it is a group of one, on the same
    code path and without a network. A group that is already there is used and left alone.

    Args:
        name: Where to compute.
        threads: CPU threads of torch; 0 leaves its choice.
    """
    device = find_device(name)
    if threads:
        torch.set_num_threads(threads)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), device)
        return
    is_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
    alone = {} if "WORLD_SIZE" in os.environ else {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        backend, timeout=_TIMEOUT, device_id=device if is_gpu else None, **alone
    )
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield World(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
