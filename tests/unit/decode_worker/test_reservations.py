"""What is held for whom, and when its memory is free: the matrix of stages, and the leases."""

from __future__ import annotations

from typing import Any

import pytest

from decode_worker.answers import Answer, Stage, Wanted
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.reservations import TOKEN_BYTES, Reservations
from decode_worker.token_outbox import Subscription, TokenOutbox
from shared.errors import AlreadyCommittedError, DuplicateRequestError, NotFoundError, ResourceExhaustedError
from shared.kv.layout import KVLayout

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
LEASE_S = 30.0
SEQUENCE: Any = object()


@pytest.fixture
def pool() -> SlabPool:
    return SlabPool(4096, LAYOUT)


@pytest.fixture
def held(pool: SlabPool) -> Reservations:
    return Reservations(pool, lease_s=LEASE_S)


def reserve(
    held: Reservations, request_id: str = "r", attempt: int = 1, nbytes: int = 1000, now: float = 0.0
) -> Answer:
    """The only answer of a new reservation."""
    reservation = held.reserve(
        request_id=request_id,
        attempt=attempt,
        prefill_epoch="e",
        wanted=Wanted({0: nbytes}),
        max_new_tokens=8,
        arena=None,
        now=now,
    )
    return reservation.answers[0]


def activate(held: Reservations, answer: Answer, nbytes: int) -> None:
    held.activate(answer.reservation, {0: SEQUENCE}, Wanted({0: nbytes}))


def bring_to(held: Reservations, stage: str) -> Answer:
    answer = reserve(held)
    if stage in ("filling", "active", "in_use"):
        held.begin_fill(answer.reservation)
    if stage in ("active", "in_use"):
        activate(held, answer, 500)
    answer.in_use = stage == "in_use"
    return answer


def assert_nothing_is_held(held: Reservations, pool: SlabPool) -> None:
    held.check_integrity()
    assert pool.used_bytes == 0
    assert held.idle.is_set()
    assert list(held) == []


@pytest.mark.parametrize("stage", ["reserved", "filling", "active", "in_use"])
def test_an_ended_reservation_is_forgotten_at_once_and_freed_when_safe(
    held: Reservations, pool: SlabPool, stage: str
) -> None:
    answer = bring_to(held, stage)
    used = pool.used_bytes
    assert used == (512 if stage in ("active", "in_use") else 1024)
    held.end(answer)
    with pytest.raises(NotFoundError):
        held.find(answer.reservation.token)
    held.check_integrity()
    if stage in ("filling", "in_use"):
        assert pool.used_bytes == used, "a thread still uses it"
        assert not held.idle.is_set()
        held.end(answer)  # again: nothing happens
        assert pool.used_bytes == used
    if stage == "filling":
        held.end_fill(answer.reservation)
    elif stage == "in_use":
        held.release_memory(answer)
    held.end(answer)
    assert_nothing_is_held(held, pool)


@pytest.mark.parametrize("stage", ["filling", "in_use"])
def test_what_outlives_its_request_is_an_orphan_until_a_thread_lets_go(held: Reservations, stage: str) -> None:
    answer = bring_to(held, stage)
    reserve(held, "other")
    assert held.orphan_bytes == 0
    held_bytes = answer.pool_bytes
    held.end(answer)
    assert held.orphan_bytes == held_bytes
    if stage == "filling":
        held.end_fill(answer.reservation)
    else:
        held.release_memory(answer)
    assert held.orphan_bytes == 0


def test_saved_bytes_are_those_of_sequences_in_the_pool(held: Reservations) -> None:
    first, second = bring_to(held, "active"), reserve(held, "other")
    first.reservation.saved_bytes, second.reservation.saved_bytes = 700, 80
    assert held.saved_bytes == 780
    held.vacate(first)
    assert held.saved_bytes == 80, "what is parked takes no room of the pool"
    held.end(second)
    assert held.saved_bytes == 0


@pytest.mark.parametrize("stage", ["reserved", "filling", "active", "in_use"])
def test_bytes_are_counted_by_stage(held: Reservations, pool: SlabPool, stage: str) -> None:
    answer = bring_to(held, stage)
    where = {"in_use": Stage.ACTIVE}.get(stage) or Stage(stage)
    assert {each: held.bytes_in(each) for each in Stage} == {
        each: pool.used_bytes if each is where else 0 for each in Stage
    }
    held.end(answer)
    assert sum(held.bytes_in(each) for each in Stage) == pool.used_bytes, "lingering bytes are counted"


def test_a_token_is_secret_and_found(held: Reservations) -> None:
    tokens = {reserve(held, request_id=str(number), nbytes=64).reservation.token for number in range(20)}
    assert len(tokens) == 20
    assert {len(token) for token in tokens} == {TOKEN_BYTES}
    assert all(held.find(token).token == token for token in tokens)
    for stranger in (b"", b"x" * TOKEN_BYTES):
        with pytest.raises(NotFoundError, match="has ended") as caught:
            held.find(stranger)
        assert caught.value.reason == "NO_RESERVATION"


def test_an_attempt_holds_one_reservation(held: Reservations, pool: SlabPool) -> None:
    first = reserve(held)
    with pytest.raises(DuplicateRequestError, match="'r' already holds"):
        reserve(held)
    assert pool.used_bytes == 1024
    reserve(held, attempt=2)
    reserve(held, request_id="s")
    held.end(first)
    reserve(held)


def test_a_refused_reservation_holds_nothing(held: Reservations, pool: SlabPool) -> None:
    reserve(held, nbytes=4096)
    with pytest.raises(ResourceExhaustedError):
        reserve(held, request_id="s")
    held.check_integrity()
    assert len(list(held)) == 1
    assert pool.used_bytes == 4096


@pytest.mark.parametrize("stage", ["filling", "active", "in_use"])
def test_a_parcel_is_delivered_once(held: Reservations, stage: str) -> None:
    answer = bring_to(held, stage)
    with pytest.raises(AlreadyCommittedError) as caught:
        held.begin_fill(answer.reservation)
    assert caught.value.code == "FAILED_PRECONDITION"
    assert answer.reservation.stage is (Stage.FILLING if stage == "filling" else Stage.ACTIVE)


def test_a_failed_delivery_may_be_repeated(held: Reservations, pool: SlabPool) -> None:
    answer = bring_to(held, "filling")
    held.end_fill(answer.reservation)
    assert answer.reservation.stage is Stage.RESERVED
    held.begin_fill(answer.reservation)
    activate(held, answer, 100)
    assert (answer.reservation.stage, pool.used_bytes) == (Stage.ACTIVE, 128)


def subscribe(answer: Answer) -> None:
    answer.subscription = Subscription(TokenOutbox(), 1)


@pytest.mark.parametrize("stage", ["reserved", "filling", "active"])
@pytest.mark.parametrize("attached", [False, True])
def test_a_lease_runs_until_it_is_installed_and_read(held: Reservations, stage: str, attached: bool) -> None:
    answer = bring_to(held, stage)
    if attached:
        subscribe(answer)
    for_ever = attached and stage == "active"
    assert held.expired(LEASE_S) == []
    assert held.expired(LEASE_S + 0.1) == ([] if for_ever else [answer])


def test_a_renewal_counts_from_now(held: Reservations) -> None:
    answer, other = reserve(held), reserve(held, request_id="s")
    held.renew(answer.reservation, 20.0)
    assert held.expired(35.0) == [other]
    assert held.expired(50.0) == [other]
    assert set(held.expired(50.1)) == {answer, other}


def test_idle_is_set_only_while_nothing_is_held(held: Reservations) -> None:
    assert held.idle.is_set()
    first, second = reserve(held), reserve(held, request_id="s")
    assert not held.idle.is_set()
    held.end(first)
    assert not held.idle.is_set()
    held.begin_fill(second.reservation)
    held.end(second)
    assert not held.idle.is_set()
    held.end_fill(second.reservation)
    assert held.idle.is_set()


def test_the_law_notices_an_extent_without_an_owner(held: Reservations, pool: SlabPool) -> None:
    pool.allocate(64)
    with pytest.raises(AssertionError, match="no owner"):
        held.check_integrity()
