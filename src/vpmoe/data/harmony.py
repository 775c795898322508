"""Conversations to Harmony tokens and back, four times as fast as the reference renderer.

A conversation becomes one string with its special tokens spelled out and is tokenised in one call;
spans are then read off the tokens. `openai_harmony` stays the oracle: tests compare every row of
the sample with it, and each build compares a random part of every shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from openai_harmony import (
    Conversation as OracleConversation,
)
from openai_harmony import (
    DeveloperContent,
    ReasoningEffort,
    RenderConversationConfig,
    SystemContent,
)
from openai_harmony import Message as OracleMessage
from openai_harmony import Role as OracleRole
from pydantic import Field

from vpmoe.config import Config
from vpmoe.data.completion import ParsedCompletion, parse_completion
from vpmoe.data.conversation import Conversation, Message, shape_problem, text_problem
from vpmoe.data.o200k import decode, encode, harmony_encoding, o200k, spell
from vpmoe.data.structure import read_structure
from vpmoe.errors import DataError
from vpmoe.vocabulary import END_OF_TEXT, SPECIAL_TOKENS

__all__ = [
    "ParsedCompletion",
    "RenderConfig",
    "Rendered",
    "Renderer",
    "decode",
    "encode",
    "harmony_encoding",
    "o200k",
    "parse_completion",
]

Effort = Literal["low", "medium", "high"]

_CHANNELS = (
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
_END_OF_TEXT = "<|endoftext|>"
_WRITTEN = frozenset(SPECIAL_TOKENS)


class RenderConfig(Config):
    """What stands before the user's message; the defaults are Harmony's own."""

    system: bool = True
    """Whether there is a system message at all."""

    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI."
    """First line of the system message; "" leaves it out."""

    reasoning_effort: Effort = "medium"
    """Named in the system message."""

    conversation_start_date: str = ""
    """Such as "2025-06-28"; "" leaves the line out, so that rendering does not depend on a date."""

    knowledge_cutoff: str = "2024-06"
    """Named in the system message; "" leaves the line out."""

    developer_instructions: str | None = Field(default=None, min_length=1)
    """Text of a developer message; absent means no such message."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens.

    Attributes:
        tokens: int32 ids, from the first `<|start|>` to the last `<|return|>`; no end of text.
        span_ids: `Span` of each token (shift by one for labels), uint8.
    """

    tokens: np.ndarray
    span_ids: np.ndarray


@dataclass(frozen=True)
class Block:
    """Several conversations as tokens.

    Attributes:
        flat: int32 ids of the documents end to end, each closed by `END_OF_TEXT`.
        lengths: Tokens of each document.
        kept: Which of the conversations given each document is.
        failed: Index of a conversation given -> why it has no document.
    """

    flat: np.ndarray
    lengths: np.ndarray
    kept: list[int]
    failed: dict[int, str]


class Renderer:
    """Turns conversations into tokens under one `[render]` setting.

    Raises:
        ConfigError: Through `RenderConfig`, never here; text with special tokens in the settings
            is a DataError.
    """

    def __init__(self, config: RenderConfig) -> None:
        self.config = config
        self._preambles: dict[Effort, tuple[Message, ...]] = {}
        preamble = self._text(self._preamble(config.reasoning_effort))
        self._preamble_tokens = self._tokens(preamble)

    def messages(self, conversation: Conversation) -> tuple[Message, ...]:
        """Everything that is rendered: the configured preamble, unless the row has its own."""
        if _has_preamble(conversation):
            return conversation.messages
        return self._preamble(self.config.reasoning_effort) + conversation.messages

    def block(self, conversations: Sequence[Conversation]) -> Block:
        """The tokens of several conversations, each closed by `END_OF_TEXT`, end to end.

        The conversations must have passed `text_problem` and `shape_problem`. The preamble is
        tokenised once: special tokens part it from what follows, so the tokens are the same.
        """
        failed: dict[int, str] = {}
        bodies: dict[int, np.ndarray] = {}
        texts = [self._text(c.messages, returns=True) + _END_OF_TEXT for c in conversations]
        for index, text in enumerate(texts):
            try:
                bodies[index] = self._tokens(text)
            except ValueError:  # a million spaces overflow the pre-tokenizer's stack
                failed[index] = "untokenizable"
        for index in _lossy(bodies, texts):
            failed[index] = "does_not_round_trip"
            del bodies[index]
        none = self._preamble_tokens[:0]
        pairs = [
            (none if _has_preamble(conversations[index]) else self._preamble_tokens, body)
            for index, body in bodies.items()
        ]
        lengths = np.array([head.size + body.size for head, body in pairs], dtype=np.int64)
        flat = np.concatenate([none, *(part for pair in pairs for part in pair)]).astype(np.int32)
        return Block(flat, lengths, list(bodies), failed)

    def render(self, conversation: Conversation) -> Rendered:
        """One conversation as training tokens, without the end of text after it.

        Raises:
            DataError: If it is not one trainable conversation of plain text.
        """
        self._require_plain(conversation.messages)
        if problem := shape_problem(conversation.messages):
            raise DataError(f"sample {conversation.sample_id}: {problem.replace('_', ' ')}")
        block = self.block([conversation])
        if block.failed:
            reason = block.failed[0].replace("_", " ")
            raise DataError(f"sample {conversation.sample_id}: {reason}")
        structure = read_structure(block.flat, block.lengths)
        if structure.problems:
            raise DataError(f"sample {conversation.sample_id}: {structure.problems[0]}")
        return Rendered(block.flat[:-1], structure.span_ids[:-1])

    def prompt(self, query: str, reasoning_effort: Effort | None = None) -> np.ndarray:
        """Tokens of a question up to where the assistant's completion starts.

        Ends with `COMPLETION_HEADER`; a completion goes on with a channel.

        Args:
            query: The user's message.
            reasoning_effort: Wins over the config's.

        Raises:
            DataError: If the query is empty or holds special tokens, or an effort is asked for
                and there is no system message to name it in.
        """
        if reasoning_effort is not None and not self.config.system:
            raise DataError(
                f"reasoning effort {reasoning_effort} asked for, but render.system is false",
                hint="set render.system = true, or leave the effort out",
            )
        user = (Message("user", None, query),)
        self._require_plain(user)
        effort = reasoning_effort or self.config.reasoning_effort
        text = self._text(self._preamble(effort) + user) + "<|start|>assistant"
        return self._tokens(text).astype(np.int32)

    def oracle_tokens(self, conversation: Conversation) -> np.ndarray:
        """The same conversation through Harmony's reference renderer, end of text appended."""
        ids = harmony_encoding().render_conversation_for_training(
            OracleConversation.from_messages(self.oracle_messages(conversation)),
            RenderConversationConfig(auto_drop_analysis=False),
        )
        return np.array([*ids, END_OF_TEXT], dtype=np.int32)

    def oracle_messages(self, conversation: Conversation) -> list[OracleMessage]:
        """The conversation with its preamble in the reference library's own types."""
        messages = [] if _has_preamble(conversation) else self._oracle_preamble()
        for message in conversation.messages:
            made = OracleMessage.from_role_and_content(OracleRole(message.role), message.content)
            messages.append(made.with_channel(message.channel) if message.channel else made)
        return messages

    def _oracle_preamble(self) -> list[OracleMessage]:
        c = self.config
        messages = []
        if c.system:
            content = SystemContent(
                model_identity=c.model_identity or None,
                reasoning_effort=ReasoningEffort(c.reasoning_effort.capitalize()),
                conversation_start_date=c.conversation_start_date or None,
                knowledge_cutoff=c.knowledge_cutoff or None,
            )
            messages.append(OracleMessage.from_role_and_content(OracleRole.SYSTEM, content))
        if c.developer_instructions is not None:
            developer = DeveloperContent.new().with_instructions(c.developer_instructions)
            messages.append(OracleMessage.from_role_and_content(OracleRole.DEVELOPER, developer))
        return messages

    def _preamble(self, effort: Effort) -> tuple[Message, ...]:
        if effort not in self._preambles:
            messages = []
            if self.config.system:
                messages.append(Message("system", None, system_text(self.config, effort)))
            if self.config.developer_instructions is not None:
                text = developer_text(self.config.developer_instructions)
                messages.append(Message("developer", None, text))
            self._require_plain(tuple(messages))
            self._preambles[effort] = tuple(messages)
        return self._preambles[effort]

    def _tokens(self, text: str) -> np.ndarray:
        """uint32 ids of text whose special tokens are meant."""
        return o200k().encode_to_numpy(text, allowed_special=_WRITTEN, disallowed_special=())

    def _text(self, messages: Sequence[Message], *, returns: bool = False) -> str:
        parts = []
        for message in messages:
            channel = f"<|channel|>{message.channel}" if message.channel else ""
            parts.append(f"<|start|>{message.role}{channel}<|message|>{message.content}<|end|>")
        if returns:
            parts[-1] = parts[-1].removesuffix("<|end|>") + "<|return|>"
        return "".join(parts)

    def _require_plain(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if problem := text_problem(message.content):
                raise DataError(
                    f"the {message.channel or message.role} message cannot be rendered: "
                    f"{problem.replace('_', ' ')} text",
                    hint="give plain text without Harmony's special tokens",
                )


def _lossy(bodies: Mapping[int, np.ndarray], texts: Sequence[str]) -> list[int]:
    """Which bodies do not decode to their own text; one comparison when all do."""
    if not bodies:
        return []
    expected = "".join(texts[index] for index in bodies).encode()
    if spell(np.concatenate(list(bodies.values()))) == expected:
        return []
    return [index for index, body in bodies.items() if spell(body) != texts[index].encode()]


def _has_preamble(conversation: Conversation) -> bool:
    return conversation.messages[0].role in ("system", "developer")


def system_text(config: RenderConfig, effort: Effort) -> str:
    """Content of Harmony's system message."""
    head = [config.model_identity]
    if config.knowledge_cutoff:
        head.append(f"Knowledge cutoff: {config.knowledge_cutoff}")
    if config.conversation_start_date:
        head.append(f"Current date: {config.conversation_start_date}")
    lines = "\n".join(line for line in head if line)
    return "\n\n".join(part for part in (lines, f"Reasoning: {effort}", _CHANNELS) if part)


def developer_text(instructions: str) -> str:
    """Content of Harmony's developer message."""
    return f"# Instructions\n\n{instructions}"
