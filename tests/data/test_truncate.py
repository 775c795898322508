"""The five rules, by example and as properties that hold for every conversation and length."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import conversation
from vpmoe.data.conversation import text_problem
from vpmoe.data.harmony import RenderConfig, Renderer, encode
from vpmoe.data.oracle import parse_messages
from vpmoe.data.structure import read_structure
from vpmoe.data.truncate import truncate

BARE = RenderConfig(system=False)
FULL = RenderConfig(developer_instructions="Be brief, please.")
QUERY, REASONING, ANSWER = "What is two and two?", "First this. Then that. So four.", "It is four."
WRAPPERS = 4 + 6  # user's and analysis's start, role, (channel, name,) message token and end


def document(config, *texts):
    return Renderer(config).block([conversation(*texts)]).flat


def cut(config, max_length, texts=(QUERY, REASONING, ANSWER)):
    result = truncate(document(config, *texts), max_length)
    messages = None if result.tokens is None else parse_messages(result.tokens[:-1])
    return result, messages


def sizes(*texts):
    return [encode(text).size for text in texts]


def test_what_fits_is_left_alone():
    whole = document(BARE, QUERY, REASONING, ANSWER)
    result = truncate(whole, whole.size)
    assert result.tokens is whole and not result.cuts


def test_one_token_too_many_costs_one_token_of_analysis():
    whole = document(BARE, QUERY, REASONING, ANSWER)
    result, messages = cut(BARE, whole.size - 1)
    assert result.tokens.size == whole.size - 1 and result.cuts == {"analysis"}
    assert messages[0][2] == QUERY and messages[2][2] == ANSWER
    assert messages[1][2] == REASONING.removeprefix("First")


def test_the_user_message_gives_way_after_the_analysis():
    query, _, answer = sizes(QUERY, REASONING, ANSWER)
    room = WRAPPERS + answer + 6 + 1  # the final's wrappers and the end of text
    result, messages = cut(BARE, room + query - 2)
    assert result.cuts == {"analysis", "user"}
    assert messages[1] == ("assistant", "analysis", "")
    assert QUERY.endswith(messages[0][2]) and encode(messages[0][2]).size == query - 2
    result, messages = cut(BARE, room)
    assert [m[2] for m in messages] == ["", "", ANSWER]


def test_a_final_that_does_not_fit_drops_the_row():
    (answer,) = sizes(ANSWER)
    assert cut(BARE, answer + 6)[0].reason == "final_too_long"
    assert cut(BARE, answer + 6 + 1)[0].reason == "no_room_beside_final"
    assert cut(BARE, WRAPPERS + answer + 6)[0].reason == "no_room_beside_final"
    assert cut(BARE, WRAPPERS + answer + 6 + 1)[0].reason is None


def test_the_system_message_is_dropped_whole_and_last_the_developer_message():
    whole = document(FULL, QUERY, REASONING, ANSWER)
    starts = read_structure(whole, np.array([whole.size])).starts
    system, developer = int(starts[1]), int(starts[2] - starts[1])
    (answer,) = sizes(ANSWER)
    least = WRAPPERS + answer + 6 + 1
    result, messages = cut(FULL, system + developer + least)
    assert [m[0] for m in messages[:2]] == ["system", "developer"]
    assert result.cuts == {"analysis", "user"}
    result, messages = cut(FULL, system + developer + least - 1)
    assert [m[0] for m in messages] == ["developer", "user", "assistant", "assistant"]
    assert "system_dropped" in result.cuts and messages[1][2] == QUERY  # the room goes to the user
    result, messages = cut(FULL, developer + least - 1)
    assert [m[0] for m in messages] == ["user", "assistant", "assistant"]
    assert {"system_dropped", "developer_dropped"} <= result.cuts


def test_no_character_is_cut_in_two():
    texts = (QUERY, "🙂👩‍🚀" * 20 + "漢字" * 10, ANSWER)
    whole = document(BARE, *texts)
    for size in range(WRAPPERS + 30, whole.size):
        result, messages = cut(BARE, size, texts)
        assert result.tokens.size <= size
        assert "\ufffd" not in messages[1][2] and texts[1].endswith(messages[1][2])


words = st.text(min_size=1, max_size=60).filter(lambda t: text_problem(t) is None)


@settings(max_examples=150, deadline=None)
@given(words, words, words, st.integers(8, 200), st.sampled_from([BARE, FULL]))
def test_every_result_parses_fits_and_keeps_the_final(query, reasoning, answer, length, config):
    whole = document(config, query, reasoning, answer)
    result = truncate(whole, length)
    if result.tokens is None:
        final = encode(answer).size + 6 + 1
        assert (result.reason == "final_too_long") == (final > length)
        return
    assert result.tokens.size <= max(length, 0)
    assert read_structure(result.tokens, np.array([result.tokens.size])).problems == {}
    messages = parse_messages(result.tokens[:-1])
    assert messages[-1] == ("assistant", "final", answer)
    assert messages[-2][:2] == ("assistant", "analysis") and reasoning.endswith(messages[-2][2])
    assert messages[-3][0] == "user" and query.endswith(messages[-3][2])
    if messages[-3][2] != query:
        assert messages[-2][2] == ""  # the user gives way only when the analysis has given all


@settings(max_examples=60, deadline=None)
@given(words, words, words, st.integers(20, 120))
def test_as_much_as_fits_is_kept(query, reasoning, answer, length):
    """One more token would not fit, or would begin inside a character."""
    whole = document(BARE, query, reasoning, answer)
    result = truncate(whole, length)
    if result.tokens is None or not result.cuts:
        return
    assert length - result.tokens.size <= 3  # a character has at most four bytes, one each token
