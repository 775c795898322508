"""How long completions are, channel by channel, and how many hit the length cap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.batch import Rollout
from vpmoe.evals.shares import Share, share_of
from vpmoe.rollouts.collate import completion_spans
from vpmoe.spans import Span


@dataclass(frozen=True)
class Length:
    """Tokens per completion, over the completions that have any in this channel."""

    count: int
    mean: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, headers and ends included.

    Attributes:
        reasoning: Of the analysis channel.
        final: Of the final channel.
        completion: Of everything sampled.
        truncated: Completions that reached the length cap before a stop token.
    """

    reasoning: Length
    final: Length
    completion: Length
    truncated: Share


def channel_lengths(rollouts: Sequence[Rollout]) -> Lengths:
    """Mean, median and 95th percentile of tokens per channel, and the share that was cut."""
    spans = [completion_spans(rollout.completion) for rollout in rollouts]
    return Lengths(
        reasoning=_length([int((span == Span.REASONING).sum()) for span in spans]),
        final=_length([int((span == Span.FINAL).sum()) for span in spans]),
        completion=_length([len(rollout.completion) for rollout in rollouts]),
        truncated=share_of(sum(r.stop_reason == "length" for r in rollouts), len(rollouts)),
    )


def _length(tokens: list[int]) -> Length:
    present = np.array([n for n in tokens if n > 0])
    if not present.size:
        return Length(count=0, mean=0.0, p50=0.0, p95=0.0)
    p50, p95 = np.percentile(present, [50, 95])
    return Length(int(present.size), float(present.mean()), float(p50), float(p95))
