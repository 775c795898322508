"""Structured truncation: the answer stays whole, the reasoning is cut from the left.

The rules, in the order in which they give way, until the conversation fits:

1. The final message is kept whole; a row whose final does not fit is dropped.
2. The analysis is cut to a suffix of its content, header and end kept.
3. The latest user message is cut to a suffix of its content, header and end kept.
4. The system message is dropped whole, then the developer message.

What rule 4 frees goes back to the user message first, then to the analysis. Earlier turns are never
cut: a row that still does not fit is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vpmoe.data.o200k import mid_character
from vpmoe.vocabulary import ANALYSIS, ASSISTANT, DEVELOPER, MESSAGE, START, SYSTEM, USER

FINAL_TOO_LONG = "final_too_long"
NO_ROOM = "no_room_beside_final"

CUTS = ("analysis", "user", "system_dropped", "developer_dropped")


@dataclass(frozen=True)
class Truncated:
    """A conversation made to fit, or the reason why it cannot.

    Attributes:
        tokens: The shorter document, end of text included; None if the row is dropped.
        cuts: Which of `CUTS` were made.
        reason: Why the row is dropped.
    """

    tokens: np.ndarray | None
    cuts: frozenset[str] = frozenset()
    reason: str | None = None


@dataclass(frozen=True)
class _Part:
    """One message: header through message token, content, and the end token."""

    tokens: np.ndarray
    header: int

    @property
    def role(self) -> int:
        return int(self.tokens[1])

    @property
    def is_analysis(self) -> bool:
        return self.role == ASSISTANT and int(self.tokens[3]) == ANALYSIS

    @property
    def content(self) -> np.ndarray:
        return self.tokens[self.header : -1]

    def suffix(self, room: int) -> "_Part":
        """This message with at most `room` tokens of content, taken from the right."""
        content = self.content
        begin = max(content.size - max(room, 0), 0)
        rest = content[begin:]
        starts = np.flatnonzero(~mid_character()[rest])
        rest = rest[starts[0] :] if starts.size else rest[:0]
        tokens = np.concatenate([self.tokens[: self.header], rest, self.tokens[-1:]])
        return _Part(tokens, self.header)


def truncate(document: np.ndarray, max_length: int) -> Truncated:
    """`document` cut by the rules above to at most `max_length` tokens.

    Args:
        document: Tokens of one well-formed conversation, end of text included.
        max_length: Tokens allowed, end of text included.
    """
    if document.size <= max_length:
        return Truncated(document)
    parts = _split(document[:-1])
    room = max_length - 1
    if parts[-1].tokens.size > room:
        return Truncated(None, reason=FINAL_TOO_LONG)
    dropped: list[str] = []
    for role, name in ((None, ""), (SYSTEM, "system_dropped"), (DEVELOPER, "developer_dropped")):
        kept = [p for p in parts if p.role != role]
        if len(kept) < len(parts):
            dropped.append(name)
        parts = kept
        fitted = _fit(parts, room)
        if fitted is not None:
            shorter, cuts = fitted
            tokens = np.concatenate([*(p.tokens for p in shorter), document[-1:]])
            return Truncated(tokens, frozenset([*cuts, *dropped]))
    return Truncated(None, reason=NO_ROOM)


def _split(tokens: np.ndarray) -> list[_Part]:
    starts = np.flatnonzero(tokens == START)
    messages = np.split(tokens, starts[1:])
    return [_Part(m, int(np.flatnonzero(m == MESSAGE)[0]) + 1) for m in messages]


def _fit(parts: Sequence[_Part], room: int) -> tuple[list[_Part], list[str]] | None:
    """The parts with analysis, then latest user message cut to `room`; None if that is not enough.

    Several analysis messages give way from the first to the last.
    """
    shorter = list(parts)
    cuts: list[str] = []
    last_user = max(i for i, p in enumerate(parts) if p.role == USER)
    order = [(i, "analysis") for i, p in enumerate(parts) if p.is_analysis]
    for index, name in [*order, (last_user, "user")]:
        over = sum(p.tokens.size for p in shorter) - room
        if over <= 0:
            break
        shorter[index] = shorter[index].suffix(shorter[index].content.size - over)
        cuts.append(name)
    fits = sum(p.tokens.size for p in shorter) <= room
    return (shorter, cuts) if fits else None
