"""Where the files of a dataset lie."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from vpmoe.data.source import METADATA_COLUMNS
from vpmoe.data.split import Split

SCHEMA_VERSION = "vpmoe-data-1"
ARRAYS = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
REJECTS_FILE = "rejects.parquet"
BUILD_FOLDER = ".build"
LOCK_FILE = ".lock"

SAMPLES_SCHEMA = pa.schema(
    [
        ("sequence", pa.int64()),  # index in the shard's arrays
        ("sample_id", pa.string()),
        ("row", pa.int64()),  # number over all inputs
        ("num_tokens", pa.int32()),  # end of text included
        ("num_reasoning", pa.int32()),  # labels
        ("num_final", pa.int32()),
        ("truncated", pa.bool_()),
        *((name, pa.string()) for name in METADATA_COLUMNS),
    ]
)
REJECTS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("sample_id", pa.string()), ("reason", pa.string())]
)


def shard_name(index: int, num_shards: int) -> str:
    """Name of a shard, such as "shard_07"; as many digits as the last one needs, at least two."""
    return f"shard_{index:0{max(2, len(str(num_shards - 1)))}d}"


def array_prefix(root: Path, split: Split, shard: str, array: str) -> Path:
    """Path without suffix of one indexed array of a shard."""
    return root / split / f"{shard}_{array}"


def samples_path(root: Path, split: Split, shard: str) -> Path:
    """The table that names each sequence of a shard."""
    return root / split / f"{shard}_samples.parquet"
