import pytest

from vpmoe.config import validate
from vpmoe.errors import ConfigError
from vpmoe.rollouts.curriculum import CurriculumConfig, PhaseConfig, effort_of


def test_default_phases_are_the_plans_three():
    curriculum = CurriculumConfig()
    assert curriculum.phase(0.0).low == 0.7
    assert curriculum.phase(0.3).medium == 0.6
    assert curriculum.phase(0.65).rollouts_per_prompt == 2
    assert curriculum.phase(0.7).high == 0.6
    assert curriculum.phase(1.0).high == 0.6


def test_every_prefix_holds_the_shares_within_two_prompts():
    phase = PhaseConfig(until=1.0, low=0.2, medium=0.6, high=0.2)
    seen = {"low": 0, "medium": 0, "high": 0}
    for number in range(2_000):
        seen[effort_of(phase, number)] += 1
        for effort, share in (("low", 0.2), ("medium", 0.6), ("high", 0.2)):
            assert abs(seen[effort] - share * (number + 1)) <= 2.5


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"until": 1.0, "low": 0.5}], "not 1"),
        ([{"until": 0.5, "low": 1.0}], "the last must end at 1"),
        ([{"until": 0.5, "low": 1.0}, {"until": 0.5, "low": 1.0}], "must rise"),
    ],
)
def test_a_curriculum_that_does_not_add_up_is_refused(phases, said):
    with pytest.raises(ConfigError, match=said):
        validate(CurriculumConfig, {"phases": phases}, source="test")
