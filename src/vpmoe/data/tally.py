"""What a shard holds, in numbers that add up over shards."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vpmoe.data.split import SPLITS, Split
from vpmoe.spans import NUM_SPANS, Span

LENGTH_EDGES = tuple(2**n for n in range(6, 18))  # tokens; a bucket holds lengths below its edge
_UNKNOWN = "unknown"


@dataclass
class Tally:
    """Counts of rows, tokens and events.

    Attributes:
        rows: Per split, the rows kept.
        tokens: Per split, tokens with ends of text.
        span_labels: Per split, labels of each span.
        rejects: Per reason, the rows turned away.
        cuts: Per kind of cut, the rows that were shortened so.
        lengths: Per language and exercise, rows in each bucket of `LENGTH_EDGES`, the last one
            open-ended.
        licenses: Per seed licence, the rows kept.
    """

    rows: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    span_labels: dict[str, list[int]] = field(
        default_factory=lambda: {split: [0] * NUM_SPANS for split in SPLITS}
    )
    rejects: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    licenses: Counter[str] = field(default_factory=Counter)

    def add_documents(
        self, split: Split, lengths: np.ndarray, spans: np.ndarray, metadata: Sequence[Any]
    ) -> None:
        """Count documents of one split, with the spans of all their labels."""
        self.rows[split] += lengths.size
        self.tokens[split] += int(lengths.sum())
        counts = np.bincount(spans, minlength=NUM_SPANS)
        self.span_labels[split] = [
            a + int(b) for a, b in zip(self.span_labels[split], counts, strict=True)
        ]
        buckets = np.searchsorted(LENGTH_EDGES, lengths, side="right").tolist()
        for bucket, row in zip(buckets, metadata, strict=True):
            language = self.lengths.setdefault(row.get("language", _UNKNOWN), {})
            exercise = row.get("exercise", _UNKNOWN)
            if exercise not in language:
                language[exercise] = [0] * (len(LENGTH_EDGES) + 1)
            language[exercise][bucket] += 1
            self.licenses[row.get("seed_license", _UNKNOWN)] += 1

    def add(self, other: "Tally") -> None:
        """Add another tally to this one."""
        for name in ("rows", "tokens", "rejects", "cuts", "licenses"):
            getattr(self, name).update(getattr(other, name))
        for split, counts in other.span_labels.items():
            self.span_labels[split] = [
                a + b for a, b in zip(self.span_labels[split], counts, strict=True)
            ]
        for language, exercises in other.lengths.items():
            mine = self.lengths.setdefault(language, {})
            for exercise, counts in exercises.items():
                old = mine.get(exercise, [0] * len(counts))
                mine[exercise] = [a + b for a, b in zip(old, counts, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts with sorted keys, for manifests."""
        return {
            "rows": {split: self.rows[split] for split in SPLITS},
            "tokens": {split: self.tokens[split] for split in SPLITS},
            "span_labels": {
                split: {Span(i).name.lower(): n for i, n in enumerate(self.span_labels[split])}
                for split in SPLITS
            },
            "rejects": _sorted(self.rejects),
            "cuts": _sorted(self.cuts),
            "length_edges": list(LENGTH_EDGES),
            "lengths": {k: _sorted(v) for k, v in sorted(self.lengths.items())},
            "licenses": _sorted(self.licenses),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Tally":
        """The tally that `to_json` wrote."""
        return cls(
            rows=Counter(tree["rows"]),
            tokens=Counter(tree["tokens"]),
            span_labels={s: list(counts.values()) for s, counts in tree["span_labels"].items()},
            rejects=Counter(tree["rejects"]),
            cuts=Counter(tree["cuts"]),
            lengths={k: dict(v) for k, v in tree["lengths"].items()},
            licenses=Counter(tree["licenses"]),
        )


def _sorted(counts: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(counts.items()))
