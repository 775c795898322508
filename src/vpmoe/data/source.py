"""Parquet inputs: which files, what is in them, and every row of them in order."""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from vpmoe.errors import DataError

ID_COLUMN = "synth_id"
TEXT_COLUMNS = ("query", "synthetic_reasoning", "synthetic_answer")
MESSAGES_COLUMN = "messages_json"
METADATA_COLUMN = "metadata_json"
METADATA_COLUMNS = (
    "language",
    "exercise",
    "model",
    "constraints",
    "seed_license",
    "query_seed_url",
)
_READ_BUFFER_BYTES = 1 << 20
_REMOTE = "://"


@dataclass(frozen=True)
class InputFile:
    """One parquet file, as it was when the build began.

    Attributes:
        path: Local path or URL.
        num_rows: Rows in it.
        size: Bytes.
        sha256: Of its bytes.
        columns: Those of the columns we use that it has.
    """

    path: str
    num_rows: int
    size: int
    sha256: str
    columns: tuple[str, ...]

    @property
    def has_messages(self) -> bool:
        """Whether its rows are conversations already (schema `synth_harmony_v1`)."""
        return MESSAGES_COLUMN in self.columns

    def manifest_entry(self) -> dict[str, Any]:
        """Name, size and hash; the folder is left out, so that moving inputs changes nothing."""
        entry = asdict(self)
        return {
            "name": Path(self.path).name,
            **{k: entry[k] for k in ("num_rows", "size", "sha256")},
        }


def find_inputs(pattern: str) -> list[InputFile]:
    """The parquet files that `pattern` names, sorted by path.

    Args:
        pattern: A file, a folder (its `*.parquet`), a glob, or a `hf://` URL of any of these.

    Raises:
        DataError: If nothing matches, or a file is unreadable, no parquet, or lacks a column.
    """
    paths = _remote_paths(pattern) if _REMOTE in pattern else _local_paths(pattern)
    if not paths:
        raise DataError(f"no parquet files at {pattern}", hint="give a file, a folder or a glob")
    return [_inspect(path) for path in paths]


def _local_paths(pattern: str) -> list[str]:
    path = Path(pattern)
    try:
        if path.is_dir():
            return sorted(str(p) for p in path.iterdir() if p.suffix == ".parquet")
        return [pattern] if path.exists() else _glob(pattern)
    except OSError as error:
        raise _unreadable(pattern, error) from error


def _glob(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207, Path.glob has no absolute form


def _remote_paths(pattern: str) -> list[str]:
    try:
        files, base = url_to_fs(pattern)
        protocol = pattern.split(_REMOTE)[0]
        found = (
            files.glob(f"{base.rstrip('/')}/*.parquet") if files.isdir(base) else files.glob(base)
        )
    except ImportError as error:
        raise DataError(f"cannot read {pattern}: {error}", hint="pip install fsspec") from error
    except (*_transport_errors(pattern), ValueError) as error:
        raise _unreadable(pattern, error) from error
    return sorted(f"{protocol}{_REMOTE}{name}" for name in found)


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a local file or URL.

    Raises:
        DataError: If it cannot be opened or read.
    """
    try:
        with fsspec.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except pa.ArrowException as error:
        raise _broken(path, error) from error
    except OSError as error:
        # Arrow reports damaged pages as OSError without an error number.
        raise (_unreadable(path, error) if error.errno else _broken(path, error)) from error
    except _transport_errors(path) as error:
        raise _unreadable(path, error) from error


def _transport_errors(path: str) -> tuple[type[Exception], ...]:
    """What the client behind a path or URL raises when files or the network fail it."""
    if not path.startswith("hf://"):
        return (OSError,)
    from huggingface_hub.errors import HfHubHTTPError  # heavy, and only remote inputs need it

    # The hub's HTTP library changes between versions; its base error is a base of the hub's own.
    return (HfHubHTTPError, *HfHubHTTPError.__bases__)


def _inspect(path: str) -> InputFile:
    with open_input(path) as file:
        digest = hashlib.sha256()
        size = 0
        while chunk := file.read(_READ_BUFFER_BYTES):
            digest.update(chunk)
            size += len(chunk)
        if size == 0:
            raise DataError(f"{path} is empty (0 bytes)", hint="fetch it again")
        file.seek(0)
        parquet = pq.ParquetFile(file)
        columns = _check_schema(path, parquet.schema_arrow)
        return InputFile(path, parquet.metadata.num_rows, size, digest.hexdigest(), columns)


def _check_schema(path: str, schema: pa.Schema) -> tuple[str, ...]:
    needed = (ID_COLUMN, *TEXT_COLUMNS)
    if MESSAGES_COLUMN in schema.names:
        # Rendered conversations may keep their id among the metadata.
        has_id = ID_COLUMN in schema.names or METADATA_COLUMN not in schema.names
        needed = (ID_COLUMN if has_id else METADATA_COLUMN, MESSAGES_COLUMN)
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(schema.names)}",
            hint=f"rename or add it: needed are {', '.join(needed)}",
        )
    used = list(needed)
    carried = (METADATA_COLUMN, *METADATA_COLUMNS)
    used += [name for name in carried if name in schema.names and name not in used]
    for name in used:
        kind = schema.field(name).type
        if not _is_text(kind):
            raise DataError(
                f"{path}: column {name} holds {kind}, not text",
                hint=f"cast {name} to string before the build",
            )
    return tuple(used)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.types.is_null(kind) or any(is_kind(kind) for is_kind in text)


def read_rows(
    inputs: Sequence[InputFile],
    begin: int,
    end: int,
    *,
    columns: Sequence[str] | None = None,
    batch_size: int = 512,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of rows `begin` to `end`, counted over all inputs, each with its first row's number.

    Row groups outside the range are not read, and pages are streamed: memory does not grow with
    the size of a file or of a row group.

    Args:
        inputs: From `find_inputs`.
        begin: First row.
        end: One past the last row.
        columns: Only these, where a file has them; all that a file has if None.
        batch_size: Most rows in a batch.

    Raises:
        DataError: If a file cannot be read or has changed its number of rows.
    """
    first = 0
    for item in inputs:
        low, high = max(begin - first, 0), min(end - first, item.num_rows)
        if low < high:
            wanted = [c for c in item.columns if columns is None or c in columns]
            for row, batch in _read_file(item, low, high, wanted, batch_size):
                yield first + row, batch
        first += item.num_rows


def _read_file(
    item: InputFile, low: int, high: int, columns: Sequence[str], batch_size: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    with open_input(item.path) as file:
        parquet = pq.ParquetFile(file, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
        if parquet.metadata.num_rows != item.num_rows:
            raise DataError(f"{item.path} changed during the build", hint="run the build again")
        groups, row = _groups(parquet.metadata, low, high)
        for batch in parquet.iter_batches(
            batch_size=batch_size, row_groups=groups, columns=list(columns), use_threads=False
        ):
            begin, end = max(low - row, 0), min(high - row, batch.num_rows)
            if begin < end:
                yield row + begin, batch.slice(begin, end - begin)
            row += batch.num_rows
            if row >= high:
                return


def _groups(metadata: pq.FileMetaData, low: int, high: int) -> tuple[list[int], int]:
    """Row groups that hold rows `low` to `high`, and the number of the first row in them."""
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    ends, total = [], 0
    for size in sizes:
        total += size
        ends.append(total)
    groups = [i for i, e in enumerate(ends) if e > low and e - sizes[i] < high]
    return groups, ends[groups[0]] - sizes[groups[0]]


def _unreadable(path: str, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    hint = "check the network" if _REMOTE in path else "check the path and its permissions"
    return DataError(f"cannot read {path}: {' '.join(str(reason).split())[:160]}", hint=hint)


def _broken(path: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:160]
    return DataError(
        f"{path} is not whole parquet: {reason}", hint="fetch it again, or leave it out"
    )
