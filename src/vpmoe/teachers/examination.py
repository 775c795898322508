"""A teacher under examination: the questions, and how its numbers compare with a reference's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vpmoe.teachers.base import TARGETS, Teacher, TopScores, TopTeacher, require_logprobs

PROBES = 8  # conversations that are asked about once more with one token changed
_SLOPE = 0.03  # of log-prob differences: a temperature of 1.03 is noise of half precision

State = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        state: "skipped" where the teacher or the config gives nothing to check.
        detail: The number seen, or what is wrong and what to do.
    """

    check: str
    state: State
    detail: str


@dataclass(frozen=True)
class Examination:
    """A teacher and the questions it is examined with.

    Attributes:
        teacher: Who is examined.
        reference: The same model by another way, such as in this process.
        asked: o200k ids of conversations, as the teacher will get them.
        prompt_lens: Tokens of each before its first answer token.
        other_effort: The same conversations with another reasoning effort named; empty where no
            effort is named at all.
        k: How many likeliest ids will be asked for; 0 for none.
        tolerance_nats: Mean difference per token between two ways to the same number.
    """

    teacher: Teacher
    reference: Teacher | None
    asked: Sequence[np.ndarray]
    prompt_lens: Sequence[int]
    other_effort: Sequence[np.ndarray] = ()
    k: int = 0
    tolerance_nats: float = 0.03


def scores_of(case: Examination, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The examined teacher's log-probs, which must be log-probs of what was asked.

    Raises:
        TeacherError: If they are not.
    """
    scores = case.teacher.score(sequences)
    require_logprobs(sequences, scores)
    return scores


def mean_gap(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Mean absolute difference over all tokens, nats."""
    gaps = [np.abs(a - b) for a, b in zip(first, second, strict=True)]
    return float(np.concatenate(gaps).mean())


def likeliest(case: Examination, teacher: Teacher) -> list[TopScores] | None:
    """The likeliest ids of a few conversations; None where none are asked for or given."""
    if not case.k or TARGETS not in teacher.provides or not isinstance(teacher, TopTeacher):
        return None
    return teacher.score_top(list(case.asked[:PROBES]), case.k)


@dataclass(frozen=True)
class Fit:
    """How a teacher's top log-probs follow a reference's: slope, offset and what is left, nats."""

    slope: float
    offset: float
    residual: float
    tolerance_nats: float

    @property
    def is_tempered(self) -> bool:
        """Whether the slope is more than noise makes it."""
        return abs(self.slope - 1) > max(_SLOPE, self.residual)

    @property
    def is_offset(self) -> bool:
        """Whether all log-probs of a place are higher or lower together."""
        return abs(self.offset) > max(self.tolerance_nats / 2, self.residual)


def fit_to_reference(case: Examination) -> Fit | None:
    """A least-squares fit within places; None without a reference that names likeliest ids."""
    tops = likeliest(case, case.teacher)
    theirs = likeliest(case, case.reference) if case.reference else None
    if tops is None or theirs is None:
        return None
    mine, other = [], []
    for top, reference in zip(tops, theirs, strict=True):
        if top.top_ids.shape != reference.top_ids.shape:
            return None
        for ids, values, ids_2, values_2 in zip(
            top.top_ids, top.top_logprobs, reference.top_ids, reference.top_logprobs, strict=True
        ):
            _, at, at_2 = np.intersect1d(ids, ids_2, return_indices=True)
            if len(at) > 1:
                mine.append(values[at].astype(np.float64))
                other.append(values_2[at_2].astype(np.float64))
    if not mine:
        return None
    x = np.concatenate([v - v.mean() for v in other])
    y = np.concatenate([v - v.mean() for v in mine])
    spread = float(x @ x)
    slope = float(x @ y) / spread if spread > 0 else 1.0
    offsets = [float(m.mean() - o.mean()) for m, o in zip(mine, other, strict=True)]
    residual = float(np.abs(y - slope * x).mean())
    return Fit(slope, float(np.median(offsets)), residual, case.tolerance_nats)
