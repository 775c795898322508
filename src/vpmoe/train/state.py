"""What must survive a crash: opening a run, saving it, and going on where it stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vpmoe.config import difference, fingerprint, resolved, validate
from vpmoe.errors import RunError, VpmoeError
from vpmoe.models.student import Student, StudentConfig, build_student
from vpmoe.storage.checkpoints import (
    MODEL_PREFIX,
    latest_checkpoint,
    load_checkpoint,
    load_model_tensors,
    read_checkpoint_manifest,
    remove_unfinished,
    save_checkpoint,
)
from vpmoe.storage.manifest import MANIFEST_NAME, provenance
from vpmoe.storage.runs import RunDir, read_config, read_metrics
from vpmoe.storage.sharded import sharded
from vpmoe.train.config import FREE_KEYS, TrainConfig
from vpmoe.train.device import World, require_device
from vpmoe.train.hooks import Position
from vpmoe.train.parallel import Replica
from vpmoe.train.plan import Plan
from vpmoe.vocabulary import O200K_SHA256

_OPTIMIZER = "optimizer."


def open_run(
    path: Path, config: TrainConfig, *, resume: bool, world: World
) -> tuple[RunDir | None, Path | None]:
    """The run's folder, held by rank 0, and the checkpoint to go on from; called on every rank.

    Raises:
        RunError: If the folder is in use or holds a run that this one may not touch.
    """
    run, answer = None, None
    if world.is_first:
        try:
            run = _open_first(path, config, resume=resume)
            answer = latest_checkpoint(path)
        except VpmoeError as error:
            answer = error
    heard: list[Any] = [answer]
    dist.broadcast_object_list(heard, src=0)
    if isinstance(heard[0], VpmoeError):
        raise heard[0]
    return run, heard[0]


def _open_first(path: Path, config: TrainConfig, *, resume: bool) -> RunDir:
    if resume and not path.is_dir():
        raise RunError(f"there is no run at {path} to resume", hint="start it without --resume")
    run = RunDir(path)
    try:
        new, old = resolved(config), read_config(path)
        if not resume and (latest_checkpoint(path) or any(True for _ in read_metrics(path))):
            raise RunError(
                f"{path} already holds a run", hint="go on with --resume, or choose another --run"
            )
        if resume and old is not None:
            _refuse_drift(path, old, new)
        remove_unfinished(path)
        run.write_config(new)
    except VpmoeError:
        run.close()
        raise
    return run


def _refuse_drift(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """A run goes on under the settings it was started with."""
    before, after = ({k: v for k, v in t.items() if k not in FREE_KEYS} for t in (old, new))
    changed = difference(before, after)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        hint = "start a new run with --run NAME, or undo the change"
        if any(" absent →" in line or "→ absent" in line for line in changed):
            hint += " (what is absent came or went with a kind, or with another version of vpmoe)"
        raise RunError(
            f"{path} was started with another config "
            f"(fingerprint {fingerprint(old)}, now {fingerprint(new)})\n{lines}",
            hint=hint,
        )


def save(
    run_dir: Path, replica: Replica, plan: Plan, position: Position, *, config: TrainConfig
) -> Path:
    """Write a checkpoint of everything that the next step depends on; called on every rank."""
    extra = {
        "step": position.step,
        "tokens_seen": position.tokens_seen,
        "plan": plan.state(),
        "random": _gather_random_states(replica.world),
    }
    tree = resolved(config)
    parent = latest_checkpoint(run_dir)
    manifest = {
        "kind": "checkpoint",
        "step": position.step,
        "tokens_seen": position.tokens_seen,
        "num_ranks": replica.world.size,
        "dtype": config.dtype,
        "fingerprint": fingerprint(tree),
        "tokenizer_sha256": O200K_SHA256,
        "parent": parent.name if parent else None,
        **provenance(),
        "inputs": dict(plan.inputs),
        "student": resolved(replica.student.config),
        "config": tree,
    }
    return save_checkpoint(
        run_dir,
        position.step,
        _sharded_state(replica),
        extra=extra,
        manifest=manifest,
        keep=config.checkpoint.keep,
    )


def restore(path: Path, replica: Replica, plan: Plan) -> Position:
    """Put back what `save` wrote, on any number of ranks; called on every rank.

    Raises:
        RunError: If data, targets or teacher are no longer those that the run was started with.
    """
    _refuse_other_inputs(path, plan.inputs)
    state, extra = load_checkpoint(path, _sharded_state(replica))
    replica.student.load_state_dict(state["model"])
    replica.optimizer.load_state(state["optimizer"])
    plan.load_state(extra["plan"])
    _set_random_state(extra["random"], replica.world)
    return Position(step=extra["step"], tokens_seen=extra["tokens_seen"])


def _refuse_other_inputs(path: Path, inputs: Mapping[str, Any]) -> None:
    """The same path may hold another dataset or target store by now; the config would not tell."""
    kept = read_checkpoint_manifest(path).get("inputs", {})
    lines = difference(_contents(kept), _contents(json.loads(json.dumps(inputs))))
    if lines:
        raise RunError(
            f"what {path.parent} learns from has changed since {path.name}: {'; '.join(lines)}",
            hint="put back what it was started with, or start a new run",
        )


def _contents(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the batches: not the parent, whose weights are in the checkpoint by now.

    A dataset that was built again has another manifest, but the same content.
    """
    tree = {name: value for name, value in inputs.items() if name != "init"}
    if "content_sha256" in tree.get("data", {}):
        tree["data"] = {"content_sha256": tree["data"]["content_sha256"]}
    return tree


def _sharded_state(replica: Replica) -> dict[str, Any]:
    """Live tensors under names that do not depend on the number of ranks.

    Every rank holds the model, rank 0's copy is written; optimizer state exists once, with the
    owner of its parameter, whoever that is when it is read again.
    """
    rank = replica.world.rank
    model = replica.student.state_dict()
    optimizer = replica.optimizer.state()
    return {
        "model": {name: sharded(MODEL_PREFIX + name, t, replica=rank) for name, t in model.items()},
        "optimizer": {
            name: {key: sharded(f"{_OPTIMIZER}{name}.{key}", t) for key, t in tensors.items()}
            for name, tensors in optimizer.items()
        },
    }


def _gather_random_states(world: World) -> list[dict[str, Any]]:
    """torch's random state on every rank, by rank."""
    own: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(world.device)
    states: list[Any] = [None] * world.size
    dist.all_gather_object(states, own)
    return states


def _set_random_state(states: list[dict[str, Any]], world: World) -> None:
    """This rank's state; on another number of ranks the fresh seeds stay."""
    if len(states) != world.size:
        return
    own = states[world.rank]
    torch.set_rng_state(own["cpu"])
    if world.device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], world.device)


def load_student(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    kernels: str = "reference",
) -> tuple[Student, dict[str, Any]]:
    """The student in a checkpoint, and the checkpoint's manifest; no process group is needed.

    Args:
        path: A checkpoint, or a run's folder for its newest one.
        device: Where to put the student.
        dtype: Of its weights; as trained unless given.
        kernels: Implementation of the student's hot paths.

    Raises:
        CheckpointError: If there is no complete checkpoint at `path`, or it is damaged.
        RunError: If there is no such device.
    """
    require_device(device)
    path = Path(path)
    path = latest_checkpoint(path) or path
    manifest = read_checkpoint_manifest(path)
    config = validate(StudentConfig, manifest["student"], source=f"{path}/{MANIFEST_NAME}")
    trained: torch.dtype = getattr(torch, manifest["dtype"])
    student = build_student(config, seed=0, device=device, dtype=dtype or trained, kernels=kernels)
    load_model_tensors(path, student.state_dict())
    return student, manifest
