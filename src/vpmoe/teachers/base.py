"""What a teacher is: it tells how likely it finds the next token of given sequences."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from vpmoe.errors import TeacherError
from vpmoe.vocabulary import VOCAB_SIZE

TEACHER_LOGPROBS = "teacher_logprobs"  # log-probs of a dataset's labels
ROLLOUT_LOGPROBS = "rollout_logprobs"  # log-probs of text that a student has just sampled
TARGETS = "target_ids"  # the most likely tokens at a dataset's labels, or drawn ones
TEACHER_HIDDEN = "teacher_hidden"  # final states, which with the teacher's head say everything

# float32 log-softmax of a certain token may end a rounding error above zero.
MAX_LOGPROB_NATS = 1e-4


@dataclass(frozen=True)
class TeacherIdentity:
    """Everything that decides a teacher's answers, for manifests and for refusing a mix of two.

    Attributes:
        name: Hub id, or the name of the folder; never a path of one machine.
        revision: Commit of the hub repository; empty for a local folder.
        weights_sha256: Over names and contents of the weight, config and vocabulary files.
        dtype: In which the network computes.
        quantization: How the weights were stored, such as "mxfp4"; "none" otherwise.
        vocab_sha256: Of o200k, or of the subset of it that the teacher knows.
    """

    name: str
    revision: str
    weights_sha256: str
    dtype: str
    quantization: str
    vocab_sha256: str

    def as_dict(self) -> dict[str, str]:
        """The same as plain JSON."""
        return asdict(self)


@runtime_checkable
class Teacher(Protocol):
    """A model that scores tokens it is given.

    Attributes:
        provides: `TEACHER_LOGPROBS`, `ROLLOUT_LOGPROBS`, `TARGETS`, `TEACHER_HIDDEN`: compared
            with what a loss needs.
    """

    provides: ClassVar[frozenset[str]]

    @property
    def identity(self) -> TeacherIdentity:
        """Who answers."""
        ...

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probabilities of every token after the first, given the tokens before it.

        Args:
            sequences: o200k ids, each a conversation of its own.

        Returns:
            For each sequence a float32 array one shorter than it: element t holds
            log p(sequence[t + 1] | sequence[: t + 1]) in nats, at temperature 1. It does not
            depend on the other sequences, apart from rounding.
        """
        ...


@dataclass(frozen=True)
class TopScores:
    """A teacher's opinion of one sequence: of its tokens, and of the likeliest ones.

    Attributes:
        logprobs: float32 [n - 1], as `Teacher.score` gives them.
        top_ids: int32 [n - 1, K], the K likeliest ids at each place, the likeliest first.
        top_logprobs: float32 [n - 1, K], theirs; not renormalised, so that what is missing to one
            is the mass of all other ids.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@runtime_checkable
class TopTeacher(Teacher, Protocol):
    """A teacher that also names the likeliest tokens; `provides` has `TARGETS`."""

    def score_top(self, sequences: Sequence[np.ndarray], k: int) -> list[TopScores]:
        """As `score`, with the K likeliest ids at every place; of equal ones the lower id first."""
        ...


@dataclass(frozen=True)
class SampledScores:
    """A teacher's opinion of one sequence: of its tokens, and of ids drawn from it at random.

    The weights of a place add up to one, and their expectation is the teacher's distribution, so
    that a cross-entropy against them has the right gradient on average.

    Attributes:
        logprobs: float32 [n - 1], as `Teacher.score` gives them.
        ids: int32 [n - 1, draws], what was drawn at each place, each id once, ascending; 0 in
            unused places.
        log_weights: float32 [n - 1, draws], in nats; -inf in unused places.
    """

    logprobs: np.ndarray
    ids: np.ndarray
    log_weights: np.ndarray


@runtime_checkable
class SampledTeacher(Teacher, Protocol):
    """A teacher that also draws tokens; `provides` has `TARGETS`."""

    def score_sampled(
        self, sequences: Sequence[np.ndarray], num_draws: int, seed: int
    ) -> list[SampledScores]:
        """As `score`, with ids drawn at every place.

        The draws are decided by `seed` and the sequence, not by the sequences beside it.
        """
        ...


@runtime_checkable
class HiddenTeacher(Teacher, Protocol):
    """A teacher that shows its final states; `provides` has `TEACHER_HIDDEN`."""

    @property
    def head_weight(self) -> Tensor:
        """[V, Dt] output embedding: logits are states times this, transposed.

        One row per id that the teacher knows, ascending: all of o200k, or the subset of it whose
        hash is `identity.vocab_sha256`.
        """
        ...

    def hidden(self, sequences: Sequence[np.ndarray]) -> list[Tensor]:
        """Final normed states [n - 1, Dt] of each sequence: place t predicts token t + 1.

        They stay on the teacher's device, in the dtype that the network computes in.
        """
        ...


def num_known_ids(teacher: Teacher) -> int:
    """How many ids a teacher can name; all of o200k where it does not show its head."""
    return len(teacher.head_weight) if isinstance(teacher, HiddenTeacher) else VOCAB_SIZE


def known_ids(teacher: Teacher) -> np.ndarray | None:
    """The ids of o200k that a teacher can name, where it says that they are a subset."""
    subset = getattr(teacher, "subset", None)
    return None if subset is None else subset.ids


def require_logprobs(sequences: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> None:
    """Refuse answers that cannot be log-probabilities of the sequences asked about.

    Raises:
        TeacherError: Naming the first sequence with a wrong length, or with a value that is not
            finite or above zero.
    """
    if len(scores) != len(sequences):
        raise TeacherError(
            f"asked about {len(sequences)} sequences, the teacher answered {len(scores)}"
        )
    for index, (sequence, logprobs) in enumerate(zip(sequences, scores, strict=True)):
        if logprobs.shape != (len(sequence) - 1,):
            raise TeacherError(
                f"sequence {index} has {len(sequence)} tokens, the teacher answered an array of "
                f"shape {logprobs.shape}",
                hint="one log-prob per token after the first is expected",
            )
        wrong = np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= MAX_LOGPROB_NATS)))
        if wrong.size:
            place = int(wrong[0])
            raise TeacherError(
                f"the teacher's log-prob of token {place + 1} of sequence {index} is "
                f"{logprobs[place]}",
                hint="try dtype = float32; half precision may overflow",
            )
