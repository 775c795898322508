"""The grammar of a rendered conversation, checked and read off its tokens, many at a time.

    conversation = {message end} final-message return end-of-text
    message      = start (system | developer | user) message-token text
                 | start assistant channel (analysis | final) message-token text

Harmony's own parser lets nested starts, odd channels and foreign ids pass, so shards are judged by
this grammar instead. It works on whole blocks of documents with array operations only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vpmoe.spans import Span
from vpmoe.vocabulary import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    DEVELOPER,
    END,
    END_OF_TEXT,
    FINAL,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    START,
    SYSTEM,
    USER,
    VOCAB_SIZE,
)

Report = Callable[[np.ndarray, str], None]  # (indices into the tokens, what is wrong there)

_PROMPT_ROLES = (SYSTEM, DEVELOPER, USER)
# What may follow each special token among the special tokens, and whether right behind it.
_FOLLOWERS = {
    START: (CHANNEL, MESSAGE),
    CHANNEL: (MESSAGE,),
    MESSAGE: (END, RETURN),
    END: (START,),
    RETURN: (END_OF_TEXT,),
    END_OF_TEXT: (START,),
}


@dataclass(frozen=True)
class Structure:
    """What the tokens of a block of documents say about themselves.

    Attributes:
        span_ids: `Span` of each token (not of each label), uint8.
        problems: Document index -> what breaks the grammar there first.
        starts: Index of every `<|start|>` token.
    """

    span_ids: np.ndarray
    problems: dict[int, str]
    starts: np.ndarray


def read_structure(flat: np.ndarray, lengths: np.ndarray) -> Structure:
    """The spans and grammar errors of documents that lie end to end in `flat`.

    Args:
        flat: Token ids, each document closed by `END_OF_TEXT`.
        lengths: Tokens of each document.
    """
    ends = np.cumsum(lengths)
    problems: dict[int, str] = {}

    def report(indices: np.ndarray, what: str) -> None:
        for document in np.unique(np.searchsorted(ends, indices, side="right")):
            problems.setdefault(int(document), what)

    report(np.flatnonzero((flat < 0) | (flat >= VOCAB_SIZE)), "token id outside the vocabulary")
    where = np.flatnonzero(flat >= FIRST_SPECIAL)
    kinds = flat[where]
    report((ends - lengths)[flat[ends - lengths] != START], "does not begin with a message")
    report(where[~np.isin(kinds, list(_FOLLOWERS))], "special token of no training conversation")
    _check_ends(flat, ends, where[kinds == END_OF_TEXT], problems)
    _check_order(where, kinds, report)
    starts = where[kinds == START]
    _check_headers(flat, where, kinds, report)
    return Structure(_spans(flat, starts, ends), problems, starts)


def _check_ends(
    flat: np.ndarray, ends: np.ndarray, closers: np.ndarray, problems: dict[int, str]
) -> None:
    if np.array_equal(closers, ends - 1):
        return
    for document, end in enumerate(ends):
        begin = ends[document - 1] if document else 0
        inside = np.flatnonzero(flat[begin:end] == END_OF_TEXT)
        if inside.tolist() != [end - begin - 1]:
            problems.setdefault(document, "does not end in exactly one end of text")


def _check_order(where: np.ndarray, kinds: np.ndarray, report: Report) -> None:
    following = np.append(kinds[1:], START)  # the block's last token is an end of text
    for kind, allowed in _FOLLOWERS.items():
        here = kinds == kind
        report(where[here & ~np.isin(following, allowed)], "special tokens out of order")
    distance = np.append(np.diff(where), 1)
    adjacent = np.isin(kinds, (END, RETURN, END_OF_TEXT))
    report(where[adjacent & (distance != 1)], "text between messages")
    header = np.isin(kinds, (START, CHANNEL))
    report(where[header & (distance != 2)], "message header of a wrong length")


def _check_headers(flat: np.ndarray, where: np.ndarray, kinds: np.ndarray, report: Report) -> None:
    last = flat.size - 1
    starts, channels = where[kinds == START], where[kinds == CHANNEL]
    role = flat[np.minimum(starts + 1, last)]
    opener = flat[np.minimum(starts + 2, last)]
    good = (role == ASSISTANT) & (opener == CHANNEL)
    good |= np.isin(role, _PROMPT_ROLES) & (opener == MESSAGE)
    report(starts[~good], "unknown role, or a channel where none belongs")
    name = flat[np.minimum(channels + 1, last)]
    report(channels[~np.isin(name, (ANALYSIS, FINAL))], "unknown channel")
    returns = where[kinds == RETURN]
    if channels.size:
        nearest = channels[np.maximum(np.searchsorted(channels, returns) - 1, 0)]
        message = starts[np.maximum(np.searchsorted(starts, returns) - 1, 0)]
        final = (flat[np.minimum(nearest + 1, last)] == FINAL) & (nearest == message + 2)
        report(returns[~final], "return outside a final message")
    else:
        report(returns, "return outside a final message")


def _spans(flat: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Span of each token: a message's own from its start through its end; 0 for end of text."""
    if not starts.size:
        return np.zeros(flat.size, dtype=np.uint8)
    name = flat[np.minimum(starts + 3, flat.size - 1)]
    assistant = flat[np.minimum(starts + 1, flat.size - 1)] == ASSISTANT
    span = np.where(name == ANALYSIS, Span.REASONING, 0) + np.where(name == FINAL, Span.FINAL, 0)
    span = (span * assistant).astype(np.uint8)
    lengths = np.diff(starts, append=flat.size)
    spans = np.concatenate([np.zeros(starts[0], dtype=np.uint8), np.repeat(span, lengths)])
    spans[ends - 1] = Span.IGNORE
    return spans


def align_to_labels(span_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Token spans shifted by one: entry t speaks of token t + 1; a document's last entry is 0."""
    aligned = np.zeros_like(span_ids)
    aligned[:-1] = span_ids[1:]
    aligned[np.cumsum(lengths) - 1] = Span.IGNORE
    return aligned
