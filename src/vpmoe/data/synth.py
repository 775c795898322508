"""Parquet rows to conversations; what cannot become one is turned away with its reason."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow as pa
from pydantic import ValidationError

from vpmoe.data.conversation import (
    Channel,
    Conversation,
    Message,
    Role,
    only_last_reasoning,
    shape_problem,
    text_problem,
)
from vpmoe.data.harmony import RenderConfig, developer_text, system_text
from vpmoe.data.source import (
    ID_COLUMN,
    MESSAGES_COLUMN,
    METADATA_COLUMN,
    METADATA_COLUMNS,
    TEXT_COLUMNS,
)

__all__ = ["Conversation", "Message", "Reject", "conversations_of"]

DUPLICATE_ID = "duplicate_id"
_FIELD_NAMES = ("query", "reasoning", "answer")
_MESSAGE_KEYS = frozenset({"role", "content", "channel", "name", "recipient", "content_type"})
_UNUSED_KEYS = ("name", "recipient", "content_type")


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that is not in the dataset.

    Attributes:
        row: Its number over all inputs.
        sample_id: Its id, if it has one.
        reason: One of few words, for counting.
    """

    row: int
    sample_id: str | None
    reason: str


class _BadMessageError(ValueError):
    """A message of `messages_json` that has no place in a training conversation."""


def conversations_of(
    batch: pa.RecordBatch, first_row: int, *, duplicates: Collection[int] = ()
) -> Iterator[tuple[int, Conversation] | Reject]:
    """Each row of `batch` as (row number, conversation) or as a reject, in order.

    Args:
        batch: Columns as `source.read_rows` yields them.
        first_row: Number of the batch's first row over all inputs.
        duplicates: Numbers of rows whose id an earlier row has already.
    """
    ids = ids_of(batch)
    metadata = _metadata(batch)
    with_messages = MESSAGES_COLUMN in batch.schema.names
    fields = (MESSAGES_COLUMN,) if with_messages else TEXT_COLUMNS
    columns = [texts_of(batch.column(name)) for name in fields]
    for offset, (sample_id, *texts) in enumerate(zip(ids, *columns, strict=True)):
        row = first_row + offset
        problem = text_problem(sample_id)
        if problem or sample_id is None:
            yield Reject(row, _printable(sample_id), f"{problem}_id")
            continue
        if row in duplicates:
            yield Reject(row, sample_id, DUPLICATE_ID)
            continue
        found = _from_json(texts[0]) if with_messages else _from_fields(texts)
        if isinstance(found, str):
            yield Reject(row, sample_id, found)
        else:
            yield row, Conversation(sample_id, found, metadata[offset])


def ids_of(batch: pa.RecordBatch) -> list[str | None]:
    """The id of each row: its column's, or where there is none the one among its metadata."""
    if ID_COLUMN in batch.schema.names:
        return texts_of(batch.column(ID_COLUMN))
    return [_id_in(text) for text in texts_of(batch.column(METADATA_COLUMN))]


def _id_in(metadata: str | None) -> str | None:
    try:
        found = json.loads(metadata or "{}")
    except (ValueError, RecursionError):
        return None
    sample_id = found.get(ID_COLUMN) if isinstance(found, dict) else None
    return sample_id if isinstance(sample_id, str) else None


def _from_fields(texts: Sequence[str | None]) -> tuple[Message, ...] | str:
    """Question, reasoning and answer as messages, or why not."""
    for name, text in zip(_FIELD_NAMES, texts, strict=True):
        if problem := text_problem(text):
            return f"{problem}_{name}"
    query, reasoning, answer = texts
    return (
        Message("user", None, query or ""),
        Message("assistant", "analysis", reasoning or ""),
        Message("assistant", "final", answer or ""),
    )


def _from_json(text: str | None) -> tuple[Message, ...] | str:
    """The messages of a `synth_harmony_v1` row, or why not."""
    if text is None:
        return "null_messages"
    try:
        payload = json.loads(text)
    except ValueError:  # also what too deep a nesting or a bad escape ends in
        return "messages_not_json"
    except RecursionError:
        return "messages_not_json"
    listed = payload.get("messages") if isinstance(payload, dict) else payload
    if not isinstance(listed, list) or not listed:
        return "no_messages"
    try:
        messages = tuple(_message(item) for item in listed)
    except _BadMessageError as error:
        return str(error)
    for message in messages:
        if problem := text_problem(message.content):
            return f"{problem}_{message.channel or message.role}"
    return shape_problem(messages) or only_last_reasoning(messages)


def _message(item: Any) -> Message:
    if not isinstance(item, dict) or not item.keys() <= _MESSAGE_KEYS:
        raise _BadMessageError("malformed_message")
    if any(item.get(key) is not None for key in _UNUSED_KEYS):
        raise _BadMessageError("unsupported_message_field")
    role: Any = item.get("role")
    channel = item.get("channel")
    if role not in get_args(Role):
        raise _BadMessageError("unknown_role")
    allowed = get_args(Channel) if role == "assistant" else (None,)
    if channel not in allowed:
        raise _BadMessageError("unknown_channel")
    return Message(role, channel, _content(role, item.get("content")))


def _content(role: str, content: Any) -> str:
    """Text of a message; several text parts run together, as they do in Harmony."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise _BadMessageError("malformed_content")
    return "".join(_part(role, part) for part in content)


def _part(role: str, part: Mapping[str, Any]) -> str:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "system_content" and role == "system":
        return _system_part(part)
    if kind == "developer_content" and role == "developer" and not part.get("tools"):
        instructions = part.get("instructions")
        if isinstance(instructions, str):
            return developer_text(instructions)
    raise _BadMessageError("unsupported_content")


def _system_part(part: Mapping[str, Any]) -> str:
    channels = part.get("channel_config") or {}
    valid = ["analysis", "commentary", "final"]
    usual = channels.get("valid_channels") == valid and channels.get("channel_required") is True
    if part.get("tools") or not usual:
        raise _BadMessageError("unsupported_content")
    keys = ("model_identity", "conversation_start_date", "knowledge_cutoff")
    try:
        effort = str(part.get("reasoning_effort")).lower()
        settings = {key: part.get(key) or "" for key in keys}
        config = RenderConfig.model_validate({**settings, "reasoning_effort": effort})
    except ValidationError as error:
        raise _BadMessageError("unsupported_content") from error
    return system_text(config, config.reasoning_effort)


def _metadata(batch: pa.RecordBatch) -> list[dict[str, str]]:
    """What each row carries beside its text; columns win over `metadata_json`."""
    rows: list[dict[str, str]] = [{} for _ in range(batch.num_rows)]
    names = batch.schema.names
    if METADATA_COLUMN in names:
        for row, text in zip(rows, texts_of(batch.column(METADATA_COLUMN)), strict=True):
            row.update(_json_metadata(text))
    for name in METADATA_COLUMNS:
        if name in names:
            column = batch.column(name)
            if column.null_count < len(column):
                for row, text in zip(rows, texts_of(column), strict=True):
                    if text is not None:
                        row[name] = _printable(text) or ""
    return rows


def _json_metadata(text: str | None) -> dict[str, str]:
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    pairs = ((name, found.get(name)) for name in METADATA_COLUMNS)
    return {name: _printable(value) or "" for name, value in pairs if isinstance(value, str)}


def texts_of(column: pa.Array) -> list[str | None]:
    """A text column as strings; bytes that are not UTF-8 become lone surrogates, to be rejected."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [None if b is None else b.decode("utf-8", "surrogateescape") for b in raw]


def _printable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode()
