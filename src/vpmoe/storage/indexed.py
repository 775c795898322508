"""Megatron's indexed dataset format (`.bin` + `.idx`), read and written without Megatron.

`.bin` holds the sequences end to end. `.idx` holds a header, each sequence's length and byte
offset, and the document boundaries; here one sequence is one document. The bytes equal those of
`megatron.core.datasets.indexed_dataset`, whose reader opens them; this one needs no torch, so that
dataset workers stay small and start fast.
"""

import hashlib
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vpmoe.errors import DataError
from vpmoe.storage.atomic import TEMPORARY_SUFFIX, publish, write_error

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5}
_CODES |= {"float64": 6, "float32": 7, "uint16": 8}
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}

Array = np.ndarray[Any, Any]


class IndexedWriter:
    """Writes `prefix.bin` and `prefix.idx`; neither has its name before `close`.

    Used as a context manager it closes on a clean exit and removes its temporary files otherwise.

    Args:
        prefix: Path without suffix, in an existing folder.
        dtype: Element type, one that Megatron's format names.

    Raises:
        DataError: If the type has no code in the format or the files cannot be written.
    """

    def __init__(self, prefix: Path, dtype: np.dtype | type) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in _CODES:
            raise DataError(
                f"the indexed format has no code for {self.dtype.name}",
                hint=f"use one of {', '.join(_CODES)}",
            )
        self._bin, self._idx = _paths(Path(prefix))
        self._temporary_bin = self._bin.with_name(self._bin.name + TEMPORARY_SUFFIX)
        self._temporary_idx = self._idx.with_name(self._idx.name + TEMPORARY_SUFFIX)
        self._lengths: list[Array] = []
        self._digest = hashlib.sha256()
        self.sha256: dict[str, str] = {}  # suffix -> hex digest, filled by `close`
        self.num_elements = 0
        try:
            self._file = self._temporary_bin.open("wb")
        except OSError as error:
            raise write_error(self._bin, error) from error

    def add(self, sequence: Array) -> None:
        """Append one sequence, which is one document."""
        self.add_many(sequence, np.array([sequence.size]))

    def add_many(self, flat: Array, lengths: Array) -> None:
        """Append sequences that lie end to end in `flat`.

        Raises:
            DataError: If the lengths do not add up to `flat`, or the disk is full.
        """
        if int(lengths.sum()) != flat.size:
            raise DataError(f"lengths add up to {lengths.sum()}, the sequences to {flat.size}")
        data = np.ascontiguousarray(flat, dtype=self.dtype).data
        try:
            self._file.write(data)
        except OSError as error:
            self.abort()
            raise write_error(self._bin, error) from error
        self._digest.update(data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.num_elements += flat.size

    def close(self) -> None:
        """Write the index, sync both files and give them their names, the index last.

        Raises:
            DataError: If the disk is full; nothing is left behind.
        """
        index = self._index_bytes()
        try:
            self._file.close()
            self._temporary_idx.write_bytes(index)
            publish(self._temporary_bin, self._bin)
            publish(self._temporary_idx, self._idx)
        except OSError as error:
            self.abort()
            raise write_error(self._bin, error) from error
        self.sha256 = {
            ".bin": self._digest.hexdigest(),
            ".idx": hashlib.sha256(index).hexdigest(),
        }

    def abort(self) -> None:
        """Drop everything written so far."""
        with suppress(OSError):  # the buffer of a full disk cannot be flushed, and need not be
            self._file.close()
        self._temporary_bin.unlink(missing_ok=True)
        self._temporary_idx.unlink(missing_ok=True)

    def _index_bytes(self) -> bytes:
        empty = np.empty(0, dtype=np.int32)
        lengths = np.concatenate([empty, *self._lengths])
        count = lengths.size
        offsets = np.zeros(count, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        code = _CODES[self.dtype.name]
        header = _HEADER.pack(_MAGIC, _VERSION, code, count, count + 1)
        documents = np.arange(count + 1, dtype=np.int64)
        offsets *= self.dtype.itemsize
        return header + lengths.tobytes() + offsets.tobytes() + documents.tobytes()

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class IndexedReader:
    """The sequences of `prefix.bin`, mapped into memory and read on demand.

    Attributes:
        lengths: Elements of each sequence.
        offsets: Where each sequence starts in `flat`, in elements.
        flat: All sequences end to end.

    Raises:
        DataError: If a file is missing, of another format, or its size and index disagree.
    """

    def __init__(self, prefix: Path) -> None:
        self._bin, self._idx = _paths(Path(prefix))
        try:
            index = np.fromfile(self._idx, dtype=np.uint8)
            num_bytes = self._bin.stat().st_size
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename or self._idx}: {error.strerror}",
                hint="rebuild the dataset",
            ) from error
        self.dtype, self.lengths, offsets, self.documents = self._parse(index)
        self.offsets = offsets // self.dtype.itemsize
        expected = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if num_bytes != expected:
            raise self._broken(f"{self._bin} has {num_bytes:,} bytes, its index says {expected:,}")
        # An empty file cannot be mapped.
        self.flat: Array = (
            np.memmap(self._bin, dtype=self.dtype, mode="r")
            if num_bytes
            else np.empty(0, dtype=self.dtype)
        )

    def _parse(self, index: Array) -> tuple[np.dtype, Array, Array, Array]:
        if index.size < _HEADER.size:
            raise self._broken(f"{self._idx} ends inside its header")
        magic, version, code, count, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != _VERSION or code not in _DTYPES:
            raise self._broken(f"{self._idx} is not an indexed dataset of version {_VERSION}")
        ends = np.cumsum([_HEADER.size, 4 * count, 8 * count, 8 * boundaries])
        if index.size != ends[-1]:
            raise self._broken(f"{self._idx} has {index.size:,} bytes instead of {ends[-1]:,}")
        lengths = index[ends[0] : ends[1]].copy().view(np.int32)
        offsets = index[ends[1] : ends[2]].copy().view(np.int64)
        documents = index[ends[2] : ends[3]].copy().view(np.int64)
        return _DTYPES[code], lengths, offsets, documents

    def _broken(self, what: str) -> DataError:
        return DataError(what, hint="the shard is incomplete or damaged; rebuild the dataset")

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, index: int) -> Array:
        begin = self.offsets[index]
        return self.flat[begin : begin + self.lengths[index]]


def _paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
