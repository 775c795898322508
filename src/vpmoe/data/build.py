"""Rows in, a dataset out: shards, rejects and a manifest, resumable by shard."""

import fcntl
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from vpmoe import __version__
from vpmoe.config import Config, difference, fingerprint, resolved
from vpmoe.data.duplicates import duplicate_rows
from vpmoe.data.harmony import RenderConfig
from vpmoe.data.layout import (
    BUILD_FOLDER,
    LOCK_FILE,
    REJECTS_FILE,
    REJECTS_SCHEMA,
    SCHEMA_VERSION,
    shard_name,
)
from vpmoe.data.o200k import TokenizerIdentity, renderer_version
from vpmoe.data.shard import ShardTask, build_shard
from vpmoe.data.source import InputFile, find_inputs
from vpmoe.data.split import SPLIT_RULE, SPLITS, valid_parts
from vpmoe.data.tally import Tally
from vpmoe.errors import DataError
from vpmoe.storage.atomic import atomic_path, write_error
from vpmoe.storage.manifest import (
    MANIFEST_NAME,
    file_sha256,
    provenance,
    read_manifest,
    write_manifest,
)
from vpmoe.storage.processes import die_with_parent

Progress = Callable[[int, int], None]  # called with (rows done, rows in all)

_ROWS_PER_SHARD = 100_000
_PLAN_FILE = "plan.json"
_POLL_S = 0.2
_NOT_IN_FINGERPRINT = ("input", "output", "workers")  # they do not change a byte of the shards

_counter: Any = None  # rows done by all workers together; set in each worker as it starts


class DataConfig(Config):
    """One dataset: which rows, rendered how, split and stored how."""

    kind: Literal["data"] = "data"

    input: str
    """A parquet file, a folder of them, a glob, or a `hf://` URL of any of these."""

    output: Path
    """Folder of the dataset."""

    seq_len: int = Field(default=2048, ge=16)
    """Most tokens of a conversation, end of text included; longer ones are cut by rule."""

    valid_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of rows held out, by the hash of their id."""

    workers: int = Field(default=1, ge=1)
    """Processes; the result does not depend on it."""

    shards: int = Field(default=0, ge=0)
    """Shards of each split; 0 makes one for every 100,000 rows."""

    limit: int = Field(default=0, ge=0)
    """Use only the first so many rows; 0 uses all."""

    seed: int = Field(default=0, ge=0)
    """Chooses the rows that are compared with the reference renderer."""

    oracle_rows: int = Field(default=32, ge=0)
    """Rows of each shard that are compared with the reference renderer."""

    source: str = ""
    """Where the rows come from, in words, for the manifest."""

    license: str = ""
    """Under which terms, in words, for the manifest."""

    render: RenderConfig = RenderConfig()
    """What stands before the user's message."""


def build_dataset(
    config: DataConfig, *, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """The manifest of the dataset, after making whatever of it is not there yet.

    An interrupted build goes on with the first shard that is not done. The same rows, config and
    tokenizer give the same bytes, however many workers and interruptions.

    Args:
        config: What to build.
        overwrite: Whether to replace a dataset, finished or not, that is in the way.
        progress: Told how many rows are done, now and then.

    Raises:
        DataError: If inputs, output or disk are not fit; what was finished is kept for a resume.
    """
    root = config.output
    with _held(root):
        _make_way(root, overwrite=overwrite)
        inputs = find_inputs(config.input)
        num_rows = sum(item.num_rows for item in inputs)
        num_rows = min(num_rows, config.limit or num_rows)
        if num_rows == 0:
            raise DataError(f"{config.input} has no rows", hint="give an input with rows")
        settings = _settings(config, inputs)
        _check_plan(root, settings)
        tasks = _plan(config, inputs, num_rows, fingerprint(settings))
        report = progress or (lambda done, total: None)
        run = _run_here if config.workers == 1 else _run_in_processes
        records = run(tasks, config.workers, lambda done: report(done, num_rows))
        try:
            _merge_rejects(root, tasks)
        except OSError as error:
            raise write_error(root / REJECTS_FILE, error) from error
        manifest = _manifest(config, inputs, settings, records)
        write_manifest(root / MANIFEST_NAME, manifest)
        shutil.rmtree(root / BUILD_FOLDER)
    return manifest


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """Hold the output folder; the kernel lets go of it however the process ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK_FILE).open("a")
    except OSError as error:
        raise write_error(root, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another build is writing to {root}", hint="wait for it, or choose another output"
            ) from None
        yield


def _make_way(root: Path, *, overwrite: bool) -> None:
    """Refuse or clear what is in the way; an unfinished build is left for the resume."""
    finished = (root / MANIFEST_NAME).exists()
    known = {MANIFEST_NAME, BUILD_FOLDER, LOCK_FILE, REJECTS_FILE, *SPLITS}
    strange = sorted(p.name for p in root.iterdir() if p.name not in known)
    if strange:
        raise DataError(
            f"{root} holds {strange[0]}, which is no part of a dataset",
            hint="choose an empty folder as output",
        )
    if finished and not overwrite:
        raise DataError(
            f"{root} is a finished dataset", hint="choose another output, or pass --overwrite"
        )
    if overwrite:
        (root / MANIFEST_NAME).unlink(missing_ok=True)  # first: what is left is no dataset
        (root / REJECTS_FILE).unlink(missing_ok=True)
        for name in (BUILD_FOLDER, *SPLITS):
            shutil.rmtree(root / name, ignore_errors=True)


def _settings(config: DataConfig, inputs: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that decides the bytes of the shards."""
    tree = {k: v for k, v in resolved(config).items() if k not in _NOT_IN_FINGERPRINT}
    return {
        "config": tree,
        "inputs": {str(i): item.manifest_entry() for i, item in enumerate(inputs)},
        "tokenizer": asdict(TokenizerIdentity()),
        "renderer": renderer_version(),
        "code": {"schema": SCHEMA_VERSION, "vpmoe": __version__},
    }


def _check_plan(root: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings in a new build; compare with those of one that is being resumed.

    Raises:
        DataError: If the unfinished build in the folder was begun with other settings.
    """
    path = root / BUILD_FOLDER / _PLAN_FILE
    if path.exists():
        changes = difference(read_manifest(path), settings)
        if changes:
            raise DataError(
                f"{root} holds an unfinished build with other settings: {'; '.join(changes[:3])}",
                hint="undo the change to go on with it, or pass --overwrite to start afresh",
            )
        return
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error) from error
    write_manifest(path, settings)


def _plan(
    config: DataConfig, inputs: Sequence[InputFile], num_rows: int, build_fingerprint: str
) -> list[ShardTask]:
    """Even, contiguous ranges of rows, one for each shard."""
    num_shards = min(config.shards or -(-num_rows // _ROWS_PER_SHARD), num_rows)
    duplicates = duplicate_rows(inputs, num_rows)
    tasks = []
    for index in range(num_shards):
        begin, end = (num_rows * i // num_shards for i in (index, index + 1))
        mine = duplicates[np.searchsorted(duplicates, begin) : np.searchsorted(duplicates, end)]
        tasks.append(
            ShardTask(
                root=config.output,
                name=shard_name(index, num_shards),
                inputs=tuple(inputs),
                begin=begin,
                end=end,
                duplicates=tuple(mine.tolist()),
                render=config.render,
                seq_len=config.seq_len,
                valid_parts=valid_parts(config.valid_fraction),
                oracle_rows=config.oracle_rows,
                seed=config.seed,
                fingerprint=build_fingerprint,
            )
        )
    return tasks


def _run_here(
    tasks: Sequence[ShardTask], workers: int, report: Callable[[int], None]
) -> list[dict[str, Any]]:
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        report(done)

    return [build_shard(task, advance) for task in tasks]


def _run_in_processes(
    tasks: Sequence[ShardTask], workers: int, report: Callable[[int], None]
) -> list[dict[str, Any]]:
    # Not forked: the tokenizer and arrow hold threads and locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), context, initializer=_start_worker, initargs=(counter,)
    )
    with pool:
        futures = [pool.submit(_work, task) for task in tasks]
        try:
            waiting: set[Future[dict[str, Any]]] = set(futures)
            while waiting:
                finished, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
                for future in finished:
                    future.result()  # a failed shard ends the build at once
                report(counter.value)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, perhaps for want of memory",
                hint="run the build again with fewer workers; finished shards are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    die_with_parent()  # the lock is free then, and a resumed build may start


def _work(task: ShardTask) -> dict[str, Any]:
    def advance(rows: int) -> None:
        with _counter.get_lock():
            _counter.value += rows

    return build_shard(task, advance)


def _merge_rejects(root: Path, tasks: Sequence[ShardTask]) -> None:
    with (
        atomic_path(root / REJECTS_FILE) as temporary,
        pq.ParquetWriter(str(temporary), REJECTS_SCHEMA, compression="zstd") as writer,
    ):
        for task in tasks:
            for batch in pq.ParquetFile(task.rejects).iter_batches():
                writer.write_batch(batch)


def _manifest(
    config: DataConfig,
    inputs: Sequence[InputFile],
    settings: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    tally = Tally()
    for record in records:
        tally.add(Tally.from_json(record["tally"]))
    if not any(tally.rows.values()):
        worst = ", ".join(f"{reason} ({n})" for reason, n in tally.rejects.most_common(3))
        raise DataError(
            f"every row of {config.input} was turned away: {worst}", hint="look at the input"
        )
    return {
        "schema_version": SCHEMA_VERSION,
        **provenance(),
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "config": resolved(config),
        "tokenizer": settings["tokenizer"],
        "renderer": settings["renderer"],
        "inputs": [item.manifest_entry() for item in inputs],
        "num_input_rows": records[-1]["end"],
        "source": config.source,
        "license": config.license,
        "split_rule": SPLIT_RULE,
        "splits": {split: _shards(split, records) for split in SPLITS},
        "oracle_rows": sum(record["oracle_rows"] for record in records),
        "rejects_sha256": file_sha256(config.output / REJECTS_FILE),
        **tally.to_json(),
    }


def _shards(split: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, counts and files of each shard that has sequences in this split."""
    return [
        {
            "name": record["name"],
            "rows": record["tally"]["rows"][split],
            "tokens": record["tally"]["tokens"][split],
            "files": record["files"][split],
        }
        for record in records
        if record["files"][split]
    ]
