"""Decoding with a cache against the full forward pass."""

import pytest
import torch

from tests.models.test_student import ABLATIONS, shaken, student_of
from vpmoe.models.cache import ring_places


def test_ring_places():
    places = ring_places(torch.tensor([0, 2, 4, 6, 9]), 4)
    assert places.tolist() == [
        [-4, -3, -2, -1],
        [0, 1, -2, -1],
        [0, 1, 2, 3],
        [4, 5, 2, 3],
        [8, 5, 6, 7],
    ]


@pytest.mark.parametrize("override", ["name='all'", *ABLATIONS])
@torch.no_grad()
def test_decoding_equals_the_full_pass(override):
    # Prompts of 3, 12 and 7 tokens, then 9 more each: past windows of 4 in prompt and completion.
    student = shaken(student_of(override))
    torch.manual_seed(0)
    lengths, more = torch.tensor([3, 12, 7]), 9
    tokens = torch.randint(0, 97, (3, 12 + more))
    place = torch.arange(12 + more)
    full = student(
        tokens, positions=place.expand(3, -1), document_ids=torch.zeros_like(tokens)
    ).hidden
    cache = student.new_cache(batch=3, capacity=12 + more)
    documents = torch.where(place[:12] < lengths[:, None], 0, -1)
    first = student(
        tokens[:, :12], positions=place[:12].expand(3, -1), document_ids=documents, cache=cache
    )
    real = documents == 0
    torch.testing.assert_close(first.hidden[real], full[:, :12][real], atol=1e-10, rtol=1e-10)
    rows = torch.arange(3)
    for step in range(more):
        at = lengths + step
        out = student(
            tokens[rows, at][:, None],
            positions=at[:, None],
            document_ids=torch.zeros(3, 1, dtype=torch.int64),
            cache=cache,
        )
        torch.testing.assert_close(out.hidden[:, 0], full[rows, at], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_conversations_that_leave_do_not_disturb_the_others():
    student = student_of()
    torch.manual_seed(0)
    tokens = torch.randint(0, 97, (4, 8))
    place = torch.arange(8).expand(4, -1)
    full = student(tokens, positions=place, document_ids=torch.zeros_like(tokens)).hidden
    cache = student.new_cache(batch=4, capacity=8)
    zeros = torch.zeros(4, 6, dtype=torch.int64)
    student(tokens[:, :6], positions=place[:, :6], document_ids=zeros, cache=cache)
    kept = torch.tensor([3, 1])
    cache.keep(kept)
    out = student(
        tokens[kept, 6:7], positions=place[kept, 6:7], document_ids=zeros[:2, :1], cache=cache
    )
    torch.testing.assert_close(out.hidden[:, 0], full[kept, 6], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_full_cache_and_long_steps_are_refused():
    student = student_of()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    cache = student.new_cache(batch=1, capacity=3)
    student(tokens, positions=torch.arange(3)[None], document_ids=tokens, cache=cache)
    with pytest.raises(ValueError, match="is full"):
        student(tokens[:, :1], positions=tokens[:, :1] + 3, document_ids=tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match="one token at a time, got 3"):
        student(tokens, positions=tokens, document_ids=tokens, cache=cache)
