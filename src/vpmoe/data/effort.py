"""The same conversation with another reasoning effort asked for."""

import re
from functools import lru_cache

import numpy as np

from vpmoe.batch import ReasoningEffort
from vpmoe.data.harmony import RenderConfig, system_text
from vpmoe.data.o200k import decode, encode
from vpmoe.errors import DataError
from vpmoe.vocabulary import END, MESSAGE, START, SYSTEM

_EFFORT_LINE = re.compile(r"^Reasoning: \w+$", re.MULTILINE)


def with_effort(tokens: np.ndarray, effort: ReasoningEffort, *, render: RenderConfig) -> np.ndarray:
    """The conversation with `effort` named in its system message; the rest is kept token by token.

    A conversation without a system message gets the one that `render` describes.

    Args:
        tokens: o200k ids of a rendered conversation.
        effort: What the system message shall say.
        render: Settings for a system message where there is none.

    Raises:
        DataError: If the conversation's own system message has no line that names an effort.
    """
    if tokens[1] != SYSTEM:
        return np.concatenate([_message(system_text(render, effort)), tokens])
    length = int(np.argmax(tokens == END)) + 1
    head = np.ascontiguousarray(tokens[:length], dtype=np.int32)
    return np.concatenate([_changed_head(head.tobytes(), effort), tokens[length:]])


# Nearly all conversations of a dataset share one system message.
@lru_cache(maxsize=64)
def _changed_head(head: bytes, effort: ReasoningEffort) -> np.ndarray:
    text = decode(np.frombuffer(head, dtype=np.int32)[3:-1])
    changed, count = _EFFORT_LINE.subn(f"Reasoning: {effort}", text, count=1)
    if count == 0:
        raise DataError(
            f"a system message names no reasoning effort: {text[:60]!r}",
            hint="leave reasoning_effort out, so that conversations are scored as they are",
        )
    return _message(changed)


@lru_cache(maxsize=64)
def _message(text: str) -> np.ndarray:
    return np.concatenate([[START, SYSTEM, MESSAGE], encode(text), [END]]).astype(np.int32)
