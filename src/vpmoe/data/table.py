"""Parquet tables that grow in small steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.storage.atomic import TEMPORARY_SUFFIX, publish

_ROWS_AT_ONCE = 1 << 14


class Table:
    """A parquet file that grows in small steps and has its name only once it is whole."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        self._rows: list[tuple[Any, ...]] = []
        self._writer = pq.ParquetWriter(str(self._temporary), schema, compression="zstd")
        self.num_rows = 0

    def extend(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Append rows, each a tuple in the schema's order."""
        self._rows.extend(rows)
        self.num_rows += len(rows)
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Write what is left and give the file its name."""
        self._flush()
        self._writer.close()
        publish(self._temporary, self.path)

    def abort(self) -> None:
        """Drop the file."""
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array(c, f.type) for c, f in zip(zip(*self._rows), self.schema)]  # noqa: B905
            self._writer.write_table(pa.table(columns, schema=self.schema))
            self._rows.clear()
