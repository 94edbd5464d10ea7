"""A reservation may grow until its parcel begins to arrive; where there is no room it stays what it was."""

from __future__ import annotations

import dataclasses

import pytest
from vlcache.worker.v1 import decode_pb2 as pb

from decode_worker.answers import Answer, Wanted
from decode_worker.reservations import Reservations
from decode_worker.worker import LoadedModel
from prefill_worker.kv_sender import KVSender, Ticket
from shared.errors import AlreadyCommittedError, ResourceExhaustedError, TooLargeError
from shared.kv.layout import KVLayout
from shared.telemetry.metrics import PrefillMetrics
from tests.unit.decode_worker.pools import POOLS, Pool
from tests.unit.decode_worker.serving import Served, failure, frames, run
from tests.unit.decode_worker.shipment import Shipment, answers
from tests.unit.decode_worker.test_reservations import LEASE_S, bring_to, reserve
from tests.unit.decode_worker.test_take_local import manifest_of
from tests.unit.decode_worker.test_take_local import reserve as reserve_here

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
CAPACITY = 8192


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> Pool:
    return POOLS[request.param](LAYOUT, CAPACITY)


@pytest.fixture
def held(pool: Pool) -> Reservations:
    return Reservations(pool, lease_s=LEASE_S)


def grow(held: Reservations, answer: Answer, nbytes: int) -> None:
    held.grow(answer.reservation, Wanted({0: nbytes}))


def test_it_grows_where_there_is_room_and_is_given_back_whole(held: Reservations, pool: Pool) -> None:
    answer = reserve(held, nbytes=1000)
    token, before = answer.reservation.token, answer.pool_bytes
    grow(held, answer, 3000)
    held.check_integrity()
    assert held.find(token) is answer.reservation
    assert before < 3000 <= answer.pool_bytes == pool.used_bytes
    held.end(answer)
    assert pool.used_bytes == 0


def test_it_may_take_all_that_is_free_its_own_piece_included(held: Reservations, pool: Pool) -> None:
    answer = reserve(held, nbytes=pool.capacity * 3 // 4)
    grow(held, answer, pool.capacity)
    held.check_integrity()
    assert answer.pool_bytes == pool.capacity


@pytest.mark.parametrize("nbytes", [1, 1000])
def test_less_changes_nothing(held: Reservations, pool: Pool, nbytes: int) -> None:
    answer = reserve(held, nbytes=1000)
    allocation = answer.allocation
    grow(held, answer, nbytes)
    assert answer.allocation is allocation


def test_a_full_pool_leaves_what_was_promised(held: Reservations, pool: Pool) -> None:
    answer, other = reserve(held, nbytes=1000), reserve(held, request_id="s", nbytes=5000)
    before, theirs = answer.pool_bytes, other.pool_bytes
    with pytest.raises(ResourceExhaustedError) as caught:
        grow(held, answer, 4000)
    assert caught.value.reason == "KV_FULL"
    held.check_integrity()
    assert (answer.pool_bytes, other.pool_bytes) == (before, theirs)
    held.begin_fill(answer.reservation)


def test_more_than_there_is_leaves_what_was_promised(held: Reservations, pool: Pool) -> None:
    answer = reserve(held, nbytes=1000)
    before = answer.pool_bytes
    with pytest.raises(TooLargeError):
        grow(held, answer, pool.capacity + 1)
    held.check_integrity()
    assert answer.pool_bytes == before


def test_nobody_grows_past_those_who_wait(held: Reservations) -> None:
    answer, waiting = reserve(held, nbytes=1000), reserve(held, request_id="s")
    waiting.parked = object()
    with pytest.raises(ResourceExhaustedError, match="wait for KV memory"):
        grow(held, answer, 2000)


@pytest.mark.parametrize("stage", ["filling", "active", "in_use"])
def test_a_parcel_that_arrives_needs_no_more(held: Reservations, pool: Pool, stage: str) -> None:
    answer = bring_to(held, stage)
    used = pool.used_bytes
    with pytest.raises(AlreadyCommittedError):
        grow(held, answer, 2000)
    assert pool.used_bytes == used


def test_growing_renews_no_lease(held: Reservations) -> None:
    answer = reserve(held, now=5.0)
    grow(held, answer, 2000)
    assert held.expired(5.1 + LEASE_S) == [answer]


def grown(token: bytes, tokens: int) -> pb.GrowReservationRequest:
    return pb.GrowReservationRequest(token=token, kept_tokens_bound=tokens)


def test_a_parcel_too_large_for_the_first_promise_is_taken_after_growing(
    loaded: LoadedModel, shipment: Shipment
) -> None:
    async def body(served: Served) -> None:
        promise = await served.reserve(kept_tokens_bound=1)
        sent = frames(promise.token, shipment.manifest(), shipment.body)
        assert (await failure(served.put(sent))).reason == "OVER_RESERVATION"
        more = await served.decode.GrowReservation(grown(promise.token, 40))
        assert more.reserved_bytes == sum(served.held_bytes().values()) > promise.reserved_bytes
        await served.put(sent)
        await answers(served, promise.token, shipment)

    run(loaded, body)


def test_errors_of_growing_are_exact(loaded: LoadedModel) -> None:
    async def body(served: Served) -> None:
        promise, other = await served.reserve(), await served.reserve(request_id="s")
        pool = served.held._pool
        whole = pool.capacity // pool.layout.full_bytes(1) - 7  # and the tokens to come
        unknown = await failure(served.decode.GrowReservation(grown(b"guess", 41)))
        assert (unknown.code, unknown.reason) == ("NOT_FOUND", "NO_RESERVATION")
        full = await failure(served.decode.GrowReservation(grown(promise.token, whole)))
        assert (full.code, full.reason) == ("RESOURCE_EXHAUSTED", "KV_FULL")
        never = await failure(served.decode.GrowReservation(grown(promise.token, (1 << 32) - 1)))
        assert (never.code, never.reason) == ("RESOURCE_EXHAUSTED", "TOO_LARGE")
        assert served.held_bytes() == {"reserved": promise.reserved_bytes + other.reserved_bytes}
        served.worker.runner.expire(1e18)
        ended = await failure(served.decode.GrowReservation(grown(promise.token, 41)))
        assert ended.reason == "NO_RESERVATION"

    run(loaded, body)


@pytest.mark.parametrize("transport", ["local", "grpc"])
def test_the_sender_asks_either_way(loaded: LoadedModel, shipment: Shipment, transport: str) -> None:
    async def body(served: Served) -> None:
        token, epoch = await reserve_here(served, kept_tokens_bound=1)
        local = served.worker.receiver if transport == "local" else None
        sender = KVSender(epoch=epoch, metrics=PrefillMetrics(worker="p", model="m"), local=local)
        ticket = Ticket(decode_worker="d", address=served.address, token=token, transport=transport, lease_s=30.0)
        try:
            assert await sender.grow(ticket, 40)
            assert not await sender.grow(ticket, 1 << 31)
            assert not await sender.grow(dataclasses.replace(ticket, token=b"guess"), 40)
        finally:
            await sender.close()
        await served.worker.receiver.take(token, manifest_of(shipment, epoch), memoryview(shipment.body))
        await answers(served, token, shipment)

    run(loaded, body)
