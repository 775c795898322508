"""A random part of each shard, rendered and parsed again by Harmony's reference library."""

from typing import Protocol

import numpy as np
from openai_harmony import HarmonyError, TextContent

from vpmoe.data.conversation import Conversation
from vpmoe.data.harmony import Renderer
from vpmoe.data.o200k import harmony_encoding
from vpmoe.errors import DataError


class Rows(Protocol):
    """A range of rows, and how to choose among them."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def begin(self) -> int: ...  # noqa: D102
    @property
    def end(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def oracle_rows(self) -> int: ...  # noqa: D102


class Oracle:
    """Compares some rows with the reference renderer; any difference is an error.

    Attributes:
        num_checked: Rows that were compared.
    """

    def __init__(self, renderer: Renderer, rows: Rows) -> None:
        self._renderer = renderer
        self._name = rows.name
        size = rows.end - rows.begin
        generator = np.random.Generator(np.random.Philox(key=[rows.seed, rows.begin]))
        chosen = generator.choice(size, size=min(rows.oracle_rows, size), replace=False)
        self._rows = frozenset((chosen + rows.begin).tolist())
        self.num_checked = 0

    def check(self, row: int, conversation: Conversation, document: np.ndarray) -> None:
        """Compare one document, end of text included, if its row was chosen.

        Raises:
            DataError: If the reference renders other tokens or parses other messages.
        """
        if row not in self._rows:
            return
        expected = self._renderer.oracle_tokens(conversation)
        if not np.array_equal(expected, document):
            size = min(expected.size, document.size)
            differs = np.flatnonzero(expected[:size] != document[:size])
            at = int(differs[0]) if differs.size else size
            raise self._disagreement(conversation, f"renders other tokens from position {at} on")
        parsed = self._parse(conversation, document)
        wanted = [(m.role, m.channel, m.content) for m in self._renderer.messages(conversation)]
        if parsed != wanted:
            raise self._disagreement(conversation, "parses other messages")
        self.num_checked += 1

    def check_parses(self, row: int, conversation: Conversation, document: np.ndarray) -> None:
        """Parse a truncated document, if its row was chosen; the answer must be unharmed.

        Raises:
            DataError: If it does not parse, or its last message is not the answer.
        """
        if row not in self._rows:
            return
        last = conversation.messages[-1]
        parsed = self._parse(conversation, document)
        if parsed[-1] != (last.role, last.channel, last.content):
            raise self._disagreement(conversation, "finds the answer cut")

    def _parse(
        self, conversation: Conversation, document: np.ndarray
    ) -> list[tuple[str, str | None, str]]:
        try:
            return parse_messages(document[:-1])
        except HarmonyError as error:
            raise self._disagreement(conversation, f"does not parse it: {error}") from error

    def _disagreement(self, conversation: Conversation, what: str) -> DataError:
        return DataError(
            f"{self._name}, sample {conversation.sample_id}: the reference renderer {what}",
            hint="this is a fault of the renderer, not of the data; please report the sample",
        )


def parse_messages(tokens: np.ndarray) -> list[tuple[str, str | None, str]]:
    """(role, channel, text) of each message, through Harmony's reference parser.

    Raises:
        HarmonyError: If the tokens are not a sequence of messages.
    """
    found = harmony_encoding().parse_messages_from_completion_tokens(tokens.tolist())
    return [
        (
            message.author.role.value,
            message.channel,
            "".join(c.text for c in message.content if isinstance(c, TextContent)),
        )
        for message in found
    ]
