"""Safety gates of on-policy training: when to stop sampling and say why."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from vpmoe.batch import Rollout
from vpmoe.config import Config
from vpmoe.data.completion import parse_completion


class GatesConfig(Config):
    """Limits on one round of rollouts; a round beyond any of them pauses the run."""

    max_cut_share: float = Field(default=0.9, ge=0, le=1)
    """Share of completions that hit the length cap instead of stopping."""
    max_invalid_share: float = Field(default=0.95, ge=0, le=1)
    """Share of completions that do not parse as Harmony."""
    max_repetition_share: float = Field(default=0.5, ge=0, le=1)
    """Share of completions that repeat themselves."""
    max_length_growth: float = Field(default=4.0, gt=1)
    """Mean completion length over that of the stage's first round."""
    min_sample_share: float = Field(default=0.1, ge=0, le=1)
    """Effective sample size of a step's importance ratios, as a share of its tokens."""
    max_reverse_kl_nats: float = Field(default=20.0, gt=0)
    """Mean log-prob gap to the teacher per token."""


@dataclass(frozen=True)
class RoundHealth:
    """What one round of rollouts looks like.

    Attributes:
        mean_length: Sampled tokens per completion.
        shares: Of completions with each failure, and of those that were cut.
        reverse_kl_nats: mean(log p_student - log p_teacher) over sampled tokens.
    """

    mean_length: float
    shares: dict[str, float]
    reverse_kl_nats: float


def round_health(rollouts: Sequence[Rollout]) -> RoundHealth:
    """The health of scored rollouts.

    References:
        own; the failure modes are those reported for on-policy distillation in
        "Rethinking On-Policy Distillation" (2026), arXiv:2604.13016.
    """
    failures = [parse_completion(rollout.completion).failure for rollout in rollouts]
    kinds = sorted({failure for failure in failures if failure})
    shares = {kind: failures.count(kind) / len(failures) for kind in kinds}
    shares["invalid"] = sum(failure is not None for failure in failures) / len(failures)
    shares["cut"] = sum(r.stop_reason == "length" for r in rollouts) / len(rollouts)
    gaps = [
        r.rollout_logprobs - r.teacher_logprobs for r in rollouts if r.teacher_logprobs is not None
    ]
    return RoundHealth(
        mean_length=float(np.mean([len(rollout.completion) for rollout in rollouts])),
        shares=shares,
        reverse_kl_nats=float(np.concatenate(gaps).mean()) if gaps else 0.0,
    )


def broken_gates(health: RoundHealth, first: RoundHealth, config: GatesConfig) -> list[str]:
    """One line for each limit that a round breaks, with the value seen and the limit.

    References:
        own.
    """
    seen = [
        ("completions cut at the length cap", health.shares["cut"], config.max_cut_share),
        ("completions that are not Harmony", health.shares["invalid"], config.max_invalid_share),
        (
            "completions that repeat themselves",
            health.shares.get("repetition", 0.0),
            config.max_repetition_share,
        ),
        (
            "completion length over the first round's",
            health.mean_length / first.mean_length,
            config.max_length_growth,
        ),
        ("nats to the teacher per token", health.reverse_kl_nats, config.max_reverse_kl_nats),
    ]
    return [f"{what}: {value:.3g}, limit {limit:g}" for what, value, limit in seen if value > limit]
