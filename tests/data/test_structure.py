"""The grammar accepts what is rendered and refuses each single damage, by array operations only."""

import re

import numpy as np
import pytest

from tests.data.conftest import conversation, text
from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.structure import align_to_labels, read_structure
from vpmoe.vocabulary import CHANNEL, END, END_OF_TEXT, MESSAGE, RETURN, START, USER

CONVERSATIONS = [conversation(text(i, 4), text(i, 9), text(i, 3)) for i in range(5)]


@pytest.fixture
def block():
    made = Renderer(RenderConfig(developer_instructions="x")).block(CONVERSATIONS)
    return made.flat.copy(), made.lengths


def test_what_is_rendered_is_well_formed(block):
    structure = read_structure(*block)
    assert structure.problems == {}
    assert structure.starts.size == 5 * 5


def _positions(flat, lengths, document):
    begin = int(lengths[:document].sum())
    piece = flat[begin : begin + lengths[document]]
    return begin, {k: begin + np.flatnonzero(piece == k) for k in (START, CHANNEL, MESSAGE, END)}


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda f, b, p: (p[END][0] - 1, START), "out of order"),
        (lambda f, b, p: (p[END][0], START), "text between|out of order|wrong length"),
        (lambda f, b, p: (p[END][-1], RETURN), "out of order|return outside"),
        (lambda f, b, p: (p[END][-1] - 1, RETURN), "out of order"),
        (lambda f, b, p: (p[END][0] - 1, END), "text between|out of order"),
        (lambda f, b, p: (p[END][0] - 1, 200_013), "of no training conversation"),
        (lambda f, b, p: (p[END][0] - 1, 201_088), "outside the vocabulary"),
        (lambda f, b, p: (p[END][0] - 1, -1), "outside the vocabulary"),
        (lambda f, b, p: (p[END][0] - 1, END_OF_TEXT), "end of text"),
        (lambda f, b, p: (p[START][0] + 1, 19), "unknown role"),
        (lambda f, b, p: (p[START][-1] + 1, USER), "unknown role"),
        (lambda f, b, p: (p[CHANNEL][0] + 1, 19), "unknown channel"),
        (lambda f, b, p: (p[CHANNEL][-1] + 1, 35_644), "return outside a final message"),
        (lambda f, b, p: (p[MESSAGE][-1], 19), "out of order|wrong length"),
        (lambda f, b, p: (b, 19), "does not begin"),
    ],
)
def test_each_damage_is_found_in_its_own_document(block, damage, what):
    flat, lengths = block
    begin, positions = _positions(flat, lengths, 2)
    place, token = damage(flat, begin, positions)
    flat[place] = token
    problems = read_structure(flat, lengths).problems
    assert 2 in problems, "not found at all"
    assert re.search(what, problems[2])
    assert set(problems) <= {1, 2}  # a lost start also breaks the document it would have followed


def test_a_missing_end_of_text_is_found(block):
    flat, lengths = block
    flat[lengths[0] - 1] = 19
    assert 0 in read_structure(flat, lengths).problems


def test_alignment_shifts_inside_documents_only():
    spans = np.array([0, 1, 2, 0, 0, 2, 2, 0], dtype=np.uint8)
    assert align_to_labels(spans, np.array([4, 4])).tolist() == [1, 2, 0, 0, 2, 2, 0, 0]
    spans[4] = 1  # the first token of the second document is nobody's label
    assert align_to_labels(spans, np.array([4, 4])).tolist() == [1, 2, 0, 0, 2, 2, 0, 0]
