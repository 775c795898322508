"""What a sampled completion says, or which rule of the format it breaks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vpmoe.data.o200k import decode
from vpmoe.vocabulary import (
    CALL,
    CHANNEL,
    COMPLETION_HEADER,
    END,
    END_OF_TEXT,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
)

Failure = Literal["no_final", "no_end", "repetition", "invalid_header"]

FAILURES: tuple[Failure, ...] = ("no_final", "no_end", "repetition", "invalid_header")
_CHANNEL_NAMES = ("analysis", "commentary", "final")
_LONGEST_HEADER = 8  # tokens; far more than any real channel name
_LONGEST_PERIOD = 128
_FEWEST_REPEATS = 4
_FEWEST_REPEATED_TOKENS = 32


@dataclass(frozen=True)
class ParsedCompletion:
    """A completion's messages.

    Attributes:
        reasoning: Text of the analysis messages, joined by newlines; None if there are none.
        final: Text of the final message as far as it goes; None if none was begun.
        failure: The first broken rule, None for a well-formed completion:
            "invalid_header": a message does not open with a known channel, or a special token
            stands inside text; "repetition": it was cut while repeating itself;
            "no_final": it stopped or was cut before a final message;
            "no_end": its final message does not end in `<|return|>`.
    """

    reasoning: str | None
    final: str | None
    failure: Failure | None


def parse_completion(tokens: Sequence[int] | np.ndarray) -> ParsedCompletion:
    """The messages of a completion that starts right after `COMPLETION_HEADER`.

    Args:
        tokens: Sampled ids, including the stop token if there is one.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    channels: list[tuple[str, str]] = []
    failure: Failure | None = None
    at = 0
    while failure is None:
        channel, at = _header(ids, at)
        if channel is None:
            failure = "invalid_header" if at < ids.size else _cut(ids, channels)
            break
        stops = np.flatnonzero(ids[at:] >= FIRST_SPECIAL)
        end = at + int(stops[0]) if stops.size else ids.size
        channels.append((channel, decode(ids[at:end])))
        if end == ids.size:
            failure = _cut(ids, channels)
        elif ids[end] == END and channel != "final":
            opened = ids[end + 1 : end + 3].tolist()
            at = end + 3
            if opened != list(COMPLETION_HEADER):
                is_cut = opened == list(COMPLETION_HEADER)[: len(opened)]
                failure = _cut(ids, channels) if is_cut else "invalid_header"
        else:
            failure = _last(ids, end, channel)
            break
    reasoning = [text for name, text in channels if name == "analysis"]
    finals = [text for name, text in channels if name == "final"]
    return ParsedCompletion(
        reasoning="\n".join(reasoning) if reasoning else None,
        final=finals[-1] if finals else None,
        failure=failure,
    )


def _header(ids: np.ndarray, at: int) -> tuple[str | None, int]:
    """The channel named at `at` and where its text starts; None where the header is wrong.

    A wrong header leaves the place below the end of `ids`, one that was only cut short at the end.
    """
    rest = ids[at : at + _LONGEST_HEADER]
    if not rest.size:
        return None, ids.size
    if rest[0] != CHANNEL:
        return None, at
    specials = np.flatnonzero(rest[1:] >= FIRST_SPECIAL) + 1
    if not specials.size:
        return None, (ids.size if at + rest.size == ids.size < at + _LONGEST_HEADER else at)
    name = decode(rest[1 : specials[0]])
    if rest[specials[0]] != MESSAGE or name not in _CHANNEL_NAMES:
        return None, at
    return name, at + int(specials[0]) + 1


def _last(ids: np.ndarray, end: int, channel: str) -> Failure | None:
    """The rule broken by the special token that ends the last message."""
    stop = ids[end]
    if channel == "final":
        if stop == RETURN:
            return None if end == ids.size - 1 else "invalid_header"
        return "no_end" if stop in (END, CALL, END_OF_TEXT) else "invalid_header"
    return "no_final" if stop in (RETURN, CALL, END_OF_TEXT) else "invalid_header"


def _cut(ids: np.ndarray, channels: list[tuple[str, str]]) -> Failure:
    if is_repeating(ids):
        return "repetition"
    return "no_end" if channels and channels[-1][0] == "final" else "no_final"


def is_repeating(ids: np.ndarray) -> bool:
    """True if the tail is one phrase over and over: four times, and 32 tokens, at the least."""
    for period in range(1, min(_LONGEST_PERIOD, ids.size // _FEWEST_REPEATS) + 1):
        span = max(period * _FEWEST_REPEATS, _FEWEST_REPEATED_TOKENS)
        if span > ids.size:
            continue
        tail = ids[-span:]
        if np.array_equal(tail[period:], tail[:-period]):
            return True
    return False
