import numpy as np
import pytest
import torch

from vpmoe.data.conversation import Conversation, Message
from vpmoe.data.harmony import RenderConfig, Renderer, encode
from vpmoe.errors import DataError
from vpmoe.models.student import StudentConfig, build_student
from vpmoe.rollouts.chat import ChannelReader, ChatSession, Piece
from vpmoe.rollouts.sampler import Sampler
from vpmoe.vocabulary import ANALYSIS, ASSISTANT, CHANNEL, END, FINAL, MESSAGE, RETURN, START, USER

WORDS = tuple(sorted({*range(50, 90), *encode("What now?").tolist(), *encode("Then?").tolist()}))
SUBSET = tuple(
    sorted(
        {*WORDS, USER, FINAL, ANALYSIS, ASSISTANT, 199_999, RETURN, CHANNEL, START, END, MESSAGE}
    )
)


def completion(reasoning: str, final: str) -> list[int]:
    return [
        CHANNEL, ANALYSIS, MESSAGE, *encode(reasoning).tolist(), END,
        START, ASSISTANT, CHANNEL, FINAL, MESSAGE, *encode(final).tolist(), RETURN,
    ]  # fmt: skip


class Scripted(ChatSession):
    """A session whose student writes what it is told to."""

    def __init__(self, renderer, scripts):
        super().__init__(None, renderer)
        self._require_known = lambda prompt: None
        self.scripts, self.prompts = list(scripts), []

    def _tokens(self, prompt):
        self.prompts.append(prompt)
        yield from self.scripts.pop(0)


@pytest.fixture(scope="module")
def student():
    config = StudentConfig(
        num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8,
        vocab_subset=SUBSET, global_every=2, dense_layers=2, dense_hidden=16, init_std=0.5,
    )  # fmt: skip
    return build_student(config, seed=1)


def test_pieces_are_whole_characters_under_their_channel():
    reader = ChannelReader()
    tokens = completion("naïve 👩‍👩‍👧 𝕏", "漢字")
    pieces = [piece for token in tokens if (piece := reader.read(token))]
    assert "".join(p.text for p in pieces if p.channel == "analysis") == "naïve 👩‍👩‍👧 𝕏"
    assert "".join(p.text for p in pieces if p.channel == "final") == "漢字"
    assert {p.channel for p in pieces} == {"analysis", "final"}
    assert not any("\ufffd" in p.text for p in pieces)


def test_history_drops_reasoning_and_equals_the_renderer():
    renderer = Renderer(RenderConfig())
    session = Scripted(renderer, [completion("Secret.", "Four."), completion("Hm.", "Eight.")])
    assert list(session.ask("2 + 2?"))[-1] == Piece("final", ".")
    list(session.ask("Doubled?"))
    conversation = Conversation(
        "x",
        (
            Message("user", None, "2 + 2?"),
            Message("assistant", "final", "Four."),
            Message("user", None, "Doubled?"),
            Message("assistant", "analysis", "Hm."),
            Message("assistant", "final", "Eight."),
        ),
    )
    whole = renderer.render(conversation).tokens.tolist()
    said = session.prompts[1].tolist()
    assert said == whole[: len(said)]
    assert said[-2:] == [START, ASSISTANT]
    assert session.answer.final == "Eight."


def test_broken_turns_are_told_and_not_remembered():
    session = Scripted(Renderer(RenderConfig(system=False)), [completion("A", "B")[:-1]])
    list(session.ask("Hi"))
    assert session.answer.failure == "no_end"
    assert session.prompt("Hi").tolist() == session.prompts[0].tolist()


def test_greedy_chat_equals_the_sampler(student):
    renderer = Renderer(RenderConfig(system=False))
    session = ChatSession(student, renderer, max_new_tokens=20, temperature=0)
    written = list(session._tokens(session.prompt("What now?")))
    (expected,) = Sampler(student, max_batch=1).generate(
        [session.prompt("What now?")], max_new_tokens=20, temperature=0
    )
    assert written == expected.tokens.tolist()


def test_same_seed_same_words(student):
    renderer = Renderer(RenderConfig(system=False))

    def talk(seed):
        session = ChatSession(
            student, renderer, max_new_tokens=24, temperature=1, top_p=1, seed=seed
        )
        return list(session._tokens(session.prompt("What now?")))

    assert talk(1) == talk(1)
    assert talk(1) != talk(2)


def test_unknown_words_are_refused_in_words(student):
    session = ChatSession(student, Renderer(RenderConfig(system=False)), max_new_tokens=4)
    with pytest.raises(DataError, match="subset lacks 'ebra', ' crossing'"):
        list(session.ask("Zebra crossing"))
    assert torch.is_grad_enabled()
    assert session.prompt("Then?").tolist()[-2:] == [START, ASSISTANT]
    assert np.issubdtype(session.prompt("Then?").dtype, np.integer)
