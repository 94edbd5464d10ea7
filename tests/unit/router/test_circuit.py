"""The circuit breaker against a naive model that keeps every outcome, in a time of its own."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from router.workers.circuit import CLOSED, HALF_OPEN, MAX_CONSECUTIVE, MIN_CALLS, OPEN, OPEN_S, WINDOW_S, Circuit
from tests.unit.router.fleet import Clock


class CircuitMachine(RuleBasedStateMachine):
    """The model recomputes the state from the history of all outcomes since the circuit was last closed."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.circuit = Circuit(self.clock)
        self.history: list[tuple[float, bool]] = []
        self.opened_s: float | None = None
        self.probe: object | None = None

    @property
    def expected(self) -> str:
        if self.opened_s is None:
            return CLOSED
        return OPEN if self.clock.now_s - self.opened_s < OPEN_S else HALF_OPEN

    @rule(target=requests)
    def send(self) -> object:
        request = object()
        if self.expected == HALF_OPEN and self.probe is None:
            self.probe = request
        self.circuit.sent(request)
        return request

    @rule(request=consumes(requests))
    def succeed(self, request: object) -> None:
        closes = self.opened_s is not None and request is self.probe
        assert self.circuit.succeeded(request) == closes
        if closes:
            self.opened_s, self.probe, self.history = None, None, []
        elif self.opened_s is None:
            self.history.append((self.clock.now_s, False))
        self.circuit.over(request)

    @rule(request=consumes(requests), times=st.integers(1, 3))
    def fail(self, request: object, times: int) -> None:
        for _ in range(times):
            self.circuit.failed(request)
            self.expect_failure(request)
        self.circuit.over(request)

    def expect_failure(self, request: object) -> None:
        if self.opened_s is None:
            self.history.append((self.clock.now_s, True))
            if self.too_many():
                self.open()
        elif request is self.probe:
            self.open()

    def open(self) -> None:
        self.opened_s, self.probe, self.history = self.clock.now_s, None, []

    def too_many(self) -> bool:
        last = [failed for _, failed in self.history[-MAX_CONSECUTIVE:]]
        recent = [failed for at_s, failed in self.history if at_s > self.clock.now_s - WINDOW_S]
        in_a_row = len(last) == MAX_CONSECUTIVE and all(last)
        return in_a_row or (len(recent) >= MIN_CALLS and sum(recent) >= len(recent) / 2)

    @rule(request=consumes(requests))
    def cancel(self, request: object) -> None:
        if request is self.probe:
            self.probe = None
        self.circuit.over(request)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5, OPEN_S, WINDOW_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def agrees(self) -> None:
        assert self.circuit.state == self.expected
        assert self.circuit.admits == (self.expected == CLOSED or (self.expected == HALF_OPEN and self.probe is None))


CircuitMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestCircuit = CircuitMachine.TestCase


def circuit() -> tuple[Circuit, Clock]:
    clock = Clock()
    return Circuit(clock), clock


def test_four_failures_in_a_row_are_not_enough_five_are() -> None:
    one, _ = circuit()
    for _ in range(4):
        one.failed(object())
    one.succeeded(object())
    for _ in range(4):
        one.failed(object())
    assert one.state == CLOSED
    one.failed(object())
    assert one.state == OPEN


def test_every_other_call_failing_opens_it_at_the_tenth() -> None:
    one, _ = circuit()
    for number in range(10):
        assert one.state == CLOSED
        one.failed(object()) if number % 2 else one.succeeded(object())
    assert one.state == OPEN


def test_failures_long_ago_do_not_count() -> None:
    one, clock = circuit()
    for number in range(9):
        one.failed(object()) if number % 2 else one.succeeded(object())
    clock.now_s += WINDOW_S
    one.failed(object())
    assert one.state == CLOSED


def test_it_is_tried_with_one_request_at_a_time_and_opens_again_when_that_fails() -> None:
    one, clock = circuit()
    for _ in range(5):
        one.failed(object())
    early = object()
    one.sent(early)
    clock.now_s += OPEN_S - 0.01
    assert not one.admits
    clock.now_s += 0.01
    assert one.admits
    probe, second = object(), object()
    one.sent(probe)
    one.sent(second)
    assert not one.admits
    # what was sent before, or beside the probe, says nothing
    assert not one.succeeded(early)
    one.failed(second)
    assert one.state == HALF_OPEN
    one.failed(probe)
    assert one.state == OPEN
    clock.now_s += OPEN_S
    one.sent(probe)
    assert one.succeeded(probe)
    assert one.state == CLOSED
