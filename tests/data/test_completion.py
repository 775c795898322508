"""Each failure class by its smallest example, and every real answer as a well-formed one."""

import numpy as np
import pytest

from vpmoe.data.completion import is_repeating, parse_completion
from vpmoe.data.harmony import RenderConfig, Renderer, encode
from vpmoe.vocabulary import (
    ANALYSIS,
    ASSISTANT,
    CALL,
    CHANNEL,
    END,
    END_OF_TEXT,
    FINAL,
    MESSAGE,
    RETURN,
    START,
)

THINK = [CHANNEL, ANALYSIS, MESSAGE, 17958, END]
ANSWER = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, 19, RETURN]


@pytest.mark.parametrize(
    ("tokens", "reasoning", "final", "failure"),
    [
        (THINK + ANSWER, "Simple", "4", None),
        (ANSWER[2:], None, "4", None),
        ([*THINK, START, ASSISTANT, *THINK, *ANSWER], "Simple\nSimple", "4", None),
        ([], None, None, "no_final"),
        (THINK[:1], None, None, "no_final"),
        (THINK[:2], None, None, "no_final"),
        (THINK[:4], "Simple", None, "no_final"),
        (THINK, "Simple", None, "no_final"),
        (THINK + ANSWER[:1], "Simple", None, "no_final"),
        (THINK + ANSWER[:4], "Simple", None, "no_final"),
        ([*THINK[:4], RETURN], "Simple", None, "no_final"),
        ([*THINK[:4], CALL], "Simple", None, "no_final"),
        (THINK + ANSWER[:-1], "Simple", "4", "no_end"),
        (THINK + ANSWER[:-1] + [END], "Simple", "4", "no_end"),
        (THINK + ANSWER[:-1] + [END_OF_TEXT], "Simple", "4", "no_end"),
        (THINK + ANSWER + [19], "Simple", "4", "invalid_header"),
        ([19, 19], None, None, "invalid_header"),
        ([CHANNEL, 19, MESSAGE, 19, RETURN], None, None, "invalid_header"),
        ([CHANNEL, ANALYSIS, START], None, None, "invalid_header"),
        ([CHANNEL, *[ANALYSIS] * 20], None, None, "invalid_header"),
        ([*THINK[:4], START, 19], "Simple", None, "invalid_header"),
        ([*THINK, 19], "Simple", None, "invalid_header"),
        ([*THINK, START, 19], "Simple", None, "invalid_header"),
        (THINK[:4] + [19, 20] * 40, "Simple" + "45" * 40, None, "repetition"),
        (THINK + ANSWER[:-2] + [7, 8, 9] * 20, "Simple", None, "repetition"),
    ],
)
def test_failure_classes(tokens, reasoning, final, failure):
    parsed = parse_completion(np.array(tokens, dtype=np.int64))
    assert parsed.failure == failure
    assert parsed.reasoning == reasoning
    if final is not None:
        assert parsed.final == final


def test_commentary_is_known_but_is_no_answer():
    header = encode("commentary").tolist()
    parsed = parse_completion([CHANNEL, *header, MESSAGE, 19, RETURN])
    assert parsed.failure == "no_final" and parsed.final is None and parsed.reasoning is None


def test_every_real_answer_parses(sample_conversations):
    renderer = Renderer(RenderConfig(system=False))
    for item in sample_conversations[::8]:
        prompt = renderer.prompt(item.messages[0].content)
        completion = renderer.render(item).tokens[prompt.size :]
        parsed = parse_completion(completion)
        assert (parsed.reasoning, parsed.final, parsed.failure) == (
            item.messages[1].content,
            item.messages[2].content,
            None,
        )


def test_what_counts_as_repeating():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 50_000, 500)
    assert not is_repeating(noise)
    assert not is_repeating(np.concatenate([noise, [5] * 31]))
    assert is_repeating(np.concatenate([noise, [5] * 32]))
    phrase = rng.integers(0, 50_000, 128)
    assert is_repeating(np.concatenate([noise, np.tile(phrase, 4)]))
    assert not is_repeating(np.concatenate([noise, np.tile(phrase, 3)]))
