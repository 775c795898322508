"""One file of a target store: what the teacher said about a slice of the selected samples."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.storage.atomic import TEMPORARY_SUFFIX, publish, write_error
from vpmoe.storage.manifest import file_sha256
from vpmoe.teachers.codecs import Codec, CodecConfig
from vpmoe.teachers.codecs.ranking import Ranking

_CODECS: TypeAdapter[Any] = TypeAdapter(CodecConfig)

# Arrow files are mapped, not read, so a store larger than memory can be used.
_FIELDS = [
    ("sample_id", pa.string()),
    ("num_labels", pa.int32()),  # length of the document, its end included
    ("run_starts", pa.list_(pa.int32())),  # runs of labels of one span, in order
    ("run_lengths", pa.list_(pa.int32())),
    ("run_spans", pa.list_(pa.uint8())),
    ("logprobs", pa.list_(pa.float16())),  # of the labels of all runs, one after the other
]
_CODES = pa.large_list(pa.uint8())  # each of the codec's columns, named after it
_PREFIX = "codes."
_HEADER, _RANKING = b"vpmoe", b"ranking"  # the schema's metadata: JSON, and the ranking's bytes
RANKING_SHA256 = "ranking_sha256"  # in the header, where the codec names ids by their rank
_DIGITS = 16  # of the file's sha256, in its name
_NAME = re.compile(rf"targets-(\d+)-[0-9a-f]{{{_DIGITS}}}\.arrow")
_LOWEST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class SampleTargets:
    """What a teacher said about one document.

    Attributes:
        sample_id: Its row in the dataset.
        span_ids: `Span` of each label of the document, uint8.
        logprobs: Of the labels whose span is not ignored, in order, nats.
        codes: Distributions at these labels: the codec's columns, each uint8.
    """

    sample_id: str
    span_ids: np.ndarray
    logprobs: np.ndarray
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)


def codec_of(header: Mapping[str, Any], ranking: Ranking | None = None) -> Codec:
    """The codec that a header names; a header without one is of log-probs alone.

    Args:
        header: Of a shard or a store.
        ranking: Of the ids, as kept beside the header; without it a codec that needs one says how
            it was set, and packs and unpacks nothing.

    Raises:
        DataError: If this version has no such codec, or the ranking is not the header's.
    """
    settings = header.get("codec", {"kind": "logprob"})
    try:
        codec = _CODECS.validate_python(settings).build()
    except ValueError as error:
        raise DataError(
            f"targets were written with a codec that this version does not have: {settings}",
            hint="read them with the version that wrote them, or score again",
        ) from error
    if not codec.by_rank or ranking is None:
        return codec
    if ranking.sha256 != header.get(RANKING_SHA256):
        raise DataError(
            f"targets were written with the ranking {header.get(RANKING_SHA256)} of the ids, "
            f"and {ranking.sha256} is beside them",
            hint="score again",
        )
    return codec.ranked_by(ranking)


def _complete(header: Mapping[str, Any], ranking: Ranking | None) -> Codec:
    """The codec as it packs and unpacks."""
    codec = codec_of(header, ranking)
    if codec.by_rank and ranking is None:
        raise DataError(
            "targets that name ids by their rank need the ranking beside them", hint="score again"
        )
    return codec


def _schema(codec: Codec) -> pa.Schema:
    return pa.schema([*_FIELDS, *((_PREFIX + name, _CODES) for name in codec.columns)])


def shard_files(folder: Path) -> dict[int, Path]:
    """The complete shards of a store by index; a shard has its name only once it is whole."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("targets-*-*.arrow")):
        named = _NAME.fullmatch(path.name)
        if named is None:
            continue  # somebody else's file
        index = int(named[1])
        if index in found:
            raise DataError(
                f"{folder} holds two shards {index}: {found[index].name} and {path.name}",
                hint="delete both and score again; the other shards are kept",
            )
        found[index] = path
    return found


def remove_temporaries(folder: Path) -> None:
    """Delete what an interrupted writer left behind."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink()


def write_shard(
    folder: Path,
    index: int,
    samples: Sequence[SampleTargets],
    header: Mapping[str, Any],
    ranking: Ranking | None = None,
) -> Path:
    """A new shard file: written under a temporary name, synced, named by its own hash.

    Args:
        folder: Of the store.
        index: Which slice of the selection it holds.
        samples: In the order of the selection.
        header: Teacher, dataset and effort; kept inside the file, so that it explains itself.
        ranking: Of the ids, where the codec needs one; kept inside the file for the same reason.

    Raises:
        DataError: If the disk is full or the folder cannot be written, or the codec needs a
            ranking that is not given.
    """
    table = _table(samples, header, ranking)
    temporary = folder / f"targets-{index:05d}.arrow{TEMPORARY_SUFFIX}"
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        digest = file_sha256(temporary)
        path = folder / f"targets-{index:05d}-{digest[:_DIGITS]}.arrow"
        publish(temporary, path)
    except OSError as error:
        raise write_error(temporary, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def is_named_by(path: Path, digest: str) -> bool:
    """Whether a shard's name carries `digest`, the hash of the bytes it was published with."""
    return path.stem.endswith(f"-{digest[:_DIGITS]}")


def require_whole(path: Path) -> str:
    """SHA-256 of a shard whose bytes are those that were written.

    Raises:
        DataError: If a single byte differs.
    """
    digest = file_sha256(path)
    if not is_named_by(path, digest):
        raise DataError(
            f"target shard {path} is damaged: its sha256 begins with {digest[:_DIGITS]}",
            hint="delete that file and run vpmoe score again; the other shards are kept",
        )
    return digest


def header_of(path: Path) -> dict[str, Any]:
    """What a shard says of itself, whichever version wrote it.

    Raises:
        DataError: If it is not a target shard.
    """
    return json.loads(_read(path).schema.metadata[_HEADER])


def _read(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read target shard {path}: {error}") from error
    if _HEADER not in (table.schema.metadata or {}):
        raise DataError(f"{path} is not a target shard", hint="score again")
    return table


class Shard:
    """A complete shard, mapped into memory.

    Args:
        path: Its file.

    Raises:
        DataError: If it is not a target shard.
    """

    def __init__(self, path: Path) -> None:
        table = _read(path)
        metadata = table.schema.metadata
        self.header: dict[str, Any] = json.loads(metadata[_HEADER])
        self._ranking = metadata.get(_RANKING)
        ranking = None if self._ranking is None else Ranking.from_bytes(self._ranking)
        self.codec = _complete(self.header, ranking)
        if not table.schema.equals(_schema(self.codec), check_metadata=False):
            raise DataError(f"{path} is not a target shard of this version", hint="score again")
        columns = table.combine_chunks()
        self.sample_ids: list[str] = columns["sample_id"].to_pylist()
        self._num_labels = columns["num_labels"].to_numpy()
        self._runs, self._starts = _lists(columns["run_starts"])
        self._run_lengths = _lists(columns["run_lengths"])[1]
        self._run_spans = _lists(columns["run_spans"])[1]
        self._offsets, self.values = _lists(columns["logprobs"])
        self._codes = {name: _lists(columns[_PREFIX + name]) for name in self.codec.columns}

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes, log-probs left out."""
        return sum(len(data) for _, data in self._codes.values())

    @property
    def ranking_bytes(self) -> int:
        """Bytes of the ranking of the ids that the codec names them by."""
        return 0 if self._ranking is None else len(self._ranking)

    def num_trained(self, row: int) -> int:
        """Labels of a document that the teacher was asked about."""
        return int(self._offsets[row + 1] - self._offsets[row])

    def codes(self, row: int) -> dict[str, np.ndarray]:
        """The codec's columns of a document."""
        return {
            name: data[offsets[row] : offsets[row + 1]]
            for name, (offsets, data) in self._codes.items()
        }

    @property
    def value_spans(self) -> np.ndarray:
        """`Span` of each stored log-prob."""
        return np.repeat(self._run_spans, self._run_lengths)

    @property
    def sample_means(self) -> np.ndarray:
        """Mean log-prob of each sample, float64, nats."""
        counts = np.diff(self._offsets)
        sums = np.add.reduceat(self.values.astype(np.float64), self._offsets[:-1])
        return sums / counts

    def aligned(self, row: int) -> np.ndarray:
        """float16 log-probs at the labels of a document; 0 where the span is ignored."""
        out = np.zeros(self._num_labels[row], dtype=np.float16)
        begin = self._offsets[row]
        for run in range(self._runs[row], self._runs[row + 1]):
            start, length = self._starts[run], self._run_lengths[run]
            out[start : start + length] = self.values[begin : begin + length]
            begin += length
        return out

    def span_ids(self, row: int) -> np.ndarray:
        """`Span` of each label of a document, as it was when the teacher scored it."""
        out = np.full(self._num_labels[row], Span.IGNORE, dtype=np.uint8)
        for run in range(self._runs[row], self._runs[row + 1]):
            start = self._starts[run]
            out[start : start + self._run_lengths[run]] = self._run_spans[run]
        return out


def _lists(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists."""
    if column.num_chunks == 0:
        return np.zeros(1, dtype=np.int32), np.empty(0, column.type.value_type.to_pandas_dtype())
    array = column.chunk(0)
    return array.offsets.to_numpy(), array.values.to_numpy()


def _table(
    samples: Sequence[SampleTargets], header: Mapping[str, Any], ranking: Ranking | None
) -> pa.Table:
    codec = _complete(header, ranking)
    runs = [_runs_of(sample) for sample in samples]
    counts = [len(starts) for starts, _, _ in runs]
    lengths = [len(sample.logprobs) for sample in samples]
    logprobs = np.concatenate([s.logprobs for s in samples]).clip(_LOWEST, 0.0).astype(np.float16)
    arrays = [
        pa.array([sample.sample_id for sample in samples], pa.string()),
        pa.array([len(sample.span_ids) for sample in samples], pa.int32()),
        *(
            _list_array(counts, np.concatenate([run[k] for run in runs]).astype(dtype))
            for k, dtype in enumerate((np.int32, np.int32, np.uint8))
        ),
        _list_array(lengths, logprobs),
        *(_code_array([sample.codes[name] for sample in samples]) for name in codec.columns),
    ]
    metadata = {_HEADER: json.dumps(header, sort_keys=True, ensure_ascii=False).encode()}
    if ranking is not None:
        metadata[_RANKING] = ranking.to_bytes()
    return pa.table(arrays, schema=_schema(codec).with_metadata(metadata))


def _list_array(counts: Sequence[int], values: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _code_array(parts: Sequence[np.ndarray]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts)))


def _runs_of(sample: SampleTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, lengths and spans of the maximal runs of one trained span."""
    spans = np.asarray(sample.span_ids, dtype=np.uint8)
    edges = np.flatnonzero(np.diff(spans)) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [len(spans)]]))
    trained = spans[starts] != Span.IGNORE
    if lengths[trained].sum() != len(sample.logprobs) or not trained.any():
        raise DataError(
            f"sample {sample.sample_id} has {lengths[trained].sum()} trained labels and "
            f"{len(sample.logprobs)} log-probs"
        )
    return starts[trained], lengths[trained], spans[starts][trained]
