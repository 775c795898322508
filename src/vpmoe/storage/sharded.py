"""Megatron-Core's distributed checkpoints, written by this very process.

Stock Megatron-Core writes through forked children that report to a spawned manager. That costs
seconds for a small model, imports the main script again, and leaves children writing when the
trainer is killed. Here each rank writes its own file in line: a kill ends the save with it.
"""

import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vpmoe.errors import CheckpointError
from vpmoe.storage.megatron_cpu import megatron_device


class _InlineSave(TorchDistSaveShardedStrategy):
    """Megatron-Core's torch_dist strategy with the writing done in this process."""

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, save_state_dict_ret: Any
    ) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        if request.async_fn is None:
            return request

        def write(rank: int, buckets: list[Any], results: queue.Queue[Any]) -> None:
            del rank  # part of the strategy's signature; the file name already carries it
            staged = FileSystemWriterAsync.preload_tensors(buckets, False)
            transforms = [writer.transforms]
            results.put({i: _write_bucket(transforms, i, b) for i, b in enumerate(staged)})

        return request._replace(async_fn=write, preload_fn=None)


def _write_bucket(transforms: list[Any], index: int, bucket: Any) -> Any:
    """Write and sync one file; raises what Megatron-Core's writer caught."""
    answers: queue.Queue[Any] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(index)
    FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, answers, count, True)  # type: ignore[arg-type]
    _, result = answers.get()
    if isinstance(result, Exception):
        raise result
    return result


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write `state` into an existing empty folder, together with all ranks.

    Raises:
        CheckpointError: If a rank could not write.
    """
    filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment] # not a manager's
    strategy = _InlineSave("torch_dist", 1, thread_count=1)
    try:
        with megatron_device(_device_of(state)):
            dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    except (OSError, CheckpointException, RuntimeError) as error:
        # torch's own file writer reports a full disk as a RuntimeError.
        raise CheckpointError(
            f"cannot write checkpoint {folder}: {error}", hint="free some space, then resume"
        ) from error


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill the `ShardedTensor`s of `state` from a checkpoint, together with all ranks.

    Raises:
        CheckpointError: If a tensor is missing or has another shape.
    """
    try:
        with megatron_device(_device_of(state)):
            return dist_checkpointing.load(state, str(folder))  # type: ignore[return-value]
    except (CheckpointingException, CheckpointException, OSError) as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"cannot load {folder}: {first}", hint="was it written by another student config?"
        ) from error


def sharded(key: str, tensor: Tensor, *, replica: int = 0) -> ShardedTensor:
    """A whole tensor under `key`; of equal replicas only number 0 is written."""
    return ShardedTensor.from_rank_offsets(key, tensor.detach(), replica_id=replica)


def _device_of(state: dict[str, Any]) -> torch.device:
    """Where the tensors of `state` are; they are all in one place."""
    held = [tensor.data for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    return held[0].device if held and held[0] is not None else torch.device("cpu")
