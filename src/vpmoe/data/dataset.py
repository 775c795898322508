"""A finished dataset, opened for reading: one conversation per index."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.data.harmony import RenderConfig
from vpmoe.data.layout import ARRAYS, SAMPLES_SCHEMA, SCHEMA_VERSION, array_prefix, samples_path
from vpmoe.data.split import SPLITS, Split
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.storage.indexed import IndexedReader
from vpmoe.storage.manifest import MANIFEST_NAME, file_sha256, read_manifest
from vpmoe.vocabulary import O200K_SHA256

_REBUILD = "rebuild the dataset with: vpmoe data build CONFIG --overwrite"


@dataclass(frozen=True)
class Document:
    """One stored conversation.

    Attributes:
        sample_id: Its id.
        tokens: int32 ids, end of text included.
        span_ids: `Span` of each label: entry t speaks of token t + 1.
    """

    sample_id: str
    tokens: np.ndarray
    span_ids: np.ndarray


class Dataset:
    """One split of a dataset. Opening it checks the manifest, sizes and alignment, not the hashes.

    Attributes:
        path: The dataset's folder.
        split: "train" or "valid".
        manifest: What the folder's manifest says.
        lengths: Tokens of each conversation, end of text included.

    Raises:
        DataError: If the dataset is unfinished, damaged, made by another version or tokenizer, or
            holds nothing in this split.
    """

    def __init__(self, path: Path | str, split: Split = "train") -> None:
        self.path = Path(path)
        self.split: Split = split
        self.manifest = load_manifest(self.path)
        shards = self.manifest["splits"][split]
        if not shards:
            raise DataError(
                f"{self.path} has no conversations in its {split} split",
                hint="build it with more rows, or with another valid_fraction",
            )
        self._names: list[str] = [shard["name"] for shard in shards]
        self._tokens = [self._open("tokens", shard) for shard in shards]
        self._spans = [self._open("span", shard) for shard in shards]
        self._masks = [self._open("lossmask", shard) for shard in shards]
        for name, tokens, *others in zip(
            self._names, self._tokens, self._spans, self._masks, strict=True
        ):
            if not all(np.array_equal(tokens.lengths, other.lengths) for other in others):
                raise DataError(
                    f"{self.path}/{split}/{name}: tokens, span and lossmask have other sequence "
                    "boundaries",
                    hint=_REBUILD,
                )
        self.lengths = np.concatenate([r.lengths for r in self._tokens]).astype(np.int64)
        self._firsts = np.cumsum([0, *(len(r) for r in self._tokens)])

    def _open(self, array: str, shard: Mapping[str, Any]) -> IndexedReader:
        prefix = array_prefix(self.path, self.split, shard["name"], array)
        reader = IndexedReader(prefix)
        if reader.dtype != ARRAYS[array]:
            raise DataError(f"{prefix}.bin holds {reader.dtype}", hint=_REBUILD)
        if (len(reader), reader.flat.size) != (shard["rows"], shard["tokens"]):
            raise DataError(
                f"{prefix}: {len(reader):,} sequences with {reader.flat.size:,} entries, the "
                f"manifest says {shard['rows']:,} with {shard['tokens']:,}",
                hint=_REBUILD,
            )
        return reader

    def __len__(self) -> int:
        return int(self.lengths.size)

    @cached_property
    def samples(self) -> pa.Table:
        """The table that names each sequence, in index order."""
        return self._sample_columns(SAMPLES_SCHEMA.names)

    @cached_property
    def sample_ids(self) -> list[str]:
        """The id of each conversation, by index; for one id, `sample_id` needs less memory."""
        return self._ids.to_pylist()

    def sample_id(self, index: int) -> str:
        """The id of one conversation."""
        self._locate(index)  # a negative index would silently count from the end
        return self._ids[index].as_py()

    @cached_property
    def _ids(self) -> pa.LargeStringArray:
        column = self._sample_columns(["sample_id"]).column(0).cast(pa.large_string())
        return pa.concat_arrays(column.chunks)

    def _sample_columns(self, names: list[str]) -> pa.Table:
        paths = [samples_path(self.path, self.split, name) for name in self._names]
        try:
            table = pa.concat_tables([pq.read_table(path, columns=names) for path in paths])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: {error}", hint=_REBUILD) from error
        if table.schema.names != names or table.num_rows != len(self):
            raise DataError(
                f"{self.path}/{self.split}: the sample tables do not fit the arrays", hint=_REBUILD
            )
        return table

    @cached_property
    def index_of(self) -> dict[str, int]:
        """The index of each id."""
        return {sample_id: i for i, sample_id in enumerate(self.sample_ids)}

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of one conversation, end of text included; a view of the mapped file."""
        shard, place = self._locate(index)
        return self._tokens[shard][place]

    def span_ids(self, index: int) -> np.ndarray:
        """`Span` of each label of one conversation.

        Raises:
            DataError: If the stored loss mask is not set exactly where a span is.
        """
        shard, place = self._locate(index)
        spans = self.unchecked_span_ids(index)
        if not np.array_equal(self._masks[shard][place], spans != Span.IGNORE):
            raise DataError(
                f"{self.path}/{self.split}/{self._names[shard]}: the lossmask of sequence {place} "
                "does not fit its span ids",
                hint="the shard is damaged; " + _REBUILD,
            )
        return spans

    def conversation(self, index: int) -> Document:
        """Everything stored of one conversation."""
        return Document(self.sample_id(index), self.tokens(index), self.span_ids(index))

    def unchecked_span_ids(self, index: int) -> np.ndarray:
        """`Span` of each label as stored: verification reports what `span_ids` raises."""
        shard, place = self._locate(index)
        return self._spans[shard][place]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise DataError(
                f"{self.path} has no example {index} in its {self.split} split",
                hint=f"it has examples 0 to {len(self) - 1}",
            )
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return shard, index - int(self._firsts[shard])

    @property
    def identity(self) -> dict[str, Any]:
        """What a target store or a checkpoint notes about the dataset that it belongs to."""
        content = json.dumps(self.manifest["splits"], sort_keys=True)  # names, counts, file hashes
        return {
            "manifest_sha256": file_sha256(self.path / MANIFEST_NAME),
            "content_sha256": hashlib.sha256(content.encode()).hexdigest(),
            "fingerprint": self.manifest["fingerprint"],
            "tokenizer_sha256": self.manifest["tokenizer"]["sha256"],
            "render": self.manifest["config"]["render"],
        }

    @property
    def render(self) -> RenderConfig:
        """How the dataset was rendered."""
        return RenderConfig(**self.manifest["config"]["render"])


def trained_render(inputs: Mapping[str, Any]) -> RenderConfig:
    """How the dataset that a checkpoint was trained on was rendered.

    Args:
        inputs: What the checkpoint's manifest says it was made from.

    Raises:
        DataError: If it does not say.
    """
    settings = inputs.get("data", {}).get("render")
    if settings is None:
        raise DataError(
            "the checkpoint does not say how its data was rendered",
            hint="pass the render settings of its dataset",
        )
    return RenderConfig(**settings)


def load_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the dataset at `path`.

    Raises:
        DataError: If there is none, or it is of another version or tokenizer.
    """
    if not path.is_dir():
        raise DataError(f"there is no dataset at {path}", hint="make it with: vpmoe data build")
    manifest = read_manifest(path / MANIFEST_NAME)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema {manifest.get('schema_version')!r}, this code reads "
            f"{SCHEMA_VERSION!r}",
            hint=_REBUILD,
        )
    theirs = manifest["tokenizer"]
    if theirs["sha256"] != O200K_SHA256:
        raise DataError(
            f"{path} was built with tokenizer {theirs['id']} (sha256 {theirs['sha256'][:12]}), "
            f"this code has {O200K_SHA256[:12]}",
            hint=_REBUILD,
        )
    if set(manifest["splits"]) != set(SPLITS):
        raise DataError(f"{path}: the manifest names other splits than {SPLITS}", hint=_REBUILD)
    return manifest
