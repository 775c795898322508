"""The renderer against openai-harmony, row by row, and the worked example of the format."""

import numpy as np
import pytest
from openai_harmony import Conversation as OracleConversation
from openai_harmony import Role

from tests.data.conftest import conversation
from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.harmony import RenderConfig, Renderer, decode, harmony_encoding
from vpmoe.data.oracle import parse_messages
from vpmoe.data.structure import align_to_labels, read_structure
from vpmoe.errors import ConfigError, DataError
from vpmoe.spans import Span
from vpmoe.vocabulary import COMPLETION_HEADER

BARE = RenderConfig(system=False)
VARIANTS = [
    BARE,
    RenderConfig(reasoning_effort="high", conversation_start_date="2025-06-28"),
    RenderConfig(system=False, developer_instructions="Be brief."),
    RenderConfig(model_identity="", knowledge_cutoff="", developer_instructions="  Ünïcode\n"),
    RenderConfig(model_identity="You are vpMoE.", knowledge_cutoff="", reasoning_effort="low"),
]


def test_the_worked_example():
    rendered = Renderer(BARE).render(conversation("What", "Simple sum.", "4"))
    assert rendered.tokens.tolist() == [
        *(200006, 1428, 200008, 4827, 200007),
        *(200006, 173781, 200005, 35644, 200008, 17958, 4215, 13, 200007),
        *(200006, 173781, 200005, 17196, 200008, 19, 200002),
    ]
    assert rendered.span_ids.tolist() == [0] * 5 + [1] * 9 + [2] * 7
    lengths = np.array([rendered.tokens.size + 1])
    labels = align_to_labels(np.append(rendered.span_ids, np.uint8(0)), lengths)
    assert labels.tolist() == [0] * 4 + [1] * 9 + [2] * 7 + [0, 0]


def test_the_worked_example_with_system_and_developer():
    config = RenderConfig(developer_instructions="Be brief.")
    tokens = Renderer(config).render(conversation("What is 2 + 2?", "Simple sum.", "4")).tokens
    system = (
        "200006 17360 200008 3575 553 17554 162016 11 261 4410 6439 2359 22203 656 7788 17527 558 "
        "87447 100594 25 220 1323 19 12 3218 279 30377 289 25 14093 279 2 13888 18403 25 8450 11 "
        "49159 11 1721 13 21030 2804 413 7360 395 1753 3176 13 200007 "
    )
    developer = "200006 77944 200008 2 68406 279 3238 14567 13 200007 "
    rest = (
        "200006 1428 200008 4827 382 220 17 659 220 17 30 200007 200006 173781 200005 35644 200008 "
        "17958 4215 13 200007 200006 173781 200005 17196 200008 19 200002"
    )
    assert tokens.tolist() == [int(t) for t in (system + developer + rest).split()]


def test_every_row_of_the_sample_equals_the_reference(sample_conversations):
    renderer = Renderer(RenderConfig())
    block = renderer.block(sample_conversations)
    expected = [renderer.oracle_tokens(c) for c in sample_conversations]
    assert not block.failed and block.kept == list(range(888))
    assert block.lengths.tolist() == [e.size for e in expected]
    assert np.array_equal(block.flat, np.concatenate(expected))


@pytest.mark.parametrize("config", VARIANTS)
def test_every_preamble_equals_the_reference(config, sample_conversations):
    renderer = Renderer(config)
    some = sample_conversations[::40]
    assert np.array_equal(
        renderer.block(some).flat, np.concatenate([renderer.oracle_tokens(c) for c in some])
    )


def test_spans_equal_those_of_the_reference_parser(sample_conversations):
    """Spans again, from message lengths that the parser and encoder give, not from our grammar."""
    renderer = Renderer(BARE)
    some = sample_conversations[::20]
    block = renderer.block(some)
    structure = read_structure(block.flat, block.lengths)
    encoding = harmony_encoding()
    expected: list[int] = []
    for item in some:
        for message in item.messages:
            header = 5 if message.channel else 3
            size = header + len(encoding.encode(message.content, disallowed_special=())) + 1
            span = {"analysis": 1, "final": 2, None: 0}[message.channel]
            expected += [span] * size
        expected.append(Span.IGNORE)
    assert structure.problems == {}
    assert structure.span_ids.tolist() == expected


def test_several_turns_equal_the_reference():
    turns = (
        Message("user", None, "one"),
        Message("assistant", "final", "1"),
        Message("user", None, "two"),
        Message("assistant", "analysis", "hm"),
        Message("assistant", "final", "2"),
    )
    for head in ((), (Message("system", None, "own"), Message("developer", None, "dev"))):
        item = Conversation("a", (*head, *turns))
        renderer = Renderer(RenderConfig())
        rendered = renderer.render(item)
        assert rendered.tokens.tolist() == renderer.oracle_tokens(item).tolist()[:-1]
        assert decode(rendered.tokens).startswith("<|start|>system<|message|>own") == bool(head)
        assert decode(rendered.tokens[rendered.span_ids == Span.FINAL]) == (
            "<|start|>assistant<|channel|>final<|message|>1<|end|>"
            "<|start|>assistant<|channel|>final<|message|>2<|return|>"
        )


@pytest.mark.parametrize("effort", [None, "low", "high"])
def test_prompts_equal_the_reference(effort):
    renderer = Renderer(RenderConfig(developer_instructions="Be brief."))
    prompt = renderer.prompt("What is 2 + 2?", effort)
    told = (
        renderer
        if effort is None
        else Renderer(RenderConfig(developer_instructions="Be brief.", reasoning_effort=effort))
    )
    messages = told.oracle_messages(conversation("What is 2 + 2?", "r", "a"))[:-2]
    expected = harmony_encoding().render_conversation_for_completion(
        OracleConversation.from_messages(messages), Role.ASSISTANT
    )
    assert prompt.tolist() == expected
    assert tuple(prompt[-2:]) == COMPLETION_HEADER


def test_a_prompt_is_the_beginning_of_its_document():
    renderer = Renderer(RenderConfig())
    prompt = renderer.prompt("What is 2 + 2?")
    document = renderer.render(conversation("What is 2 + 2?", "r", "a")).tokens
    assert document[: prompt.size].tolist() == prompt.tolist()


def test_rendering_and_parsing_gives_the_messages_back(sample_conversations):
    renderer = Renderer(BARE)
    for item in sample_conversations[::100]:
        messages = [(m.role, m.channel, m.content) for m in item.messages]
        assert parse_messages(renderer.render(item).tokens) == messages


@pytest.mark.parametrize(
    ("texts", "what"),
    [
        (("a<|end|>", "r", "f"), "user message cannot be rendered: special token in"),
        (("a", "", "f"), "analysis message cannot be rendered: empty"),
        (("a", "r", "\ud800"), "final message cannot be rendered: invalid unicode in"),
        (("a", "<|reserved_200013|>", "f"), "special token in"),
    ],
)
def test_text_that_cannot_be_rendered_is_refused(texts, what):
    with pytest.raises(DataError, match=what):
        Renderer(BARE).render(conversation(*texts))


def test_text_that_only_looks_special_is_text():
    item = conversation("a <| b", "<|ends|> <|", "|> <|end|")
    assert parse_messages(Renderer(BARE).render(item).tokens)[1][2] == "<|ends|> <|"


def test_what_the_pretokenizer_cannot_hold_is_set_aside():
    block = Renderer(BARE).block([conversation(" " * 1_000_000 + "a", "r", "f")] * 2)
    assert block.failed == {0: "untokenizable", 1: "untokenizable"} and block.flat.size == 0


def test_a_tokenizer_that_loses_text_is_noticed(monkeypatch):
    from vpmoe.data import harmony

    honest = harmony.spell
    lossy = lambda tokens: honest(tokens).replace(b"b", b"?")  # noqa: E731
    monkeypatch.setattr(harmony, "spell", lossy)
    block = Renderer(BARE).block([conversation("xx", "yy", "zz"), conversation("b", "y", "z")])
    assert block.failed == {1: "does_not_round_trip"} and block.kept == [0]


def test_an_effort_without_a_system_message_is_refused():
    with pytest.raises(DataError, match=r"render\.system is false"):
        Renderer(BARE).prompt("x", "high")


def test_special_tokens_in_the_settings_are_refused():
    with pytest.raises(DataError, match="special token"):
        Renderer(RenderConfig(developer_instructions="<|end|>"))


def test_wrong_settings_are_config_errors():
    from vpmoe.config import validate

    with pytest.raises(ConfigError, match="reasoning_effort"):
        validate(RenderConfig, {"reasoning_effort": "huge"}, source="x")
