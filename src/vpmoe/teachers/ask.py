"""Asking a teacher for what a codec keeps, and refusing answers that cannot be right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


def checked(
    codec: Codec,
    sequences: Sequence[np.ndarray],
    said: Said,
    *,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> Entries | None:
    """A teacher's distributions at all places of sequences, one after the other.

    Args:
        codec: What it was asked for.
        sequences: What it read.
        said: Its answers.
        device: Where they are looked at, and stay.
        first: Number of the first sequence, for complaints.

    Returns:
        None where the codec keeps log-probs alone.

    Raises:
        TeacherError: If they cannot be a teacher's; about the first place that is wrong.
    """
    if codec.needs == "logprobs":
        return None
    pairs = [_arrays(one) for one in said]
    for index, (sequence, (ids, values)) in enumerate(zip(sequences, pairs, strict=True)):
        _require_shape(first + index, sequence, ids, values, codec.asked)
    ids, values = (_joined(part, device) for part in zip(*pairs, strict=True))
    tokens = _joined([sequence[1:].astype(np.int32) for sequence in sequences], device)
    own = _joined([one.logprobs for one in said], device)  # pyright: ignore[reportAttributeAccessIssue]
    places = _Places(first, sequences, ids, values, own, tokens)
    places.require(_CHECKS_OF_TOP if codec.needs == "top" else _CHECKS_OF_DRAWS)
    if codec.needs == "top":
        return entries_of_top(ids, values)
    return Entries(ids.long(), values, torch.full_like(own, -torch.inf))


def _arrays(one: np.ndarray | TopScores | SampledScores) -> tuple[np.ndarray, np.ndarray]:
    """Ids and their values."""
    if isinstance(one, TopScores):
        return one.top_ids, one.top_logprobs
    assert isinstance(one, SampledScores)
    return one.ids, one.log_weights


def _joined(parts: Sequence[np.ndarray], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device)


def _require_shape(
    index: int, sequence: np.ndarray, ids: np.ndarray, values: np.ndarray, width: int
) -> None:
    if ids.shape != (len(sequence) - 1, width) or values.shape != ids.shape:
        raise TeacherError(
            f"sequence {index} has {len(sequence)} tokens, the teacher answered ids of shape "
            f"{ids.shape} and values of shape {values.shape} where {width} a place were asked for"
        )


@dataclass(frozen=True)
class _Places:
    """Answers about all places of some sequences, one after the other, on one device."""

    first: int
    sequences: Sequence[np.ndarray]
    ids: Tensor  # int32 [places, entries]
    values: Tensor  # float32 [places, entries]
    own: Tensor  # float32 [places], log-probs of the tokens
    tokens: Tensor  # int32 [places]

    def require(self, checks: "Sequence[_Check]") -> None:
        """Refuse the first place that a check finds wrong."""
        if not len(self.ids):
            return
        wrong = torch.stack([check.wrong(self) for check in checks])
        if not bool(wrong.any()):  # the one wait for the device
            return
        place = int(wrong.any(dim=0).nonzero()[0, 0])
        check = checks[int(wrong[:, place].nonzero()[0, 0])]
        ends = np.cumsum([len(sequence) - 1 for sequence in self.sequences])
        index = int(np.searchsorted(ends, place, side="right"))
        begin = int(ends[index - 1]) if index else 0
        where = f"token {place - begin + 1} of sequence {self.first + index}"
        raise TeacherError(check.message(self, place).format(where=where), hint=check.hint)


@dataclass(frozen=True)
class _Check:
    """Where something is wrong, and how it is said; the message leaves room for `{where}`."""

    wrong: Callable[[_Places], Tensor]
    message: Callable[[_Places, int], str]
    hint: str = ""


def _unknown(places: _Places) -> Tensor:
    return ((places.ids < 0) | (places.ids >= VOCAB_SIZE)).any(dim=1)


def _say_unknown(places: _Places, place: int) -> str:
    ids = places.ids[place]
    named = int(ids[(ids < 0) | (ids >= VOCAB_SIZE)][0])
    return f"the teacher named id {named} for {{where}}, which is outside the vocabulary"


def _twice(places: _Places) -> Tensor:
    # Unused places hold the same id: numbers of their own keep them apart.
    apart = -1 - torch.arange(places.ids.shape[1], dtype=torch.int32, device=places.ids.device)
    marked = torch.where(places.values > -torch.inf, places.ids, apart)
    if marked.is_cpu:  # numpy sorts several int32 at a time
        marked = torch.from_numpy(np.sort(marked.numpy(), axis=1))
    else:
        marked = marked.sort(dim=1).values
    return (marked[:, 1:] == marked[:, :-1]).any(dim=1)


def _no_head(places: _Places) -> Tensor:
    """Values that are not the head of a distribution, the likeliest first."""
    values = places.values
    wrong = ~(values.isfinite() & (values <= MAX_LOGPROB_NATS)).all(dim=1)
    wrong |= (values[:, 1:] > values[:, :-1]).any(dim=1)
    return wrong | ~(values.double().exp().sum(dim=1) <= 1 + _MASS_TOLERANCE)


def _no_shares(places: _Places) -> Tensor:
    """Weights of drawn ids that do not add up to one."""
    return ~((places.values.double().exp().sum(dim=1) - 1).abs() <= _MASS_TOLERANCE)


def _say_no_shares(places: _Places, place: int) -> str:
    total = float(places.values[place].double().exp().sum())
    return f"the weights of the ids that the teacher drew for {{where}} add up to {total:.4f}"


def _say_no_head(places: _Places, place: int) -> str:
    return (
        "the teacher's likeliest log-probs for {where} are not falling log-probs of a mass of at "
        f"most one: {places.values[place, :4].tolist()}..."
    )


def _apart(places: _Places) -> Tensor:
    """Top lists that belong to other places than the log-probs of the tokens."""
    allowed = 0.05 + 0.01 * places.own.abs()  # a server may round one of the two
    far = ~((places.values - places.own[:, None]).abs() <= allowed[:, None])
    return (far & (places.ids == places.tokens[:, None])).any(dim=1)


def _say_apart(places: _Places, place: int) -> str:
    listed = float(places.values[place][places.ids[place] == places.tokens[place]][0])
    return (
        f"the teacher gives {{where}} a log-prob of {float(places.own[place]):.4f}, and "
        f"{listed:.4f} among its likeliest"
    )


_CHECKS_OF_ANY = (
    _Check(_unknown, _say_unknown),
    _Check(_twice, lambda *_: "the teacher named an id twice for {where}"),
)
_CHECKS_OF_DRAWS = (
    *_CHECKS_OF_ANY,
    _Check(_no_shares, _say_no_shares, "score_sampled must answer shares of all draws"),
)
_CHECKS_OF_TOP = (
    *_CHECKS_OF_ANY,
    _Check(
        _no_head,
        _say_no_head,
        "the teacher must answer log-probs at temperature 1, the likeliest first",
    ),
    _Check(_apart, _say_apart, "the two lists of its answer speak of different places"),
)


def _cannot(teacher: Teacher, what: str, method: str) -> TeacherError:
    return TeacherError(
        f"teacher {teacher.identity.name} cannot {what}: it has no {method}",
        hint="choose codec.kind = logprob, or another teacher",
    )
