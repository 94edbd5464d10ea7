"""Parcels under leases in an arena that new work needs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.room import ParcelRoom
from prefill_worker.parcel.store import ParcelStore
from shared.errors import NotFoundError
from shared.kv.arena import Arena
from shared.kv.transport.base import Parcel
from tests.unit.prefill_worker.manifests import manifest

KIB = 1024
LEASE_S = 30.0


class Retaining:
    """An arena of 8 KiB, and what is retained in it."""

    def __init__(self, arena: Arena, capacity: int) -> None:
        self.store = ParcelStore(arena)
        self.held = RetainedParcels(self.store, capacity=capacity, lease_s=LEASE_S)

    def parcel(self, nbytes: int = KIB) -> Parcel:
        slot = self.store.allocate_now(nbytes)
        assert slot is not None
        return Parcel(manifest=manifest(), body=self.store.view(slot, nbytes), slot=slot)

    def retain(self, nbytes: int = KIB, now: float = 0.0) -> bytes:
        secret = self.held.retain(self.parcel(nbytes), now)
        assert secret is not None
        return secret

    def known(self, *asked: bytes) -> list[bool]:
        """Which of these are there, without using them."""
        return [secret in self.held._by_secret for secret in asked]


@contextlib.contextmanager
def retaining(capacity: int = 8 * KIB, arena_bytes: int = 8 * KIB) -> Iterator[Retaining]:
    arena = Arena(arena_bytes)
    made = Retaining(arena, capacity)
    try:
        yield made
        made.held.check_integrity()
        made.held.clear()
        assert (made.store.used_bytes, made.held.used_bytes) == (0, 0)
        made.store.check_integrity()
    finally:
        arena.close()


def test_every_parcel_has_a_secret_of_its_own() -> None:
    with retaining() as made:
        secrets = {made.retain() for _ in range(4)}
        assert len(secrets) == 4
        assert {len(secret) for secret in secrets} == {16}


def test_bytes_are_counted_on_the_side_of_their_owner() -> None:
    with retaining() as made:
        under_way = made.parcel(2 * KIB)
        made.retain(3 * KIB)
        assert (made.held.filling_bytes, made.held.used_bytes) == (2 * KIB, 3 * KIB)
        made.store.free(under_way.slot)
        assert (made.held.filling_bytes, made.held.used_bytes) == (0, 3 * KIB)


def test_it_is_released_once_and_then_unknown() -> None:
    with retaining() as made:
        secret = made.retain()
        for _ in range(2):
            made.held.release(secret)
        made.held.release(b"never heard of")
        assert made.store.used_bytes == 0
        assert not made.held.renew(secret, 0.0)
        with pytest.raises(NotFoundError) as caught, made.held.sending(secret, 0.0):
            pass
        assert caught.value.reason == "NO_PARCEL"


def test_a_lease_ends_unless_it_is_renewed() -> None:
    with retaining() as made:
        renewed, sent, forgotten = (made.retain() for _ in range(3))
        assert made.held.expire(LEASE_S) == 0
        assert made.held.renew(renewed, 20.0)
        with made.held.sending(sent, 20.0):
            pass
        assert made.held.expire(LEASE_S + 1) == 1
        assert made.known(renewed, sent, forgotten) == [True, True, False]
        assert made.held.expire(20.0 + LEASE_S + 1) == 2
        assert made.store.used_bytes == 0


@pytest.mark.parametrize("end", ["release", "expire", "clear"])
def test_one_that_ends_while_it_is_sent_keeps_its_bytes_to_the_last_sender(end: str) -> None:
    with retaining() as made:
        secret = made.retain()
        with made.held.sending(secret, 0.0) as first:
            with made.held.sending(secret, 0.0) as second:
                assert second is first
                first.body[:] = b"k" * KIB
                if end == "release":
                    made.held.release(secret)
                elif end == "expire":
                    assert made.held.expire(LEASE_S + 1) == 1
                else:
                    made.held.clear()
                assert made.known(secret) == [False]
            made.held.check_integrity()
            assert (made.held.used_bytes, made.store.used_bytes) == (KIB, KIB)
            assert bytes(first.body) == b"k" * KIB
        assert made.store.used_bytes == 0


def test_those_used_longest_ago_make_room_for_new_work() -> None:
    with retaining() as made:
        first, second, third, fourth = (made.retain(2 * KIB, now) for now in range(4))
        made.held.renew(first, 10.0)
        with made.held.sending(second, 11.0):
            pass
        made.store.free(made.parcel(4 * KIB).slot)
        assert made.known(first, second, third, fourth) == [True, True, False, False]


def test_nothing_is_given_up_while_there_is_room() -> None:
    with retaining() as made:
        kept = made.retain(4 * KIB)
        made.store.free(made.parcel(4 * KIB).slot)
        assert made.known(kept) == [True]


def test_what_is_being_sent_is_given_up_for_nobody() -> None:
    with retaining() as made:
        sent, idle = made.retain(4 * KIB), made.retain(4 * KIB)
        with made.held.sending(sent, 0.0):
            made.store.free(made.parcel(4 * KIB).slot)
            assert made.known(sent, idle) == [True, False]
            assert made.store.allocate_now(5 * KIB) is None
            assert made.known(sent) == [True]


def test_no_more_is_retained_than_may_be() -> None:
    with retaining(capacity=4 * KIB) as made:
        first, second = made.retain(2 * KIB), made.retain(2 * KIB)
        third = made.retain(KIB)
        assert made.known(first, second, third) == [False, True, True]


def test_one_that_fits_only_beside_what_is_being_sent_stays_its_owners() -> None:
    with retaining(capacity=4 * KIB) as made:
        first, idle = made.retain(3 * KIB), made.retain(KIB)
        parcel = made.parcel(2 * KIB)
        with made.held.sending(first, 0.0):
            assert made.held.retain(parcel, 0.0) is None
            assert made.known(first, idle) == [True, False]
        second = made.held.retain(parcel, 0.0)
        assert second is not None
        assert made.known(first, second) == [False, True]


@pytest.mark.parametrize("capacity", [0, KIB - 64])
def test_one_that_is_larger_than_all_that_may_be_stays_its_owners(capacity: int) -> None:
    with retaining(capacity=capacity) as made:
        parcel = made.parcel()
        assert made.held.retain(parcel, 0.0) is None
        assert (made.held.filling_bytes, made.held.used_bytes) == (KIB, 0)
        made.store.free(parcel.slot)


def test_who_waits_for_room_has_what_a_sender_lets_go_of() -> None:
    async def main(made: Retaining) -> None:
        secret = made.retain(6 * KIB)
        with made.held.sending(secret, 0.0):
            waiting = asyncio.create_task(made.store.allocate(4 * KIB))
            await asyncio.sleep(0.01)
            assert not waiting.done()
        made.store.free(await asyncio.wait_for(waiting, 5))
        assert made.known(secret) == [False]

    with retaining() as made:
        asyncio.run(main(made))


def test_a_complete_parcel_gives_back_what_its_bound_had_too_much() -> None:
    async def main(made: Retaining) -> None:
        room = await ParcelRoom.reserve(made.store, 6 * KIB)
        waiting = asyncio.create_task(made.store.allocate(4 * KIB))
        await asyncio.sleep(0.01)
        room.body[:] = b"k" * (6 * KIB)
        complete = manifest(b"k" * KIB)
        parcel = room.parcel(complete)
        assert (bytes(parcel.body), parcel.slot.extent.nbytes) == (b"k" * KIB, KIB)
        made.store.free(await asyncio.wait_for(waiting, 5))
        secret = made.held.retain(parcel, 0.0)
        assert secret is not None
        room.hand_over()
        room.free()
        assert made.store.used_bytes == KIB
        made.held.release(secret)

    with retaining() as made:
        asyncio.run(main(made))
