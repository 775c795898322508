from dataclasses import replace

import numpy as np
import pytest

from tests.rollouts.test_collate import COMPLETION, rollout
from vpmoe.errors import TeacherError
from vpmoe.rollouts.collate import pack_rollouts
from vpmoe.rollouts.scoring import with_teacher
from vpmoe.spans import Span


class Telltale:
    """Its log-prob of a token says which token that is, and after how many it came."""

    def score(self, sequences):
        return [-(ids[1:] + np.arange(1, len(ids)) / 1024).astype(np.float32) for ids in sequences]


class Short(Telltale):
    """Says nothing of the last token."""

    def score(self, sequences):
        return [scores[:-1] for scores in super().score(sequences)]


def test_every_sampled_token_gets_the_score_of_itself_in_its_place():
    long = replace(rollout(), prompt=np.arange(7), teacher_logprobs=None)
    short = replace(rollout(COMPLETION[:3]), teacher_logprobs=None)
    scored = with_teacher([long, short], Telltale())  # pyright: ignore[reportArgumentType]
    for before, after in zip((long, short), scored, strict=True):
        places = len(before.prompt) + np.arange(len(before.completion))
        expected = -(before.completion + places / 1024).astype(np.float32)
        np.testing.assert_array_equal(after.teacher_logprobs, expected)
    batch = pack_rollouts(scored, seq_len=64)
    assert batch.teacher_logprobs is not None
    sampled = batch.span_ids != Span.IGNORE
    places = batch.positions[sampled] + 1
    expected = -(batch.labels[sampled] + places / 1024).float()
    assert batch.teacher_logprobs[sampled].tolist() == expected.tolist()
    assert not batch.teacher_logprobs[~sampled].any()


def test_a_teacher_that_leaves_out_a_token_is_refused():
    with pytest.raises(TeacherError):
        with_teacher([rollout()], Short())  # pyright: ignore[reportArgumentType]
