"""A worker as placement sees it: its load, its speed, and whether it takes requests."""

from __future__ import annotations

import pytest
from vlcache.worker.v1 import worker_pb2

from router.workers.circuit import CLOSED, HALF_OPEN, OPEN, OPEN_S
from router.workers.speed import DECAY, FIRST_TOKENS_PER_S, Speed
from router.workers.worker import PROMPT, READY, RESERVE, TOKENS, UNREACHABLE
from shared.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidRequestError,
    RequestCancelledError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)
from tests.unit.router.fleet import Clock, worker


def test_load_is_the_report_plus_what_happened_since_and_never_less_than_our_own() -> None:
    one = worker("prefill", "p", outstanding_tokens=100)
    assert one.load == 100
    ours = one.charge(30)
    assert one.load == 130
    # the next report contains our request and those of others
    one.observe(worker_pb2.WorkerInfo(role="prefill", state="ready", outstanding_tokens=120))
    assert one.load == 120
    ours.end()
    assert one.load == 90
    # a report from before our dispatch must not hide it
    late = one.charge(40)
    one.observe(worker_pb2.WorkerInfo(role="prefill", state="ready", outstanding_tokens=0))
    assert one.load == 40
    late.end()
    assert one.load == 0


def test_decode_load_is_every_byte_that_a_new_request_cannot_have() -> None:
    one = worker("decode", "d")
    said = worker_pb2.WorkerInfo(role="decode", state="ready")
    said.kv.reserved, said.kv.filling, said.kv.active, said.kv.retained = 1, 20, 300, 4000
    one.observe(said)
    assert one.load == 321


def test_charges_end_once_and_keep_their_sum() -> None:
    one = worker("decode", "d")
    first, second = one.charge(10), one.charge(20)
    first.resize(15)
    one.check_integrity()
    assert one.load == 35
    first.end()
    first.end()
    first.resize(99)
    assert one.load == 20
    second.end()
    one.check_integrity()
    assert (one.load, one.charges) == (0, set())


def test_integrity_notices_a_lost_charge() -> None:
    one = worker("decode", "d")
    one.charge(10)
    one.own_load -= 1
    with pytest.raises(AssertionError):
        one.check_integrity()


@pytest.mark.parametrize(("role", "state"), [("router", "ready"), ("decode", "asleep")])
def test_a_worker_that_says_nonsense_is_not_used(role: str, state: str) -> None:
    with pytest.raises(FailedPreconditionError):
        worker("decode", "d").observe(worker_pb2.WorkerInfo(role=role, state=state))


def test_speed_is_what_turns_a_queue_into_seconds() -> None:
    clock = Clock()
    one = worker("prefill", "p", settings={"clock": clock, "typical": Speed()}, outstanding_tokens=500)
    assert one.speed.tokens_per_s == FIRST_TOKENS_PER_S
    warm_up = one.charge(100)
    clock.now_s += 60
    warm_up.succeeded(PROMPT)
    warm_up.end()
    # what a cold process took says nothing
    assert one.speed.tokens_per_s == FIRST_TOKENS_PER_S
    first, second = one.charge(500), one.charge(1000)
    clock.now_s += 2
    # its own tokens behind those of another router
    first.succeeded(PROMPT)
    first.end()
    assert one.speed.tokens_per_s == pytest.approx(500)
    clock.now_s += 2
    second.succeeded(PROMPT)
    assert one.speed.tokens_per_s == pytest.approx((DECAY * 1000 + 2000) / (DECAY * 2 + 4))


def test_what_failed_or_was_cancelled_says_nothing_about_speed() -> None:
    one = worker("prefill", "p")
    one.charge(100).end()
    one.charge(100).failed(PROMPT, InternalError("broken"))
    assert one.speed.tokens_per_s == FIRST_TOKENS_PER_S


def test_an_unknown_speed_is_that_of_the_others() -> None:
    typical = Speed()
    known, unknown = Speed(typical), Speed(typical)
    for one in (known, unknown):
        one.observe(1, 60.0)
    known.observe(3000, 1.0)
    assert unknown.tokens_per_s == 3000
    unknown.observe(1000, 1.0)
    assert unknown.tokens_per_s == 1000
    assert known.tokens_per_s == 3000


def test_a_circuit_leaves_its_worker_out_and_a_single_probe_brings_it_back() -> None:
    clock = Clock()
    one = worker("prefill", "p", settings={"clock": clock})
    for _ in range(5):
        assert one.ready
        charge = one.charge(10)
        charge.failed(PROMPT, InternalError("broken"))
        charge.end()
    assert (one.ready, one.state, one.circuits.state) == (False, READY, OPEN)
    clock.now_s += OPEN_S
    assert (one.ready, one.circuits.state) == (True, HALF_OPEN)
    probe = one.charge(10)
    assert not one.ready
    # a client that leaves says nothing: the next request may try
    probe.end()
    assert one.ready
    probe = one.charge(10)
    probe.succeeded(PROMPT)
    assert (one.ready, one.circuits.state) == (True, CLOSED)


def test_promises_that_are_kept_do_not_cover_streams_that_break() -> None:
    one = worker("decode", "d")
    for _ in range(5):
        charge = one.charge(10)
        charge.succeeded(RESERVE)
        charge.failed(TOKENS, UnavailableError("the stream broke"))
        charge.end()
    assert not one.ready
    assert (one.circuits[RESERVE].state, one.circuits[TOKENS].state) == (CLOSED, OPEN)
    assert one.circuits.state == OPEN


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhaustedError("full"),
        InvalidRequestError("no image"),
        DeadlineExceededError("the client's"),
        RequestCancelledError("gone"),
        FailedPreconditionError("restarted"),
        UnavailableError("leaving", reason="DRAINING"),
        InternalError("a decode worker's", worker="d"),
    ],
)
def test_failures_that_say_nothing_about_the_worker_do_not_count(error: ServiceError) -> None:
    one = worker("prefill", "p")
    for _ in range(20):
        one.charge(1).failed(PROMPT, error)
    assert one.circuits.state == CLOSED


@pytest.mark.parametrize("error", [UnavailableError("no answer"), FailedPreconditionError("another epoch")])
def test_a_call_that_nobody_answered_is_followed_by_a_poll_before_the_next_request(error: ServiceError) -> None:
    asked: list[bool] = []
    one = worker("decode", "d", settings={"on_lost": lambda: asked.append(True)})
    one.charge(1).failed(RESERVE, error)
    assert (one.ready, one.state, len(asked)) == (False, UNREACHABLE, 1)
    one.observe(one.info)
    assert one.ready
    # a stream may break by itself: the poll decides
    one.charge(1).failed(TOKENS, error)
    assert (one.ready, len(asked)) == (True, 2)
    one.charge(1).failed(RESERVE, InternalError("broken"))
    assert (one.ready, len(asked)) == (True, 2)
