"""A conversation with a student, as it is written: pieces of text by channel."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.batch import ReasoningEffort
from vpmoe.data.completion import ParsedCompletion, parse_completion
from vpmoe.data.harmony import Renderer, decode, encode, o200k
from vpmoe.errors import DataError
from vpmoe.models.student import Student
from vpmoe.rollouts.draw import Draw
from vpmoe.rollouts.sampler import Sampler
from vpmoe.vocabulary import (
    CHANNEL,
    COMPLETION_HEADER,
    END,
    FINAL,
    FIRST_SPECIAL,
    MESSAGE,
    START,
    USER,
)


@dataclass(frozen=True)
class Piece:
    """A bit of text that the student has just written.

    Attributes:
        channel: "analysis", "final" or whatever the header said.
        text: Whole characters only.
    """

    channel: str
    text: str


class ChannelReader:
    """Tokens of one completion to pieces of text, as they come."""

    def __init__(self) -> None:
        self._channel = ""
        self._header: list[int] | None = []  # None while inside a message's text
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, token: int) -> Piece | None:
        """The text that this token completes, if any; headers and ends are no text."""
        if self._header is not None:
            self._read_header(token)
            return None
        if token >= FIRST_SPECIAL:
            text = self._bytes.decode(b"", final=True)
            self._bytes.reset()
            self._header = []
        else:
            text = self._bytes.decode(o200k().decode_single_token_bytes(token))
        return Piece(self._channel, text) if text else None

    def _read_header(self, token: int) -> None:
        if self._header is None:
            return
        if token == MESSAGE:
            names = self._header
            start = names.index(CHANNEL) + 1 if CHANNEL in names else len(names)
            self._channel = decode(names[start:])
            self._header = None
        else:
            self._header.append(token)


class ChatSession:
    """Turns of one conversation; reasoning of earlier turns is dropped, as Harmony asks.

    Args:
        student: Who answers.
        renderer: How its training data was rendered.
        effort: Named in the system message; the renderer's own where absent.
        max_new_tokens: An answer is cut there.
        temperature: 0 takes the likeliest token each time.
        top_p: Share of the likeliest tokens that is drawn from.
        seed: Same seed and questions, same answers.
    """

    def __init__(
        self,
        student: Student,
        renderer: Renderer,
        *,
        effort: ReasoningEffort | None = None,
        max_new_tokens: int = 1_024,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.student = student
        self.renderer = renderer
        self.effort: ReasoningEffort | None = effort
        self.max_new_tokens = max_new_tokens
        self._sampler = Sampler(student, max_batch=1)
        self._draw = Draw(temperature, top_p, seed)
        self._history = np.empty(0, dtype=np.int64)
        self._turns = 0
        self.answer: ParsedCompletion | None = None

    def reset(self) -> None:
        """Forget the conversation."""
        self._history = np.empty(0, dtype=np.int64)

    def prompt(self, query: str) -> np.ndarray:
        """What the student reads when asked `query` now, ending in the assistant's header."""
        first = self.renderer.prompt(query, self.effort).astype(np.int64)
        if not self._history.size:
            return first
        turn = [START, USER, MESSAGE, *encode(query).tolist(), END, *COMPLETION_HEADER]
        return np.concatenate([self._history, turn])

    def ask(self, query: str) -> Iterator[Piece]:
        """The answer as it is written; afterwards `answer` holds it whole.

        A turn without a complete final message is not kept in the history.

        Raises:
            DataError: If the question cannot be rendered, or uses tokens the student lacks.
        """
        prompt = self.prompt(query)
        self._require_known(prompt)
        reader = ChannelReader()
        written: list[int] = []
        for token in self._tokens(prompt):
            written.append(token)
            piece = reader.read(token)
            if piece is not None:
                yield piece
        self._turns += 1
        self.answer = parse_completion(written)
        if self.answer.failure is None:
            final = _final_tokens(written)
            kept = [*COMPLETION_HEADER, CHANNEL, FINAL, MESSAGE, *final, END]
            stem = prompt[: -len(COMPLETION_HEADER)]
            self._history = np.concatenate([stem, kept]).astype(np.int64)

    def _require_known(self, prompt: np.ndarray) -> None:
        subset = self.student.config.vocab_subset
        if subset is None:
            return
        known = set(subset)
        unknown = [int(token) for token in prompt if int(token) not in known]
        if unknown:
            words = ", ".join(repr(decode([token])) for token in dict.fromkeys(unknown))
            raise DataError(
                f"the student's vocabulary subset lacks {words}",
                hint="ask in words that its training data used",
            )

    def _tokens(self, prompt: np.ndarray) -> Iterator[int]:
        return self._sampler.stream(
            prompt, max_new_tokens=self.max_new_tokens, draw=self._draw, request=self._turns
        )


def _final_tokens(completion: Sequence[int]) -> list[int]:
    """The text of the last message, without its header and its end."""
    last = len(completion) - 1 - list(completion)[::-1].index(MESSAGE)
    return list(completion[last + 1 : -1])
