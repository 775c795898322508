"""Rows whose id an earlier row has already."""

from collections.abc import Iterator, Sequence

import numpy as np

from vpmoe.data.conversation import text_problem
from vpmoe.data.source import ID_COLUMN, METADATA_COLUMN, InputFile, read_rows
from vpmoe.data.split import id_hash
from vpmoe.data.synth import ids_of

_HASHES_AT_ONCE = 1 << 25  # 256 MiB of 64-bit hashes; longer inputs are scanned in several passes
_IDS_AT_ONCE = 1 << 14


def duplicate_rows(inputs: Sequence[InputFile], num_rows: int) -> np.ndarray:
    """Sorted numbers of the rows to turn away because an earlier row has the same id.

    The first of equal ids stays: target stores are keyed by id, so the others would be trained
    towards the wrong targets. Memory is bounded by `_HASHES_AT_ONCE` and the number of duplicates.

    Args:
        inputs: From `source.find_inputs`.
        num_rows: Rows that the build will use, from the first.
    """
    passes = max(1, -(-num_rows // _HASHES_AT_ONCE))
    suspects = [_repeated_hashes(inputs, num_rows, part, passes) for part in range(passes)]
    repeated = np.sort(np.concatenate(suspects))
    if not repeated.size:
        return np.empty(0, dtype=np.int64)
    seen: set[str] = set()
    duplicates: list[int] = []
    for row, sample_id, hashed in _hashed_ids(inputs, num_rows):
        place = int(np.searchsorted(repeated, np.uint64(hashed)))
        if place < repeated.size and repeated[place] == hashed:
            if sample_id in seen:
                duplicates.append(row)
            seen.add(sample_id)
    return np.array(duplicates, dtype=np.int64)


def _repeated_hashes(
    inputs: Sequence[InputFile], num_rows: int, part: int, passes: int
) -> np.ndarray:
    """The hashes with remainder `part` that occur more than once."""
    ids = _hashed_ids(inputs, num_rows)
    hashes = np.fromiter((h for _, _, h in ids if h % passes == part), dtype=np.uint64)
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _hashed_ids(inputs: Sequence[InputFile], num_rows: int) -> Iterator[tuple[int, str, int]]:
    columns = (ID_COLUMN, METADATA_COLUMN)
    batches = read_rows(inputs, 0, num_rows, columns=columns, batch_size=_IDS_AT_ONCE)
    for first, batch in batches:
        for offset, sample_id in enumerate(ids_of(batch)):
            if sample_id is not None and text_problem(sample_id) is None:
                yield first + offset, sample_id, id_hash(sample_id)
