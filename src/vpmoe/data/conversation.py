"""Conversations before they are tokens, and the reasons why one is turned away."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant"]
Channel = Literal["analysis", "final"]

# Harmony's whole special table: the named tokens, its reserved ones, and o200k's own two.
_SPECIAL = re.compile(
    r"<\|(?:startoftext|endoftext|endofprompt|return|constrain|channel|start|end|message|call"
    r"|reserved_\d+)\|>"
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message: who speaks, on which channel (assistants only), and its text."""

    role: Role
    channel: Channel | None
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of one sample, ending in the assistant's final answer.

    Attributes:
        sample_id: Names the row everywhere: splits, target stores, reports.
        messages: In order; system and developer messages of its own win over the config's.
        metadata: What the row carries beside its text, absent values left out.
    """

    sample_id: str
    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def text_problem(text: str | None) -> str | None:
    """Why `text` cannot be a message, as the beginning of a reject reason; None if it can."""
    if text is None:
        return "null"
    if not text or text.isspace():
        return "empty"
    # The substring test is a hundred times cheaper than the pattern, and nearly always enough.
    if "<|" in text and _SPECIAL.search(text):
        return "special_token_in"
    if not text.isascii() and not _is_unicode(text):
        return "invalid_unicode_in"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True


def only_last_reasoning(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """`messages` without the analysis of turns before the last user message.

    Harmony's own automatic dropping would also delete the reasoning of a single turn, which is
    what the student has to learn, so it stays off and this rule stands in.
    """
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    last_user = users[-1] if users else 0
    return tuple(m for i, m in enumerate(messages) if m.channel != "analysis" or i > last_user)


def shape_problem(messages: tuple[Message, ...]) -> str | None:
    """Why these messages are not one trainable conversation, as a reject reason."""
    roles = [m.role for m in messages]
    if "user" not in roles:
        return "no_user_message"
    last_user = len(roles) - 1 - roles[::-1].index("user")
    head = [r for r in roles if r in ("system", "developer")]
    if head != roles[: len(head)] or head not in ([], ["system"], ["developer"], _BOTH):
        return "misplaced_system_message"
    if messages[-1].channel != "final":
        return "no_final_message"
    answer = [m.channel for m in messages[last_user + 1 :]]
    if "analysis" not in answer:
        return "no_reasoning"
    if answer.count("final") > 1:
        return "several_final_messages"
    return None


_BOTH = ["system", "developer"]
