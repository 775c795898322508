"""Every way a row can be wrong is a counted reject, by its own name."""

import json

import pyarrow as pa
import pytest
from openai_harmony import DeveloperContent, SystemContent
from openai_harmony import Message as OracleMessage
from openai_harmony import Role as OracleRole

from vpmoe.data.conversation import Message
from vpmoe.data.synth import Reject, conversations_of

GOOD = {
    "synth_id": "a",
    "query": "q",
    "synthetic_reasoning": "r",
    "synthetic_answer": "f",
    "language": "en",
    "exercise": None,
}
USER = {"role": "user", "content": "q"}
ANALYSIS = {"role": "assistant", "channel": "analysis", "content": "r"}
FINAL = {"role": "assistant", "channel": "final", "content": "f"}


def only(batch, **options):
    (found,) = conversations_of(pa.RecordBatch.from_pylist(batch), 7, **options)
    return found


def of_messages(payload, **columns):
    text = payload if isinstance(payload, str | None) else json.dumps(payload)
    return only([{"synth_id": "a", "messages_json": text, **columns}])


def test_a_good_row():
    row, found = only([GOOD])
    assert row == 7 and found.sample_id == "a"
    assert found.messages == (
        Message("user", None, "q"),
        Message("assistant", "analysis", "r"),
        Message("assistant", "final", "f"),
    )
    assert found.metadata == {"language": "en"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"synth_id": None}, "null_id"),
        ({"synth_id": ""}, "empty_id"),
        ({"query": None}, "null_query"),
        ({"synthetic_reasoning": None}, "null_reasoning"),
        ({"synthetic_answer": None}, "null_answer"),
        ({"query": " \n\u3000"}, "empty_query"),
        ({"synthetic_reasoning": ""}, "empty_reasoning"),
        ({"synthetic_answer": "\t"}, "empty_answer"),
        ({"query": "a<|start|>b"}, "special_token_in_query"),
        ({"synthetic_reasoning": "<|reserved_200099|>"}, "special_token_in_reasoning"),
        ({"synthetic_answer": "<|endoftext|>"}, "special_token_in_answer"),
    ],
)
def test_each_wrong_field(change, reason):
    found = only([{**GOOD, **change}])
    assert isinstance(found, Reject)
    assert (found.row, found.sample_id, found.reason) == (
        7,
        change.get("synth_id", GOOD["synth_id"]),
        reason,
    )


def test_bytes_that_are_no_unicode():
    raw = {k: pa.array([(v or "").encode()], pa.binary()) for k, v in GOOD.items()}
    raw["synthetic_answer"] = pa.array([b"lone \xed\xa0\x80 surrogate"], pa.binary())
    columns = {k: pa.Array.from_buffers(pa.string(), 1, v.buffers()) for k, v in raw.items()}
    (found,) = conversations_of(pa.RecordBatch.from_pydict(columns), 0)
    assert found == Reject(0, "a", "invalid_unicode_in_answer")


def test_a_taken_id():
    assert only([GOOD], duplicates=frozenset({7})).reason == "duplicate_id"


def test_dictionary_columns_are_read():
    table = pa.RecordBatch.from_pylist([GOOD])
    place = table.schema.get_field_index("query")
    table = table.set_column(place, "query", table.column(place).dictionary_encode())
    assert next(iter(conversations_of(table, 0)))[1].messages[0].content == "q"


def test_messages_as_the_reference_library_writes_them():
    said = [
        OracleMessage.from_role_and_content(OracleRole.SYSTEM, SystemContent.new()),
        OracleMessage.from_role_and_content(
            OracleRole.DEVELOPER, DeveloperContent.new().with_instructions("Be brief.")
        ),
        OracleMessage.from_role_and_content(OracleRole.USER, "q"),
        OracleMessage.from_role_and_content(OracleRole.ASSISTANT, "r").with_channel("analysis"),
        OracleMessage.from_role_and_content(OracleRole.ASSISTANT, "f").with_channel("final"),
    ]
    _, found = of_messages({"messages": [m.to_dict() for m in said]})
    assert [m.role for m in found.messages][:2] == ["system", "developer"]
    from vpmoe.data.harmony import RenderConfig, Renderer

    configured = Renderer(RenderConfig(developer_instructions="Be brief."))
    assert found.messages[:2] == configured.messages(only([GOOD])[1])[:2]


def test_analysis_stays_only_after_the_last_user_message():
    turns = [USER, ANALYSIS, FINAL, {**USER, "content": "q2"}, ANALYSIS, FINAL]
    _, found = of_messages({"messages": turns})
    channels = [m.channel for m in found.messages]
    assert channels == [None, "final", None, "analysis", "final"]


def test_metadata_from_json_and_columns():
    metadata = json.dumps({"language": "fr", "exercise": "math", "other": 1, "model": 5})
    _, found = of_messages([USER, ANALYSIS, FINAL], metadata_json=metadata, language="de")
    assert found.metadata == {"language": "de", "exercise": "math"}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (None, "null_messages"),
        ("{", "messages_not_json"),
        ("[" * 100_000, "messages_not_json"),
        ("5", "no_messages"),
        ([], "no_messages"),
        (["x"], "malformed_message"),
        ([{**USER, "extra": 1}], "malformed_message"),
        ([{**USER, "name": "n"}], "unsupported_message_field"),
        ([{**USER, "role": "tool"}], "unknown_role"),
        ([{**USER, "role": ["user"]}], "unknown_role"),
        ([{**FINAL, "channel": "commentary"}], "unknown_channel"),
        ([{**FINAL, "channel": None}], "unknown_channel"),
        ([{**USER, "channel": "final"}], "unknown_channel"),
        ([{**USER, "content": 5}], "malformed_content"),
        ([{**USER, "content": [{"type": "image"}]}], "unsupported_content"),
        ([{**USER, "content": None}], "malformed_content"),
        ([USER, ANALYSIS, {**FINAL, "content": ""}], "empty_final"),
        ([USER, {**ANALYSIS, "content": "<|call|>"}, FINAL], "special_token_in_analysis"),
        ([USER, {**ANALYSIS, "content": "\ud800"}, FINAL], "invalid_unicode_in_analysis"),
        ([ANALYSIS, FINAL], "no_user_message"),
        ([USER, FINAL], "no_reasoning"),
        ([USER, ANALYSIS], "no_final_message"),
        ([USER, ANALYSIS, FINAL, FINAL], "several_final_messages"),
        ([USER, {"role": "system", "content": "s"}, ANALYSIS, FINAL], "misplaced_system_message"),
        (
            [{"role": "system", "content": [{"type": "system_content", "tools": {"x": 1}}]}],
            "unsupported_content",
        ),
    ],
)
def test_each_wrong_conversation(payload, reason):
    found = of_messages(payload)
    assert isinstance(found, Reject) and found.reason == reason
