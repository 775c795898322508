"""Means over the tokens of each span."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8

from vpmoe.spans import TRAINED_SPANS


@dataclass(frozen=True)
class BySpan:
    """A mean over the tokens of each trained span, and over both; None where there are none."""

    reasoning: float | None
    final: float | None
    all: float | None


@dataclass(frozen=True)
class Tally:
    """Sums and counts, indexed by `Span`: what means of any split of the tokens add up from."""

    sums: Float64[np.ndarray, " span"]
    counts: Float64[np.ndarray, " span"]

    def means(self) -> BySpan:
        """Token-weighted means."""
        by_name = {
            span.name.lower(): _ratio(self.sums[span], self.counts[span]) for span in TRAINED_SPANS
        }
        spans = list(TRAINED_SPANS)
        return BySpan(**by_name, all=_ratio(self.sums[spans].sum(), self.counts[spans].sum()))

    def token_counts(self) -> dict[str, int]:
        """How many tokens stand behind each mean."""
        by_name = {span.name.lower(): int(self.counts[span]) for span in TRAINED_SPANS}
        return {**by_name, "all": sum(by_name.values())}


def _ratio(total: float, count: float) -> float | None:
    return float(total / count) if count else None


def tally(values: np.ndarray, span_ids: UInt8[np.ndarray, " tokens"]) -> Tally:
    """`values` added up per span in float64."""
    size = len(TRAINED_SPANS) + 1
    return Tally(
        sums=np.bincount(span_ids, weights=values.astype(np.float64), minlength=size),
        counts=np.bincount(span_ids, minlength=size).astype(np.float64),
    )
