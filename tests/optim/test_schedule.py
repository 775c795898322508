import pytest

from vpmoe.optim import ConstantConfig, CosineConfig, WsdConfig


def factors(schedule, num_steps):
    return [schedule.factor(step, num_steps=num_steps) for step in range(num_steps)]


def test_constant_after_a_warmup_in_steps():
    assert factors(ConstantConfig(warmup=4), 7) == [0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_warmup_as_a_share_of_all_steps():
    assert factors(ConstantConfig(warmup=0.25), 8) == [0.5, 1, 1, 1, 1, 1, 1, 1]


def test_no_warmup_starts_at_full_rate():
    assert factors(ConstantConfig(warmup=0), 2) == [1, 1]


def test_cosine_passes_its_middle_and_ends_at_final():
    schedule = CosineConfig(warmup=10, final=0.2)
    assert schedule.factor(9, num_steps=110) == 1
    assert schedule.factor(10, num_steps=110) == 1
    assert schedule.factor(60, num_steps=110) == pytest.approx(0.6)
    assert schedule.factor(35, num_steps=110) == pytest.approx(0.2 + 0.8 * (2 + 2**0.5) / 4)
    assert schedule.factor(110, num_steps=110) == pytest.approx(0.2)
    assert schedule.factor(500, num_steps=110) == pytest.approx(0.2)


def test_warmup_stable_decay():
    schedule = WsdConfig(warmup=2, decay=4, final=0.2)
    assert factors(schedule, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert schedule.factor(10, num_steps=10) == pytest.approx(0.2)


def test_decay_as_a_share():
    assert factors(WsdConfig(warmup=0, decay=0.5), 4) == [1, 1, 1, 0.5]


@pytest.mark.parametrize("schedule", [ConstantConfig(), CosineConfig(), WsdConfig()])
def test_defaults_stay_between_zero_and_one_for_any_length(schedule):
    for num_steps in (1, 2, 3, 1000):
        assert all(0 < factor <= 1 for factor in factors(schedule, num_steps))
