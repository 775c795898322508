"""Checkpoints of a run: complete or absent, listed, pruned, and read on any number of ranks."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from vpmoe.errors import CheckpointError
from vpmoe.storage.atomic import publish
from vpmoe.storage.manifest import MANIFEST_NAME, read_manifest, write_manifest

_NAME = re.compile(r"step-(\d{6,})")
_EXTRA = "extra"
_ARRAY = "__ndarray__"
TEMPORARY_PREFIX = ".unfinished-"
MODEL_PREFIX = "model."


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint written after `step` optimizer steps."""
    return f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    found = [p for p in run_dir.iterdir() if _NAME.fullmatch(p.name)]
    complete = [p for p in found if (p / MANIFEST_NAME).is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The run's newest complete checkpoint."""
    found = list_checkpoints(run_dir)
    return found[-1] if found else None


def save_checkpoint(
    run_dir: Path,
    step: int,
    sharded_state: dict[str, Any],
    *,
    extra: Mapping[str, Any],
    manifest: Mapping[str, Any],
    keep: int = 0,
) -> Path:
    """Write one checkpoint together with all ranks; its folder appears only when it is complete.

    Args:
        run_dir: The run's folder.
        step: Optimizer steps done.
        sharded_state: Megatron-Core `ShardedTensor`s, keyed by name; each shard on one rank.
        extra: Plain values and arrays that are the same on every rank.
        manifest: What the checkpoint is; the sizes of its files are added.
        keep: How many checkpoints to leave in the run, this one included; 0 leaves all.

    Raises:
        CheckpointError: If a checkpoint of this step is already there.
    """
    from vpmoe.storage.sharded import save_sharded  # Megatron-Core takes seconds to import

    target = Path(run_dir) / checkpoint_name(step)
    temporary = target.with_name(TEMPORARY_PREFIX + target.name)
    if target.exists():
        raise CheckpointError(f"{target} is already there", hint="start a new run, or move it away")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    save_sharded({**sharded_state, _EXTRA: _pack(dict(extra))}, temporary)
    if dist.get_rank() == 0:
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        sizes = {p.name: p.stat().st_size for p in files}
        write_manifest(temporary / MANIFEST_NAME, {**manifest, "files": sizes})
        for file in files:
            _sync(file)
        publish(temporary, target)
        _prune(Path(run_dir), keep)
    dist.barrier()
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(run_dir: Path, keep: int) -> None:
    """Delete the oldest checkpoints; a name is taken away before its content."""
    for old in list_checkpoints(run_dir)[:-keep] if keep else []:
        doomed = old.rename(old.with_name(TEMPORARY_PREFIX + old.name))
        shutil.rmtree(doomed)


def remove_unfinished(run_dir: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    for folder in Path(run_dir).glob(TEMPORARY_PREFIX + "*"):
        shutil.rmtree(folder)


def load_checkpoint(
    path: Path, sharded_state: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint into the shapes and shards that `sharded_state` asks for.

    Returns:
        The state with tensors in place of `ShardedTensor`s, and the `extra` it was saved with.

    Raises:
        CheckpointError: If the checkpoint is unfinished, cut, or lacks a tensor that is asked for.
    """
    from vpmoe.storage.sharded import load_sharded  # Megatron-Core takes seconds to import

    read_checkpoint_manifest(path)
    state = load_sharded(sharded_state, Path(path))
    return state, _unpack(state.pop(_EXTRA))


def read_checkpoint_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointError: If it is not there, unfinished, or a file has another size than it had.
    """
    path = Path(path)
    if not (path / MANIFEST_NAME).is_file():
        known = [p.name for p in list_checkpoints(path)]
        hint = f"name one of {', '.join(known)}" if known else "checkpoints are named step-000123"
        raise CheckpointError(f"{path} is not a complete checkpoint", hint=hint)
    manifest = read_manifest(path / MANIFEST_NAME)
    for name, size in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise CheckpointError(
                f"{file} has {found} bytes, it was written with {size}",
                hint="the checkpoint is damaged: use an earlier one",
            )
    return manifest


def read_shapes(path: Path, prefix: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor whose key begins with `prefix`."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: (tuple(entry.size), entry.properties.dtype)
        for key, entry in stored.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def load_model_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Fill a model's `state_dict()` in place from a checkpoint; no process group is needed.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    read_checkpoint_manifest(path)
    stored = read_shapes(path, MODEL_PREFIX)
    asked = {MODEL_PREFIX + name: tensor for name, tensor in state.items()}
    for key, tensor in asked.items():
        if key not in stored or stored[key][0] != tuple(tensor.shape):
            name = key.removeprefix(MODEL_PREFIX)
            found = stored[key][0] if key in stored else "absent"
            raise CheckpointError(
                f"{path}: {name} is {found}, the model wants {tuple(tensor.shape)}",
                hint="the checkpoint belongs to another student config",
            )
    unused = sorted(stored.keys() - asked.keys())
    if unused:
        name = unused[0].removeprefix(MODEL_PREFIX)
        raise CheckpointError(
            f"{path} holds {len(unused)} tensors that the model lacks, first {name}",
            hint="the checkpoint belongs to another student config",
        )
    load(dict(asked), checkpoint_id=path, no_dist=True)


def _pack(value: Any) -> Any:
    """`value` with arrays as tensors: the loader accepts nothing that could run code."""
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, Mapping):
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_pack(item) for item in value)
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {_ARRAY}:
            return value[_ARRAY].numpy()
        return {key: _unpack(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unpack(item) for item in value)
    return value
