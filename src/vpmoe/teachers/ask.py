"""Asking a teacher for what a codec keeps, and refusing answers that cannot be right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vpmoe.errors import TeacherError
from vpmoe.teachers.base import (
    MAX_LOGPROB_NATS,
    SampledScores,
    SampledTeacher,
    Teacher,
    TopScores,
    TopTeacher,
    require_logprobs,
)
from vpmoe.teachers.codecs.base import Codec, Entries, entries_of_top
from vpmoe.vocabulary import VOCAB_SIZE

# By how much float32 sums of a whole vocabulary, and half precision before them, may miss one.
_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answer:
    """What a teacher said about one sequence.

    Attributes:
        logprobs: float32 [n - 1], of every token after the first.
        entries: Distributions at the same places; None where the codec keeps log-probs alone.
    """

    logprobs: np.ndarray
    entries: Entries | None = None


Said = Sequence[np.ndarray] | Sequence[TopScores] | Sequence[SampledScores]


def said_of(teacher: Teacher, codec: Codec, sequences: Sequence[np.ndarray]) -> Said:
    """A teacher's answer about sequences; `checked` looks at its distributions, which takes longer.

    Raises:
        TeacherError: If the teacher cannot say what the codec keeps, or its log-probs are none.
    """
    if codec.needs == "logprobs":
        scores = teacher.score(sequences)
        require_logprobs(sequences, scores)
        return scores
    if codec.needs == "top":
        if not isinstance(teacher, TopTeacher):
            raise _cannot(teacher, "name its likeliest tokens", "score_top")
        said, kind = teacher.score_top(sequences, codec.asked), TopScores
    elif not isinstance(teacher, SampledTeacher):
        raise _cannot(teacher, "draw tokens", "score_sampled")
    else:
        said, kind = teacher.score_sampled(sequences, codec.asked, codec.seed), SampledScores
    for one in said:
        if not isinstance(one, kind):
            raise TeacherError(
                f"teacher {teacher.identity.name} answered {type(one).__name__} where "
                f"{kind.__name__} was asked for",
                hint="its scoring methods must answer as the protocols of vpmoe.teachers.base say",
            )
    require_logprobs(sequences, [one.logprobs for one in said])
    return said


def checked(codec: Codec, sequences: Sequence[np.ndarray], said: Said) -> list[Answer]:
    """What a teacher said about sequences, as far as a codec keeps it.

    Raises:
        TeacherError: If its distributions cannot be.
    """
    return [
        _answer(codec, index, sequence, one)
        for index, (sequence, one) in enumerate(zip(sequences, said, strict=True))
    ]


def _answer(
    codec: Codec, index: int, sequence: np.ndarray, one: np.ndarray | TopScores | SampledScores
) -> Answer:
    if isinstance(one, TopScores):
        _require_top(index, sequence, one.top_ids, one.top_logprobs, codec.asked)
        _require_agreement(index, sequence, one.logprobs, one.top_ids, one.top_logprobs)
        top = torch.from_numpy(one.top_ids), torch.from_numpy(one.top_logprobs)
        return Answer(one.logprobs, entries_of_top(*top))
    if isinstance(one, SampledScores):
        _require_ids(index, sequence, one.ids, one.log_weights, codec.asked)
        ids, weights = torch.from_numpy(one.ids).long(), torch.from_numpy(one.log_weights)
        nothing = torch.full((len(ids),), -torch.inf)
        return Answer(one.logprobs, Entries(ids, weights, nothing))
    return Answer(one)


def _cannot(teacher: Teacher, what: str, method: str) -> TeacherError:
    return TeacherError(
        f"teacher {teacher.identity.name} cannot {what}: it has no {method}",
        hint="choose codec.kind = logprob, or another teacher",
    )


def _require_ids(
    index: int, sequence: np.ndarray, ids: np.ndarray, values: np.ndarray, width: int
) -> None:
    """Refuse arrays of another shape, and ids outside the vocabulary or named twice."""
    if ids.shape != (len(sequence) - 1, width) or values.shape != ids.shape:
        raise TeacherError(
            f"sequence {index} has {len(sequence)} tokens, the teacher answered ids of shape "
            f"{ids.shape} and values of shape {values.shape} where {width} a place were asked for"
        )
    used = values > -np.inf
    known = (ids >= 0) & (ids < VOCAB_SIZE)
    if not known.all():
        place = int(np.flatnonzero(~known.all(axis=1))[0])
        raise TeacherError(
            f"the teacher named id {ids[place][~known[place]][0]} for token {place + 1} of "
            f"sequence {index}, which is outside the vocabulary"
        )
    # Unused places hold the same id: numbers of their own keep them apart.
    marked = np.sort(np.where(used, ids, -1 - np.arange(ids.shape[1])), axis=1)
    twice = np.flatnonzero((marked[:, 1:] == marked[:, :-1]).any(axis=1))
    if twice.size:
        raise TeacherError(
            f"the teacher named an id twice for token {int(twice[0]) + 1} of sequence {index}"
        )


def _require_top(
    index: int, sequence: np.ndarray, ids: np.ndarray, values: np.ndarray, width: int
) -> None:
    """Refuse what is not the head of a distribution, the likeliest first."""
    _require_ids(index, sequence, ids, values, width)
    wrong = ~(np.isfinite(values) & (values <= MAX_LOGPROB_NATS)).all(axis=1)
    wrong |= (values[:, 1:] > values[:, :-1]).any(axis=1)
    wrong |= np.exp(values.astype(np.float64)).sum(axis=1) > 1 + _MASS_TOLERANCE
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        raise TeacherError(
            f"the teacher's likeliest log-probs for token {place + 1} of sequence {index} are not "
            f"falling log-probs of a mass of at most one: {values[place][:4].tolist()}...",
            hint="the teacher must answer log-probs at temperature 1, the likeliest first",
        )


def _require_agreement(
    index: int,
    sequence: np.ndarray,
    logprobs: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
) -> None:
    """Refuse top lists that belong to other places than the log-probs of the tokens."""
    named = ids == np.asarray(sequence)[1:, None]
    place, column = np.nonzero(named)
    apart = np.abs(values[place, column] - logprobs[place])
    allowed = 0.05 + 0.01 * np.abs(logprobs[place])  # a server may round one of the two
    if (apart > allowed).any():
        first = int(np.flatnonzero(apart > allowed)[0])
        raise TeacherError(
            f"the teacher gives token {place[first] + 1} of sequence {index} a log-prob of "
            f"{logprobs[place[first]]:.4f}, and {values[place[first], column[first]]:.4f} among "
            "its likeliest",
            hint="the two lists of its answer speak of different places",
        )
