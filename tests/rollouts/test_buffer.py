from dataclasses import replace

import pytest

from tests.rollouts.test_collate import rollout
from vpmoe.errors import RunError
from vpmoe.rollouts.buffer import RolloutBuffer


def test_first_in_first_out_and_nothing_lost():
    buffer = RolloutBuffer(capacity=4, max_staleness_steps=0)
    buffer.put([rollout(name=n) for n in "abcd"])
    assert [r.sample_id for r in buffer.take(3)] == ["a", "b", "c"]
    assert len(buffer) == 1
    with pytest.raises(RunError, match="asked for 2 rollouts and the buffer holds 1"):
        buffer.take(2)


def test_stale_rollouts_are_dropped_and_counted():
    buffer = RolloutBuffer(capacity=4, max_staleness_steps=2)
    buffer.put([replace(rollout(name=n), policy_version=v) for n, v in (("a", 0), ("b", 3))])
    assert buffer.drop_stale(2) == 0
    assert buffer.drop_stale(3) == 1
    assert buffer.num_dropped == 1
    assert buffer.take(1)[0].sample_id == "b"


def test_overflow_and_unscored_rollouts_are_refused():
    buffer = RolloutBuffer(capacity=1, max_staleness_steps=0)
    with pytest.raises(RunError, match="unscored"):
        buffer.put([replace(rollout(), teacher_logprobs=None)])
    with pytest.raises(RunError, match="holds 0 of 1 and was given 2"):
        buffer.put([rollout(), rollout()])


def test_state_brings_back_the_same_rollouts():
    buffer = RolloutBuffer(capacity=4, max_staleness_steps=2)
    buffer.put([rollout(name="a"), rollout(name="b")])
    other = RolloutBuffer(capacity=4, max_staleness_steps=2)
    other.load_state(buffer.state())
    ours, theirs = buffer.take(2), other.take(2)
    for one, two in zip(ours, theirs, strict=True):
        assert one.sample_id == two.sample_id
        assert one.rollout_logprobs.tobytes() == two.rollout_logprobs.tobytes()
