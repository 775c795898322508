"""Which part of a conversation a label belongs to."""

from enum import IntEnum


class Span(IntEnum):
    """The part of a conversation that a label (the next token) belongs to.

    The header and the end token of a message inherit the message's span, as the student has to
    produce them too. Prompts, padding and the end of a document are `IGNORE`.
    """

    IGNORE = 0
    REASONING = 1
    FINAL = 2


NUM_SPANS = len(Span)
TRAINED_SPANS = (Span.REASONING, Span.FINAL)
