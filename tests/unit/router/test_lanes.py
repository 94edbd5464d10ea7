"""Who goes next, against a list that is sorted anew each time; fairness and ageing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.admission.lanes import AGEING_S, MAX_STALE, Lanes, Rank
from tests.unit.router.fleet import Clock

RANKS = st.builds(
    Rank, tenant=st.sampled_from("abc"), priority=st.sampled_from((-100, -1, 0, 1, 100)), begun=st.booleans()
)


@dataclass(eq=False)
class Entry:
    rank: Rank


def rank(tenant: str = "a", priority: int = 0, *, begun: bool = False) -> Rank:
    return Rank(tenant=tenant, priority=priority, begun=begun)


class NaiveLanes:
    """The same rule in as few words as possible: look at everybody, every time."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.since: dict[Rank, tuple[float, int]] = {}
        self.events = 0

    def add(self, entry: Entry, now_s: float) -> None:
        if all(other.rank != entry.rank for other in self.entries):
            self.wait_from_now(entry.rank, now_s)
        self.entries.append(entry)

    def remove(self, entry: Entry, now_s: float, *, served: bool) -> None:
        self.entries.remove(entry)
        if served:
            self.wait_from_now(entry.rank, now_s)

    def wait_from_now(self, rank: Rank, now_s: float) -> None:
        self.events += 1
        self.since[rank] = (now_s, self.events)

    def sorted(self) -> list[Entry]:
        def key(entry: Entry) -> tuple[bool, float, int]:
            since_s, event = self.since[entry.rank]
            return not entry.rank.begun, since_s + entry.rank.priority * AGEING_S, event

        return sorted(self.entries, key=key)


class AnyOrder(RuleBasedStateMachine):
    """Entries come, are served whether it is their turn or not, and give up."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.lanes: Lanes[Entry] = Lanes(self.clock)
        self.naive = NaiveLanes()

    @rule(rank=RANKS)
    def come(self, rank: Rank) -> None:
        entry = Entry(rank)
        would_be_first = self.lanes.would_be_first(rank)
        self.lanes.add(rank, entry)
        self.naive.add(entry, self.clock())
        assert would_be_first == (self.lanes.first is entry)

    @precondition(lambda self: self.naive.entries)
    @rule(data=st.data(), served=st.booleans())
    def leave(self, data: st.DataObject, served: bool) -> None:
        self._leave(data.draw(st.sampled_from(self.naive.entries)), served=served)

    @precondition(lambda self: self.naive.entries)
    @rule()
    def serve_the_first(self) -> None:
        assert self.lanes.first is not None
        self._leave(self.lanes.first, served=True)

    def _leave(self, entry: Entry, *, served: bool) -> None:
        self.lanes.remove(entry.rank, entry, served=served)
        self.naive.remove(entry, self.clock(), served=served)

    @rule(seconds=st.sampled_from((0.0, 0.5, AGEING_S, 25.0)))
    def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def same_as_the_sorted_list(self) -> None:
        self.lanes.check_integrity()
        expected = self.naive.sorted()
        assert len(self.lanes) == len(expected)
        assert self.lanes.first is (expected[0] if expected else None)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lanes(clock: Clock) -> Lanes[Entry]:
    return Lanes(clock)


def fill(lanes: Lanes[Entry], *ranks: Rank) -> None:
    for each in ranks:
        lanes.add(each, Entry(each))


def serve(lanes: Lanes[Entry]) -> Rank:
    """Serves whose turn it is."""
    first = lanes.first
    assert first is not None
    lanes.remove(first.rank, first, served=True)
    return first.rank


def test_less_goes_first_and_what_has_begun_before_everything(lanes: Lanes[Entry]) -> None:
    order = [rank(priority=100, begun=True), rank(priority=-100), rank(priority=-1), rank(), rank(priority=3)]
    fill(lanes, *reversed(order))
    assert [serve(lanes) for _ in order] == order


def test_a_backlog_of_one_tenant_does_not_starve_another(lanes: Lanes[Entry], clock: Clock) -> None:
    fill(lanes, *[rank("a")] * 1000)
    for _ in range(100):
        clock.now_s += 0.1
        serve(lanes)
    fill(lanes, *[rank("b")] * 10, rank("c"))
    # whoever waited before goes first; then all in turn until the newcomers are through
    served = [serve(lanes).tenant for _ in range(22)]
    assert served == ["a", "b", "c", *["a", "b"] * 9, "a"]


def test_without_backlogs_it_is_first_come_first_served(lanes: Lanes[Entry], clock: Clock) -> None:
    tenants = [f"t{number}" for number in range(50)]
    for tenant in tenants:
        clock.now_s += 0.01
        fill(lanes, rank(tenant))
    assert [serve(lanes).tenant for _ in tenants] == tenants


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_of_priority_is_worth_so_much_waiting(lanes: Lanes[Entry], clock: Clock, steps: int) -> None:
    """Requests of another tenant that are more urgent come faster than they can be served."""
    fill(lanes, rank("patient", steps), *[rank("urgent")] * 2)
    began_s = clock.now_s
    while serve(lanes).tenant == "urgent":
        clock.now_s += 1.0
        fill(lanes, *[rank("urgent")] * 2)
    assert clock.now_s - began_s == pytest.approx(steps * AGEING_S, abs=1.0)


def test_giving_up_costs_a_tenant_no_turn(lanes: Lanes[Entry], clock: Clock) -> None:
    impatient = Entry(rank("a"))
    lanes.add(impatient.rank, impatient)
    fill(lanes, rank("a"))
    clock.now_s += 1
    fill(lanes, rank("b"))
    lanes.remove(impatient.rank, impatient, served=False)
    assert serve(lanes).tenant == "a"


def test_nothing_piles_up_behind_somebody_who_waits_for_long(lanes: Lanes[Entry]) -> None:
    fill(lanes, rank("a", -100))
    for number in range(100 * MAX_STALE):
        entry = Entry(rank(f"t{number}"))
        lanes.add(entry.rank, entry)
        lanes.remove(entry.rank, entry, served=False)
        lanes.check_integrity()
    assert serve(lanes).tenant == "a"


class Counted(float):
    """Seconds that count how often they are compared."""

    comparisons = 0

    def __add__(self, other: float) -> Counted:
        return Counted(float(self) + other)

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return float(self) == other

    def __lt__(self, other: float) -> bool:
        Counted.comparisons += 1
        return float(self) < float(other)

    __hash__ = float.__hash__


def test_ten_thousand_lanes_take_few_looks_each() -> None:
    """A line that is searched or sorted for everybody would take ten thousand."""
    now_s, count = itertools.count(), 10_000
    lanes: Lanes[Entry] = Lanes(lambda: Counted(next(now_s)))
    Counted.comparisons = 0
    for number in range(count):
        fill(lanes, rank(f"t{number}", number % 7))
    for _ in range(count):
        serve(lanes)
    assert count < Counted.comparisons < 100 * count
