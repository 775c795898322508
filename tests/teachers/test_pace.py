"""The number of requests in flight follows what the server can do."""

import pytest

from vpmoe.teachers.pace import Pace


def drive(pace, rate_at, rounds: int, now: float = 0.0) -> tuple[float, list[int]]:
    """Answers of 100 tokens at the throughput that `rate_at(limit)` gives; limits after each."""
    pace.begin(now)
    limits = []
    for _ in range(rounds):
        now += 100 / rate_at(pace.limit)
        pace.answered(100, now)
        limits.append(pace.limit)
    return now, limits


@pytest.mark.parametrize("best", [4, 9, 20, 64])
def test_it_grows_while_throughput_does_and_settles_near_where_it_stops(best):
    pace = Pace(start=4, ceiling=256)
    _, limits = drive(pace, lambda limit: 1_000.0 * min(limit, best), 6_000)
    settled = sorted(limits[3_000:])[1_500]
    assert best / 1.6 <= settled <= best * 2.3


def test_a_server_that_gains_nothing_keeps_the_start():
    pace = Pace(start=4, ceiling=256)
    _, limits = drive(pace, lambda limit: 1_000.0, 2_000)
    assert sorted(limits)[1_000] == 4
    assert max(limits) <= 9


def test_it_never_exceeds_the_ceiling():
    pace = Pace(start=4, ceiling=10)
    _, limits = drive(pace, lambda limit: 1_000.0 * limit, 2_000)
    assert max(limits) == 10 and limits[-1] == 10
    assert Pace(start=4, ceiling=2).limit == 2


def test_overload_halves_it_and_it_recovers():
    pace = Pace(start=4, ceiling=64)
    now, _ = drive(pace, lambda limit: 1_000.0 * limit, 4_000)
    assert pace.limit >= 60
    for expected in (31, 15, 7, 3, 1, 1):
        pace.overloaded(now)
        assert pace.limit == expected
    _, limits = drive(pace, lambda limit: 1_000.0 * limit, 4_000, now)
    assert limits[3] == 1  # it does not jump back at once
    assert max(limits) >= 60


def test_a_pause_between_two_batches_is_not_counted():
    pace, patient = Pace(start=4, ceiling=64), Pace(start=4, ceiling=64)
    now = drive(pace, lambda limit: 1_000.0 * limit, 7)[0]
    drive(patient, lambda limit: 1_000.0 * limit, 7)
    pace.begin(now)
    patient.begin(now + 3_600)
    for pace_, at in ((pace, now), (patient, now + 3_600)):
        drive(pace_, lambda limit: 1_000.0 * limit, 200, at)
    assert pace.limit == patient.limit > 4
