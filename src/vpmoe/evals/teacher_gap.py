"""How far a student's own text is from what its teacher would have written."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.batch import Rollout
from vpmoe.errors import TeacherError
from vpmoe.evals.by_span import BySpan, tally
from vpmoe.rollouts.collate import completion_spans


@dataclass(frozen=True)
class TeacherGap:
    """Estimates of the reverse KL, KL(student || teacher), in nats per sampled token.

    Attributes:
        k1: mean(log p_student - log p_teacher): unbiased, may be negative by chance.
        k3: mean(exp(-d) - 1 + d) with d the difference above: also unbiased where the teacher's
            support covers the student's, never negative, far lower variance when the two agree.
        token_counts: Tokens behind each mean.
    """

    k1: BySpan
    k3: BySpan
    token_counts: dict[str, int]


def teacher_gap(rollouts: Sequence[Rollout]) -> TeacherGap:
    """Reverse KL estimates on tokens that the student sampled at temperature 1, untruncated.

    Greedy or top-p samples would make both estimates meaningless: they average over the
    student's own distribution.

    Raises:
        TeacherError: If a rollout has no teacher log-probs.

    References:
        Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
    """
    differences: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    for rollout in rollouts:
        if rollout.teacher_logprobs is None:
            raise TeacherError(
                f"rollout {rollout.sample_id} is not scored", hint="call with_teacher first"
            )
        student = rollout.rollout_logprobs.astype(np.float64)
        differences.append(student - rollout.teacher_logprobs.astype(np.float64))
        spans.append(completion_spans(rollout.completion))
    d = np.concatenate(differences) if differences else np.zeros(0)
    span_ids = np.concatenate(spans) if spans else np.zeros(0, dtype=np.uint8)
    return TeacherGap(
        k1=tally(d, span_ids).means(),
        k3=tally(np.expm1(-d) + d, span_ids).means(),
        token_counts=tally(d, span_ids).token_counts(),
    )
