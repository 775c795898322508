"""One shard of a dataset: a range of rows in, indexed arrays and their tables out."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vpmoe.data.conversation import Conversation
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.layout import (
    ARRAYS,
    BUILD_FOLDER,
    REJECTS_SCHEMA,
    SAMPLES_SCHEMA,
    array_prefix,
    samples_path,
)
from vpmoe.data.oracle import Oracle
from vpmoe.data.source import METADATA_COLUMNS, InputFile, read_rows
from vpmoe.data.split import SPLITS, Split, id_hash, split_of
from vpmoe.data.structure import align_to_labels, read_structure
from vpmoe.data.synth import Reject, conversations_of
from vpmoe.data.table import Table
from vpmoe.data.tally import Tally
from vpmoe.data.truncate import truncate
from vpmoe.spans import Span
from vpmoe.storage.atomic import write_error
from vpmoe.storage.indexed import IndexedWriter
from vpmoe.storage.manifest import file_sha256, write_manifest

Progress = Callable[[int], None]  # called with the number of rows just done


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs to make one shard.

    Attributes:
        root: The dataset's folder.
        name: Such as "shard_00".
        inputs: All inputs of the dataset.
        begin: First row, counted over all inputs.
        end: One past the last row.
        duplicates: Numbers of rows to turn away because their id is taken.
        render: The `[render]` settings.
        seq_len: Most tokens of a document, end of text included.
        valid_parts: Held-out millionths.
        oracle_rows: How many rows to compare with the reference renderer.
        seed: Chooses those rows.
        fingerprint: Of everything that decides the shard's bytes.
    """

    root: Path
    name: str
    inputs: tuple[InputFile, ...]
    begin: int
    end: int
    duplicates: tuple[int, ...]
    render: RenderConfig
    seq_len: int
    valid_parts: int
    oracle_rows: int
    seed: int
    fingerprint: str

    @property
    def marker(self) -> Path:
        """The file whose presence says that the shard is done; it holds the shard's record."""
        return self.root / BUILD_FOLDER / f"{self.name}.json"

    @property
    def rejects(self) -> Path:
        """The rows of this shard that were turned away."""
        return self.root / BUILD_FOLDER / f"{self.name}_rejects.parquet"


@dataclass(slots=True)
class _Sample:
    row: int
    conversation: Conversation
    truncated: bool

    @property
    def metadata(self) -> tuple[str | None, ...]:
        return tuple(self.conversation.metadata.get(name) for name in METADATA_COLUMNS)


class _SplitWriter:
    """The arrays and the sample table of one split of a shard."""

    def __init__(self, task: ShardTask, split: Split, stack: ExitStack) -> None:
        self._prefixes = {a: array_prefix(task.root, split, task.name, a) for a in ARRAYS}
        self._writers = {a: IndexedWriter(self._prefixes[a], ARRAYS[a]) for a in ARRAYS}
        for writer in self._writers.values():
            stack.callback(writer.abort)
        self._table = Table(samples_path(task.root, split, task.name), SAMPLES_SCHEMA)
        stack.callback(self._table.abort)

    def add(
        self, flat: np.ndarray, spans: np.ndarray, lengths: np.ndarray, rows: Sequence[_Sample]
    ) -> None:
        self._writers["tokens"].add_many(flat, lengths)
        self._writers["span"].add_many(spans, lengths)
        self._writers["lossmask"].add_many((spans != Span.IGNORE).astype(np.uint8), lengths)
        begins = np.cumsum(lengths) - lengths
        reasoning = np.add.reduceat(spans == Span.REASONING, begins, dtype=np.int32).tolist()
        final = np.add.reduceat(spans == Span.FINAL, begins, dtype=np.int32).tolist()
        first = self._table.num_rows
        self._table.extend(
            [
                (first + i, s.conversation.sample_id, s.row, *numbers, s.truncated, *s.metadata)
                for i, (s, *numbers) in enumerate(
                    zip(rows, lengths.tolist(), reasoning, final, strict=True)
                )
            ]
        )

    def close(self) -> dict[str, dict[str, Any]]:
        """Give all files their names, and say their sizes and hashes; nothing if there are none."""
        if not self._table.num_rows:
            return {}
        self._table.close()
        files = {}
        for array, writer in self._writers.items():
            writer.close()
            for suffix, digest in writer.sha256.items():
                path = self._prefixes[array].with_name(self._prefixes[array].name + suffix)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        path = self._table.path
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        return files


class _ShardBuilder:
    """The state of a shard while its rows go by."""

    def __init__(self, task: ShardTask, stack: ExitStack) -> None:
        self.task = task
        self.tally = Tally()
        self.duplicates = frozenset(task.duplicates)
        self.renderer = Renderer(task.render)
        self.oracle = Oracle(self.renderer, task)
        self.rejects = Table(task.rejects, REJECTS_SCHEMA)
        stack.callback(self.rejects.abort)
        self.writers = {split: _SplitWriter(task, split, stack) for split in SPLITS}

    def add_batch(self, first_row: int, batch: pa.RecordBatch) -> None:
        """Render, cut, check, split and write the rows of one batch."""
        samples: list[_Sample] = []
        rejects: list[Reject] = []
        for found in conversations_of(batch, first_row, duplicates=self.duplicates):
            if isinstance(found, Reject):
                rejects.append(found)
            else:
                samples.append(_Sample(*found, truncated=False))
        documents, samples = self._render(samples, rejects)
        if samples:
            self._write(documents, samples, rejects)
        self.rejects.extend([(r.row, r.sample_id, r.reason) for r in rejects])
        self.tally.rejects.update(r.reason for r in rejects)

    def _render(
        self, samples: list[_Sample], rejects: list[Reject]
    ) -> tuple[list[np.ndarray], list[_Sample]]:
        block = self.renderer.block([s.conversation for s in samples])
        for index, reason in block.failed.items():
            rejects.append(_reject(samples[index], reason))
        documents, kept = [], []
        begins = np.cumsum(block.lengths) - block.lengths
        for index, begin, length in zip(block.kept, begins, block.lengths, strict=True):
            sample, document = samples[index], block.flat[begin : begin + length]
            self.oracle.check(sample.row, sample.conversation, document)
            if length > self.task.seq_len:
                cut = truncate(document, self.task.seq_len)
                if cut.tokens is None:
                    rejects.append(_reject(sample, cut.reason or ""))
                    continue
                self.oracle.check_parses(sample.row, sample.conversation, cut.tokens)
                self.tally.cuts.update([*cut.cuts, "rows"])
                document, sample.truncated = cut.tokens, True
            documents.append(document)
            kept.append(sample)
        return documents, kept

    def _write(
        self, documents: list[np.ndarray], samples: list[_Sample], rejects: list[Reject]
    ) -> None:
        lengths = np.array([d.size for d in documents], dtype=np.int64)
        flat = np.concatenate(documents)
        structure = read_structure(flat, lengths)
        spans = align_to_labels(structure.span_ids, lengths)
        parts = self.task.valid_parts
        splits = [split_of(id_hash(s.conversation.sample_id), parts) for s in samples]
        for index in structure.problems:
            rejects.append(_reject(samples[index], "does_not_round_trip"))
            splits[index] = ""
        for split in SPLITS:
            chosen = np.array([s == split for s in splits])
            if not chosen.any():
                continue
            rows = [s for s, is_chosen in zip(samples, chosen, strict=True) if is_chosen]
            mask = np.repeat(chosen, lengths)
            own_spans = spans[mask]
            self.writers[split].add(flat[mask], own_spans, lengths[chosen], rows)
            metadata = [s.conversation.metadata for s in rows]
            self.tally.add_documents(split, lengths[chosen], own_spans, metadata)


def _reject(sample: _Sample, reason: str) -> Reject:
    return Reject(sample.row, sample.conversation.sample_id, reason)


def build_shard(task: ShardTask, progress: Progress) -> dict[str, Any]:
    """The record of one shard: its files, their hashes and its tally. Makes it unless it is done.

    A shard is done when its marker is there, was made by the same settings, and every file it
    names still has its hash.

    Raises:
        DataError: If an input cannot be read, the oracle disagrees, or a file cannot be written;
            no half-written file keeps its name.
    """
    done = finished_record(task)
    if done is not None:
        progress(task.end - task.begin)
        return done
    with ExitStack() as stack:
        try:
            for split in SPLITS:
                (task.root / split).mkdir(exist_ok=True)
            builder = _ShardBuilder(task, stack)
            for first_row, batch in read_rows(task.inputs, task.begin, task.end):
                builder.add_batch(first_row, batch)
                progress(batch.num_rows)
            builder.rejects.close()
            files = {split: builder.writers[split].close() for split in SPLITS}
        except OSError as error:
            raise write_error(task.root, error) from error
    record = {
        "name": task.name,
        "fingerprint": task.fingerprint,
        "begin": task.begin,
        "end": task.end,
        "files": files,
        "oracle_rows": builder.oracle.num_checked,
        "rejects_sha256": file_sha256(task.rejects),
        "tally": builder.tally.to_json(),
    }
    write_manifest(task.marker, record)
    return record


def finished_record(task: ShardTask) -> dict[str, Any] | None:
    """The record of a shard that an earlier, interrupted build finished; None if it did not."""
    try:
        record = json.loads(task.marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if record["fingerprint"] != task.fingerprint:
        return None
    for split in SPLITS:
        for name, facts in record["files"][split].items():
            path = task.root / split / name
            if not path.is_file() or file_sha256(path) != facts["sha256"]:
                return None
    if not task.rejects.is_file() or file_sha256(task.rejects) != record["rejects_sha256"]:
        return None
    return record
