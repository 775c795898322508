"""Changing the effort must give what rendering with that effort would have given."""

import numpy as np
import pytest

from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.effort import with_effort
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.errors import DataError

MESSAGES = (
    Message("user", None, "Was ist 2 + 2?\n\nReasoning: medium"),  # a line that must stay
    Message("assistant", "analysis", "Simple sum."),
    Message("assistant", "final", "4"),
)


def rendered(conversation=MESSAGES, **settings):
    return Renderer(RenderConfig(**settings)).render(Conversation("s", conversation)).tokens


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"developer_instructions": "Be brief."}, {"conversation_start_date": "2025-06-28"}],
)
def test_equals_rendering_with_that_effort(effort, settings):
    tokens = rendered(**settings)
    expected = rendered(reasoning_effort=effort, **settings)
    changed = with_effort(tokens, effort, render=RenderConfig(**settings))
    np.testing.assert_array_equal(changed, expected)
    assert changed.dtype == np.int32


def test_a_conversation_without_a_system_message_gets_one():
    bare = rendered(system=False, developer_instructions="Be brief.")
    render = RenderConfig(system=False, developer_instructions="Be brief.")
    expected = rendered(reasoning_effort="high", developer_instructions="Be brief.")
    np.testing.assert_array_equal(with_effort(bare, "high", render=render), expected)


def test_an_own_system_message_keeps_its_words():
    own = Message("system", None, "You are a poet.\n\nReasoning: low\n\nNo rhymes.")
    changed = Message("system", None, "You are a poet.\n\nReasoning: high\n\nNo rhymes.")
    tokens = with_effort(rendered((own, *MESSAGES)), "high", render=RenderConfig())
    np.testing.assert_array_equal(tokens, rendered((changed, *MESSAGES)))


def test_a_system_message_without_an_effort_is_refused():
    own = Message("system", None, "You are a poet.")
    with pytest.raises(DataError, match="names no reasoning effort: 'You are a poet"):
        with_effort(rendered((own, *MESSAGES)), "high", render=RenderConfig())
