"""What a teacher said, on disk, keyed by sample: written once by shards, read many times."""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from vpmoe.config import difference
from vpmoe.errors import DataError
from vpmoe.spans import TRAINED_SPANS, Span
from vpmoe.storage.atomic import write_error
from vpmoe.storage.manifest import (
    MANIFEST_NAME,
    file_sha256,
    provenance,
    read_manifest,
    write_manifest,
)
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.codecs.ranking import Ranking
from vpmoe.teachers.shards import (
    RANKING_SHA256,
    SampleTargets,
    Shard,
    codec_of,
    header_of,
    is_named_by,
    remove_temporaries,
    require_whole,
    shard_files,
    write_shard,
)

SCHEMA = "vpmoe_targets_v3"
_LOCK_NAME = ".lock"
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class TargetWriter:
    """A target store in the making; whoever opens it again goes on where it stopped.

    The selection of samples is cut into slices that depend on the settings alone, and shard i
    holds slice i. So an interrupted store and an uninterrupted one end with the same bytes, and
    only the slice that was being scored is scored twice.

    Args:
        path: Folder of the store; made if it is not there.
        header: Teacher, dataset, tokenizer, effort and selection, as JSON.
        ranking: Of the ids, where the codec names them by rank; its hash joins the header.
        overwrite: Start anew over a store with another header.

    Raises:
        DataError: If the folder holds another store, another process writes it, or a shard in it
            is damaged.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        *,
        ranking: Ranking | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path, self._ranking = Path(path), ranking
        named = {} if ranking is None else {RANKING_SHA256: ranking.sha256}
        self.header = json.loads(json.dumps({**header, **named}))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK_NAME).open("w")
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise DataError(
                f"another process is writing {self.path}",
                hint="wait for it to end, or choose another output",
            ) from None
        try:
            remove_temporaries(self.path)
            self._digests = self._take_over(overwrite=overwrite)
        except DataError:
            self.close()
            raise

    def _take_over(self, *, overwrite: bool) -> dict[int, str]:
        """Hashes of the shards already there; with `overwrite`, those of other settings go."""
        digests: dict[int, str] = {}
        for index, file in shard_files(self.path).items():
            digest = file_sha256(file)
            before = header_of(file) if is_named_by(file, digest) else None
            if before == self.header:
                digests[index] = digest
            elif overwrite:
                file.unlink()
            else:
                require_whole(file)
                lines = "; ".join(difference(before or {}, self.header))
                raise DataError(
                    f"{self.path} was scored with other settings: {lines}",
                    hint="choose another output, undo the change, or give --overwrite",
                )
        manifest = self.path / MANIFEST_NAME
        if manifest.exists() and _listed(self.path) != set(digests.values()):
            manifest.unlink()  # the shards say all that it does, so it is written again
        return digests

    @property
    def done(self) -> frozenset[int]:
        """Indices of the slices that need no scoring."""
        return frozenset(self._digests)

    @property
    def finished(self) -> bool:
        """Whether the store is complete already."""
        return (self.path / MANIFEST_NAME).exists()

    def write(self, index: int, samples: Sequence[SampleTargets]) -> None:
        """Add slice `index`; it is there, whole, once this returns.

        Raises:
            DataError: If it cannot be written.
        """
        path = write_shard(self.path, index, samples, self.header, self._ranking)
        self._digests[index] = require_whole(path)

    def finish(self, num_shards: int) -> dict[str, Any]:
        """The manifest of the store, which makes it one that can be read.

        Raises:
            DataError: If a slice is missing.
        """
        files = shard_files(self.path)
        if sorted(files) != list(range(num_shards)):
            raise DataError(f"{self.path} has {len(files)} of {num_shards} shards")
        shards = [Shard(files[i]) for i in range(num_shards)]
        manifest = {
            "schema": SCHEMA,
            **provenance(),
            "header": self.header,
            "samples": sum(len(shard.sample_ids) for shard in shards),
            "labels": sum(len(shard.values) for shard in shards),
            "code_bytes": sum(shard.code_bytes for shard in shards),
            "ranking_bytes": sum(shard.ranking_bytes for shard in shards),
            "teacher_logprobs": _statistics(shards),
            "shards": [
                {
                    "file": files[i].name,
                    "samples": len(shard.sample_ids),
                    "labels": len(shard.values),
                    "bytes": files[i].stat().st_size,
                    "sha256": self._digests[i],
                }
                for i, shard in enumerate(shards)
            ],
        }
        write_manifest(self.path / MANIFEST_NAME, manifest)
        return manifest

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _listed(path: Path) -> set[str] | None:
    """Hashes of the shards that a store's manifest names; None where it cannot be made out."""
    try:
        return {str(entry.get("sha256")) for entry in read_store_manifest(path)["shards"]}
    except DataError:
        return None


def read_store_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished store; its shards are not looked at.

    Raises:
        DataError: If there is none, or it is not that of a target store.
    """
    manifest = read_manifest(path / MANIFEST_NAME)
    schema = manifest.get("schema")
    if schema != SCHEMA:
        is_ours = str(schema).startswith(SCHEMA.rstrip("0123456789"))
        raise DataError(
            f"{path} has schema {schema!r}, expected {SCHEMA!r}",
            hint="score again with this version, or read it with the version that wrote it"
            if is_ours
            else "give the folder that vpmoe score wrote",
        )
    kinds = {"header": dict, "shards": list, "samples": int, "labels": int}
    lacking = sorted(
        name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)
    )
    if lacking or not all(isinstance(entry, dict) for entry in manifest["shards"]):
        raise DataError(
            f"the manifest of {path} lacks {', '.join(lacking) or 'the names of its shards'}",
            hint="delete it and run vpmoe score again; the shards are kept",
        )
    return manifest


class TargetStore(Mapping[str, np.ndarray]):
    """A finished store: sample id -> float16 log-probs at the labels of its document.

    Positions whose span is ignored hold 0. Arrays are as long as the document, its end included,
    so they line up with the dataset's label-aligned arrays. Distributions, where the codec keeps
    any, are unpacked by `entries` and `aligned_entries`.

    Args:
        path: Folder of the store.

    Raises:
        DataError: If it is missing, unfinished, or any byte of it has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = read_store_manifest(self.path)
        self.header: dict[str, Any] = self.manifest["header"]
        self._shards = [self._open(entry) for entry in self.manifest["shards"]]
        # Those of all shards are equal: their headers are, the ranking's hash among them.
        self.codec = self._shards[0].codec if self._shards else codec_of(self.header)
        self._rows: dict[str, tuple[Shard, int]] = {}
        for shard in self._shards:
            self._rows.update((name, (shard, row)) for row, name in enumerate(shard.sample_ids))

    def _open(self, entry: Mapping[str, Any]) -> Shard:
        file = self.path / str(entry.get("file"))
        if not file.is_file():
            raise DataError(
                f"target store {self.path} lacks {file.name}",
                hint="copy the store again, or delete its manifest.json and score again",
            )
        digest = require_whole(file)
        if digest != entry.get("sha256"):
            raise DataError(f"{file} is not the shard that the manifest names", hint="score again")
        shard = Shard(file)
        if shard.header != self.header:
            raise DataError(
                f"{file} was scored with other settings than the store's",
                hint="delete the manifest.json beside it and score again",
            )
        return shard

    def __getitem__(self, sample_id: str) -> np.ndarray:
        shard, row = self._rows[sample_id]
        return shard.aligned(row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._rows

    def span_ids(self, sample_id: str) -> np.ndarray:
        """`Span` of each label of the document as the teacher scored it, uint8."""
        shard, row = self._rows[sample_id]
        return shard.span_ids(row)

    @property
    def max_entries(self) -> int:
        """The most ids that a label can have; 0 in a store of log-probs alone."""
        return self.codec.max_entries

    def num_trained(self, sample_id: str) -> int:
        """Labels of the document that are not ignored."""
        shard, row = self._rows[sample_id]
        return shard.num_trained(row)

    def entries(self, sample_ids: Sequence[str], device: torch.device | str = "cpu") -> Entries:
        """Distributions at the labels that are not ignored, one document after the other.

        Args:
            sample_ids: Of the documents; one may come more than once.
            device: Where they are unpacked, and stay.

        Raises:
            DataError: If the codes cannot be unpacked.
        """
        found = [self._rows[sample_id] for sample_id in sample_ids]
        codes = [shard.codes(row) for shard, row in found]
        columns = {
            name: torch.from_numpy(np.concatenate([code[name] for code in codes])).to(device)
            for name in (self.codec.columns if codes else ())
        }
        places = torch.tensor([shard.num_trained(row) for shard, row in found], device=device)
        return self.codec.decode(columns, places)

    def aligned_entries(self, sample_id: str) -> Entries:
        """Distributions at all labels of a document; ignored ones have none."""
        found = self.entries([sample_id])
        trained = torch.from_numpy(self.span_ids(sample_id) != Span.IGNORE)
        shape = (len(trained), found.ids.shape[1])
        ids = torch.zeros(shape, dtype=torch.int64)
        logprobs = torch.full(shape, -torch.inf)
        tail = torch.full(shape[:1], -torch.inf)
        ids[trained], logprobs[trained], tail[trained] = found.ids, found.logprobs, found.tail
        return Entries(ids, logprobs, tail)

    def require(self, **expected: str) -> None:
        """Refuse a store that was made for another dataset, tokenizer or effort.

        Args:
            expected: Keys of the header with the values they must have.

        Raises:
            DataError: Naming the first that differs, with both values.
        """
        for key, value in expected.items():
            stored = self.header.get(key)
            if stored != value:
                raise DataError(
                    f"target store {self.path} was made with {key} = {stored}, here it is {value}",
                    hint="score this dataset with vpmoe score, or point to the one it was made for",
                )


def _statistics(shards: Sequence[Shard]) -> dict[str, Any]:
    """Count, mean and exact quantiles of the stored log-probs, for each span and for samples."""
    out: dict[str, Any] = {}
    for span in TRAINED_SPANS:
        # A float16 has 65,536 values: counting them gives exact quantiles of any amount of data.
        counts = np.zeros(2**16, dtype=np.int64)
        for shard in shards:
            chosen = shard.values[shard.value_spans == span]
            counts += np.bincount(chosen.view(np.uint16), minlength=2**16)
        out[Span(span).name.lower()] = _summary(counts)
    means = np.concatenate([shard.sample_means for shard in shards])
    out["sample_mean"] = {f"q{q:g}": float(v) for q, v in zip(_QUANTILES, _at(means), strict=True)}
    return out


def _at(values: np.ndarray) -> list[float]:
    return [float(np.quantile(values, q)) for q in _QUANTILES]


def _summary(counts: np.ndarray) -> dict[str, float | int]:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    seen = np.flatnonzero(counts)
    seen = seen[np.argsort(values[seen], kind="stable")]
    total = int(counts[seen].sum())
    if total == 0:
        return {"labels": 0}
    reached = np.cumsum(counts[seen])
    out: dict[str, float | int] = {
        "labels": total,
        "mean": float((values[seen] * counts[seen]).sum() / total),
    }
    for q in _QUANTILES:
        out[f"q{q:g}"] = float(values[seen[np.searchsorted(reached, q * total)]])
    return out
