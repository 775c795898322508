"""A teacher's opinion of a student's own tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vpmoe.batch import Rollout
from vpmoe.teachers.base import Teacher, require_logprobs


def with_teacher(rollouts: Sequence[Rollout], teacher: Teacher) -> list[Rollout]:
    """The rollouts with the teacher's log-probs of every sampled token.

    Raises:
        TeacherError: If an answer is not a log-prob of what was asked.
    """
    sequences = [np.concatenate([r.prompt, r.completion]) for r in rollouts]
    scores = teacher.score(sequences)
    require_logprobs(sequences, scores)
    return [
        replace(rollout, teacher_logprobs=logprobs[len(rollout.prompt) - 1 :])
        for rollout, logprobs in zip(rollouts, scores, strict=True)
    ]
