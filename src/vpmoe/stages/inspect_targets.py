"""Looking into a finished target store: whether it is sound, what it holds, what a sample says."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpmoe.data.dataset import Dataset
from vpmoe.data.o200k import o200k
from vpmoe.data.split import SPLITS
from vpmoe.errors import DataError
from vpmoe.spans import TRAINED_SPANS, Span
from vpmoe.stages.score import content_sha256
from vpmoe.storage.manifest import MANIFEST_NAME, read_manifest
from vpmoe.teachers.codecs import Entries
from vpmoe.teachers.frontier import LOGPROB_BYTES
from vpmoe.teachers.store import TargetStore
from vpmoe.vocabulary import O200K_SHA256

Progress = Callable[[int, int], None]  # (samples done, samples in all)

_MASS_TOLERANCE = 1e-5
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass
class TargetReport:
    """What a verification found.

    Attributes:
        path: The store.
        problems: One line each; empty for a sound store.
        samples: Looked at.
        labels: Looked at.
        compared: Whether a dataset was there to compare with.
    """

    path: str
    problems: list[str] = field(default_factory=list)
    samples: int = 0
    labels: int = 0
    compared: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


def verify_targets(
    path: Path, data: Path | None = None, *, progress: Progress | None = None
) -> TargetReport:
    """What is wrong with a target store, if anything.

    Every checksum, every sample decoded, masses of at most one, counts as the manifest says; with
    a dataset also its hash, spans and lengths, and the log-prob of each label against the entry
    that names it.

    Raises:
        DataError: If there is no finished store, or no dataset, at all.
    """
    report = TargetReport(str(path))
    for folder in (path, data or path):  # none there is a mistake, a damaged one a finding
        read_manifest(folder / MANIFEST_NAME)
    try:
        store = TargetStore(path)
        dataset = None if data is None else Dataset(data, store.header.get("split", SPLITS[0]))
    except DataError as error:
        report.problems.append(error.message)
        return report
    report.compared = dataset is not None
    if dataset is not None:
        _check_header(store, dataset, report)
    if report.problems:
        dataset = None  # no sample of another dataset is worth a line of its own
    for done, sample_id in enumerate(store, start=1):
        try:
            entries = store.aligned_entries(sample_id)
        except DataError as error:
            report.problems.append(f"{sample_id}: {error.message}")
            continue
        _check_sample(store, sample_id, entries, report)
        if dataset is not None:
            _check_labels(store, dataset, sample_id, entries, report)
        report.samples += 1
        report.labels += store.num_trained(sample_id)
        if progress:
            progress(done, len(store))
    for name in ("samples", "labels"):
        said, found = store.manifest[name], getattr(report, name)
        if said != found:
            report.problems.append(f"the manifest says {said:,} {name}, {found:,} were read")
    return report


def _check_header(store: TargetStore, dataset: Dataset, report: TargetReport) -> None:
    expected = {"dataset_sha256": content_sha256(dataset), "tokenizer_sha256": O200K_SHA256}
    for name, value in expected.items():
        if store.header.get(name) != value:
            report.problems.append(f"{name} is {store.header.get(name)}, the dataset's is {value}")


def _check_sample(
    store: TargetStore, sample_id: str, entries: Entries, report: TargetReport
) -> None:
    logprobs = store[sample_id]
    if not (np.isfinite(logprobs) & (logprobs <= 0)).all():
        report.problems.append(f"{sample_id}: a log-prob is above zero or not finite")
    if not store.max_entries:
        return
    mass = entries.logprobs.double().exp().sum(1) + entries.tail.double().exp()
    if float(mass.max()) > 1 + _MASS_TOLERANCE:
        report.problems.append(f"{sample_id}: a mass of {float(mass.max()):.6f}")


def _check_labels(
    store: TargetStore,
    dataset: Dataset,
    sample_id: str,
    entries: Entries,
    report: TargetReport,
) -> None:
    index = dataset.index_of.get(sample_id)
    if index is None:
        report.problems.append(f"{sample_id} is not in the dataset")
        return
    document = dataset.conversation(index)
    if not np.array_equal(document.span_ids, store.span_ids(sample_id)):
        report.problems.append(f"{sample_id}: other spans than the dataset's")
        return
    if store.codec.needs != "top":
        return  # drawn frequencies are not the label's log-prob
    labels = torch.from_numpy(np.append(document.tokens[1:], 0).astype(np.int64))
    named = (entries.ids == labels[:, None]) & (entries.logprobs > -torch.inf)
    own = torch.from_numpy(store[sample_id].astype(np.float32))[:, None].expand_as(named)[named]
    apart = (entries.logprobs[named] - own).abs() - 0.02 * own.abs()
    most = float(apart.max()) if apart.numel() else 0.0
    if most > store.codec.rounding_nats:
        report.problems.append(f"{sample_id}: a label and its entry are {most:.3f} nats apart")


def target_stats(path: Path) -> dict[str, Any]:
    """What a store holds: bytes, entries, tail mass and log-prob quantiles of each span."""
    store = TargetStore(path)
    labels = store.manifest["labels"]
    spans: dict[str, Any] = {}
    found: dict[Span, list[np.ndarray]] = {span: [] for span in TRAINED_SPANS}
    for sample_id in store:
        entries, span_ids = store.aligned_entries(sample_id), store.span_ids(sample_id)
        columns = np.stack(
            [
                store[sample_id].astype(np.float64),
                entries.counts.double().numpy(),
                entries.tail.double().exp().numpy(),
            ]
        )
        for span in TRAINED_SPANS:
            found[span].append(columns[:, span_ids == span])
    for span, parts in found.items():
        logprobs, counts, tail = np.concatenate(parts, axis=1)
        if len(logprobs):
            spans[Span(span).name.lower()] = {
                "labels": len(logprobs),
                "entries": float(counts.mean()),
                "tail_mass": float(tail.mean()),
                "logprob_mean": float(logprobs.mean()),
                **{f"logprob_q{q:g}": float(np.quantile(logprobs, q)) for q in _QUANTILES},
            }
    on_disk = sum(entry["bytes"] for entry in store.manifest["shards"])
    return {
        "path": str(path),
        "header": store.header,
        "samples": len(store),
        "labels": labels,
        "shards": len(store.manifest["shards"]),
        "bytes_on_disk": on_disk,
        "bytes_per_token": LOGPROB_BYTES + store.manifest["code_bytes"] / labels,
        "ranking_bytes_per_token": store.manifest.get("ranking_bytes", 0) / labels,
        "bytes_per_token_on_disk": on_disk / labels,
        "spans": spans,
    }


@dataclass(frozen=True)
class Shown:
    """One label of a sample and what the teacher thought of it.

    Attributes:
        place: In the document.
        span: Its span's name.
        token: Text of the label; empty where no dataset says it.
        logprob: The teacher's, nats.
        choices: Text and probability of named ids, the likeliest first.
        tail_mass: On all other ids.
    """

    place: int
    span: str
    token: str
    logprob: float
    choices: list[tuple[str, float]]
    tail_mass: float


def shown(
    path: Path, sample_id: str = "", data: Path | None = None, *, choices: int = 4
) -> tuple[str, list[Shown]]:
    """A sample's id and its trained labels in order.

    Args:
        path: Of the store.
        sample_id: Which sample; empty takes the first.
        data: The dataset, for the labels themselves.
        choices: How many of the named ids.

    Raises:
        DataError: If the store has no such sample.
    """
    store = TargetStore(path)
    name = sample_id or next(iter(store))
    if name not in store:
        raise DataError(f"{path} has no sample {name}", hint=f"it has e.g. {next(iter(store))}")
    entries = store.aligned_entries(name).ranked()
    labels: np.ndarray | None = None
    if data is not None:
        dataset = Dataset(data, store.header.get("split", SPLITS[0]))
        store.require(dataset_sha256=content_sha256(dataset))
        labels = dataset.conversation(dataset.index_of[name]).tokens[1:]
    out = []
    for place in np.flatnonzero(store.span_ids(name) != Span.IGNORE):
        count = min(choices, int(entries.counts[place]))
        ids, values = entries.ids[place, :count], entries.logprobs[place, :count].exp()
        out.append(
            Shown(
                place=int(place),
                span=Span(int(store.span_ids(name)[place])).name.lower(),
                token="" if labels is None else _text(int(labels[place])),
                logprob=float(store[name][place]),
                choices=[
                    (_text(i), float(p)) for i, p in zip(ids.tolist(), values.tolist(), strict=True)
                ],
                tail_mass=float(entries.tail[place].exp()),
            )
        )
    return name, out


def _text(token: int) -> str:
    return o200k().decode([token])
