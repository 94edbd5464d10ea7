"""When those who were refused are told to come back."""

from __future__ import annotations

import pytest

from router.admission.vacancies import LONGEST_S, RECENT, SHORTEST_S, Vacancies
from tests.unit.router.fleet import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vacancies(clock: Clock) -> Vacancies:
    return Vacancies(clock)


def drain(vacancies: Vacancies, clock: Clock, *, every_s: float, count: int) -> None:
    for _ in range(count):
        clock.now_s += every_s
        vacancies.vacated()


def test_each_is_promised_a_departure_of_his_own(vacancies: Vacancies, clock: Clock) -> None:
    drain(vacancies, clock, every_s=2.0, count=10)
    assert [vacancies.come_back_in_s() for _ in range(3)] == [2.0, 4.0, 6.0]
    drain(vacancies, clock, every_s=2.0, count=1)
    assert vacancies.come_back_in_s() == pytest.approx(6.0)


def test_a_promise_that_has_passed_is_not_counted_again(vacancies: Vacancies, clock: Clock) -> None:
    drain(vacancies, clock, every_s=1.0, count=10)
    assert vacancies.come_back_in_s() == 1.0
    drain(vacancies, clock, every_s=1.0, count=5)
    assert vacancies.come_back_in_s() == 1.0


def test_it_is_the_recent_past_that_counts(vacancies: Vacancies, clock: Clock) -> None:
    drain(vacancies, clock, every_s=20.0, count=50)
    drain(vacancies, clock, every_s=1.0, count=RECENT + 1)
    assert vacancies.come_back_in_s() == 1.0


def test_a_rest_is_no_slowness(vacancies: Vacancies, clock: Clock) -> None:
    drain(vacancies, clock, every_s=1.0, count=3)
    clock.now_s += 3600
    vacancies.opened()
    drain(vacancies, clock, every_s=1.0, count=3)
    assert vacancies.come_back_in_s() == 1.0


def test_who_sees_nobody_leave_waits_longer_and_longer(vacancies: Vacancies, clock: Clock) -> None:
    told = []
    for _ in range(20):
        clock.now_s += 3.0
        told.append(vacancies.come_back_in_s())
    assert told == sorted(told)
    assert told[0] == 3.0
    assert told[-1] == LONGEST_S


def test_the_shortest_and_the_longest_wait(vacancies: Vacancies, clock: Clock) -> None:
    drain(vacancies, clock, every_s=0.001, count=RECENT)
    assert vacancies.come_back_in_s() == SHORTEST_S
    told = [vacancies.come_back_in_s() for _ in range(100_000)]
    assert max(told) == LONGEST_S
    # what was promised to a crowd that never came back is forgotten with time
    drain(vacancies, clock, every_s=1.0, count=int(LONGEST_S) + 1)
    assert vacancies.come_back_in_s() == pytest.approx(1.0, abs=0.1)
