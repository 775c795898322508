"""Everything a manifest claims, checked against the bytes on disk."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.config import fingerprint
from vpmoe.data.dataset import Dataset, load_manifest
from vpmoe.data.layout import REJECTS_FILE, array_prefix
from vpmoe.data.split import SPLITS, Split, id_hash, split_of, valid_parts
from vpmoe.data.structure import align_to_labels, read_structure
from vpmoe.data.tally import Tally
from vpmoe.errors import DataError
from vpmoe.spans import Span
from vpmoe.storage.indexed import IndexedReader
from vpmoe.storage.manifest import file_sha256

_TOKENS_AT_ONCE = 1 << 20

Progress = Callable[[int, int], None]  # called with (sequences done, sequences in all)


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        path: The dataset.
        problems: One line each; empty for a sound dataset.
        rows: Sequences looked at, per split.
        tokens: Tokens looked at, per split.
        files: Files whose hash was compared.
    """

    path: str
    problems: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    files: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify_dataset(path: Path | str, *, progress: Progress | None = None) -> VerifyReport:
    """What is wrong with the dataset at `path`, if anything.

    Compares every file's hash and size, sequence boundaries, masks with spans, spans with the
    structure of the tokens, the structure with the grammar, ids with the vocabulary, lengths with
    `seq_len`, splits with the split rule, and all counts with the manifest.

    Args:
        path: The dataset's folder.
        progress: Told how many sequences were looked at.

    Raises:
        DataError: If there is no finished dataset of this version at all.
    """
    root = Path(path)
    manifest = load_manifest(root)
    report = VerifyReport(str(root))
    _check_hashes(root, manifest, report)
    if report.problems:
        return report  # what the damaged files say means nothing
    tally = Tally(cuts=Counter(manifest["cuts"]))
    total, done = sum(manifest["rows"].values()), 0
    hashes: list[np.ndarray] = []
    for split in SPLITS:
        if not manifest["splits"][split]:
            continue
        try:
            dataset = Dataset(root, split)
        except DataError as error:
            report.problems.append(error.message)
            continue
        for block in _blocks(dataset):
            _check_block(manifest, dataset, block, report, tally)
            hashes.append(_check_ids(manifest, dataset, block, report))
            done += len(block)
            if progress is not None:
                progress(done, total)
        _check_masks(root, manifest, split, report)
    if hashes and np.unique(flat_hashes := np.concatenate(hashes)).size < flat_hashes.size:
        report.problems.append("a sample id occurs twice")
    _check_counts(root, manifest, tally, report)
    report.rows, report.tokens = dict(tally.rows), dict(tally.tokens)
    return report


def _check_hashes(root: Path, manifest: Mapping[str, Any], report: VerifyReport) -> None:
    expected = {root / REJECTS_FILE: manifest["rejects_sha256"]}
    for split in SPLITS:
        for shard in manifest["splits"][split]:
            for name, facts in shard["files"].items():
                expected[root / split / name] = facts["sha256"]
        named = {p.name for p in expected if p.parent.name == split}
        there = {p.name for p in (root / split).iterdir()} if (root / split).is_dir() else set()
        for name in sorted(there - named):
            report.problems.append(f"{split}/{name} is not in the manifest")
    for path, digest in expected.items():
        report.files += 1
        where = path.relative_to(root)
        if not path.is_file():
            report.problems.append(f"{where} is missing")
        elif file_sha256(path) != digest:
            report.problems.append(f"{where} is not the file that was built: its sha256 differs")


def _blocks(dataset: Dataset) -> Iterator[range]:
    """Ranges of sequences of about a million tokens each."""
    begin, size = 0, 0
    for index, length in enumerate(dataset.lengths.tolist()):
        size += length
        if size >= _TOKENS_AT_ONCE:
            yield range(begin, index + 1)
            begin, size = index + 1, 0
    if begin < len(dataset):
        yield range(begin, len(dataset))


def _check_block(
    manifest: Mapping[str, Any],
    dataset: Dataset,
    block: range,
    report: VerifyReport,
    tally: Tally,
) -> None:
    """Grammar, spans and lengths of some sequences; their numbers go into the tally."""
    lengths = dataset.lengths[block.start : block.stop]
    flat = np.concatenate([dataset.tokens(i) for i in block])
    spans = np.concatenate([dataset.unchecked_span_ids(i) for i in block])

    def report_at(places: np.ndarray, what: str) -> None:
        where = f"{dataset.split} example {block[int(places[0])]}"
        more = f" (and {places.size - 1} more)" if places.size > 1 else ""
        report.problems.append(f"{where}: {what}{more}")

    structure = read_structure(flat, lengths)
    for what in sorted(set(structure.problems.values())):
        report_at(np.array([i for i, w in structure.problems.items() if w == what]), what)
    expected = align_to_labels(structure.span_ids, lengths)
    ends = np.cumsum(lengths)
    wrong = np.unique(np.searchsorted(ends, np.flatnonzero(expected != spans), side="right"))
    if wrong.size:
        report_at(wrong, "span ids do not follow from the tokens")
    for span in (Span.REASONING, Span.FINAL):
        none = np.flatnonzero(np.add.reduceat(spans == span, ends - lengths, dtype=np.int64) == 0)
        if none.size:
            report_at(none, f"no label of the {span.name.lower()} span")
    too_long = np.flatnonzero(lengths > manifest["config"]["seq_len"])
    if too_long.size:
        report_at(too_long, f"longer than seq_len {manifest['config']['seq_len']}")
    known = spans <= max(Span)
    if known.all():
        rows = dataset.samples.slice(block.start, len(block))
        tally.add_documents(dataset.split, lengths, spans, [_present(r) for r in rows.to_pylist()])


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _check_ids(
    manifest: Mapping[str, Any],
    dataset: Dataset,
    block: range,
    report: VerifyReport,
) -> np.ndarray:
    """The hashes of the ids, which say that they are in the right split; counts fit the arrays."""
    parts = valid_parts(manifest["config"]["valid_fraction"])
    rows = dataset.samples.slice(block.start, len(block))
    lengths = dataset.lengths[block.start : block.stop].tolist()
    if rows.column("num_tokens").to_pylist() != lengths:
        report.problems.append(f"{dataset.split}: num_tokens of the sample table are wrong")
    ids = rows.column("sample_id").to_pylist()
    hashed = [id_hash(sample_id) for sample_id in ids]
    strays = [i for i, h in zip(ids, hashed, strict=True) if split_of(h, parts) != dataset.split]
    if strays:
        report.problems.append(f"sample {strays[0]} does not belong in {dataset.split}")
    return np.array(hashed, dtype=np.uint64)


def _check_masks(
    root: Path, manifest: Mapping[str, Any], split: Split, report: VerifyReport
) -> None:
    for shard in manifest["splits"][split]:
        masks = IndexedReader(array_prefix(root, split, shard["name"], "lossmask"))
        spans = IndexedReader(array_prefix(root, split, shard["name"], "span"))
        where = f"{split}/{shard['name']}"
        if not np.array_equal(masks.lengths, spans.lengths):
            report.problems.append(f"{where}: lossmask and span have other sequence boundaries")
            continue
        for begin in range(0, spans.flat.size, _TOKENS_AT_ONCE):
            part = slice(begin, begin + _TOKENS_AT_ONCE)
            if not np.array_equal(masks.flat[part], spans.flat[part] != Span.IGNORE):
                report.problems.append(f"{where}: lossmask is not 1 exactly where a span is set")
                break


def _check_counts(
    root: Path, manifest: Mapping[str, Any], tally: Tally, report: VerifyReport
) -> None:
    """Recount everything that the manifest counts."""
    reasons = _reject_reasons(root)
    tally.rejects.update(reasons)
    counted = tally.to_json()
    for name, value in counted.items():
        if manifest[name] != value:
            report.problems.append(f"the manifest's {name} do not fit the files")
    rows_in = manifest["num_input_rows"]
    rows_out = sum(tally.rows.values()) + sum(tally.rejects.values())
    if rows_in != rows_out:
        report.problems.append(f"{rows_in} rows went in, {rows_out} were kept or turned away")
    if sum(item["num_rows"] for item in manifest["inputs"]) < rows_in:
        report.problems.append("the inputs have fewer rows than went in")
    if fingerprint(manifest["settings"]) != manifest["fingerprint"]:
        report.problems.append("the manifest's fingerprint does not fit its settings")


def _reject_reasons(root: Path) -> list[str]:
    try:
        return pq.read_table(root / REJECTS_FILE, columns=["reason"]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{root / REJECTS_FILE}: {error}", hint="rebuild the dataset") from error
