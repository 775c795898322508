from dataclasses import replace

import numpy as np
import pytest

from tests.rollouts.test_collate import COMPLETION, rollout
from vpmoe.rollouts.gates import GatesConfig, broken_gates, round_health
from vpmoe.vocabulary import CHANNEL


def test_a_healthy_round_breaks_nothing():
    health = round_health([rollout(), rollout()])
    assert health.shares["invalid"] == 0
    assert health.mean_length == len(COMPLETION)
    # rollout -1, -2, ... against teacher -0.5, -1, ...: the student is 0.5 * mean(1..13) below
    assert health.reverse_kl_nats == pytest.approx(-3.5)
    assert broken_gates(health, health, GatesConfig()) == []


def test_every_limit_is_named_with_its_value():
    cut = replace(rollout(COMPLETION[:4]), stop_reason="length")
    bad = replace(rollout(np.array([CHANNEL, CHANNEL])), stop_reason="length")
    health = round_health([cut, bad])
    limits = GatesConfig(max_cut_share=0.5, max_invalid_share=0.5, max_length_growth=1.5)
    first = replace(health, mean_length=1.0)
    said = broken_gates(health, first, limits)
    assert said == [
        "completions cut at the length cap: 1, limit 0.5",
        "completions that are not Harmony: 1, limit 0.5",
        "completion length over the first round's: 3, limit 1.5",
    ]
