"""Which questions a round asks, how often, and with which chance."""

import numpy as np

from tests.models.test_student import student_of
from vpmoe.data.prompts import Prompt
from vpmoe.rollouts.curriculum import PhaseConfig
from vpmoe.rollouts.source import LocalRollouts, Request, RolloutsConfig


class Pool:
    """Question i is the one token i."""

    def __len__(self):
        return 90

    def prompt(self, index, effort):
        return Prompt(f"{index}-{effort}", np.array([index]))


class Indifferent:
    def score(self, sequences):
        return [np.zeros(len(ids) - 1, dtype=np.float32) for ids in sequences]


def asked(members: range, *, first_prompt=0, version=0, repeats=2):
    config = RolloutsConfig.model_validate(
        {"per_step": 1, "max_new_tokens": {"low": 6, "medium": 6, "high": 6}}
    )
    source = LocalRollouts(
        student_of(),
        Indifferent(),  # pyright: ignore[reportArgumentType]
        Pool(),
        config,
        seed=3,
        has_effort=True,
    )
    phase = PhaseConfig(until=1.0, low=0.5, high=0.5, rollouts_per_prompt=repeats)
    return source.round(Request(first_prompt, members, phase, version))


def test_a_question_is_answered_as_often_as_the_phase_says_each_time_anew():
    rollouts = asked(range(8))
    ids = [rollout.sample_id for rollout in rollouts]
    assert ids[::2] == ids[1::2]
    assert len(set(ids)) == 4
    assert len({rollout.completion.tobytes() for rollout in rollouts}) == 8
    rest = asked(range(4), first_prompt=2)
    assert [rollout.sample_id for rollout in rest] == ids[4:]


def test_ranks_share_the_questions_of_a_round():
    whole = [rollout.sample_id for rollout in asked(range(6))]
    parts = [rollout.sample_id for part in (range(3), range(3, 6)) for rollout in asked(part)]
    assert parts == whole


def test_every_round_draws_anew_and_the_same_round_the_same():
    first, again, later = asked(range(4)), asked(range(4)), asked(range(4), version=1)
    texts = [[rollout.completion.tolist() for rollout in r] for r in (first, again, later)]
    assert texts[0] == texts[1]
    assert all(one != other for one, other in zip(texts[0], texts[2], strict=True))
