"""Parcels under leases in an arena that new work needs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from secrets import token_bytes

import pytest

from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.room import ParcelRoom
from prefill_worker.parcel.store import ParcelStore
from shared.errors import DuplicateRequestError, NotFoundError
from shared.kv.arena import Arena
from shared.kv.secret import SECRET_BYTES
from shared.kv.transport.base import Parcel
from tests.unit.prefill_worker.manifests import manifest

KIB = 1024
SECRET = b"s" * SECRET_BYTES
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
        """Of a call that is over; the secret."""
        secret, parcel = token_bytes(SECRET_BYTES), self.parcel(nbytes)
        assert self.offer(parcel, secret, now)
        return secret

    def offer(self, parcel: Parcel, secret: bytes = SECRET, now: float = 0.0) -> bool:
        """Whether the parcel of a call that is over was retained."""
        self.held.expect(secret)
        retained = self.held.retain(secret, parcel, now)
        self.held.expect_no_more(secret)
        return retained

    def known(self, *asked: bytes) -> list[bool]:
        """Which of these are there, without using them."""
        return [secret in self.held._by_secret for secret in asked]


@contextlib.contextmanager
def retaining(capacity: int = 8 * KIB, arena_bytes: int = 8 * KIB) -> Iterator[Retaining]:
    arena = Arena(arena_bytes)
    made = Retaining(arena, capacity)
    try:
        yield made
        made.held.check_integrity(idle=True)
        made.held.clear()
        assert (made.store.used_bytes, made.held.used_bytes) == (0, 0)
        made.store.check_integrity()
    finally:
        arena.close()


@pytest.mark.parametrize("until", ["call begins", "parcel is there", "call is over", "released"])
def test_a_secret_in_use_is_refused_and_touches_nothing(until: str) -> None:
    with retaining() as made:
        moments = ["call begins", "parcel is there", "call is over", "released"]
        reached = moments[: moments.index(until) + 1]
        made.held.expect(SECRET)
        if "parcel is there" in reached:
            assert made.held.retain(SECRET, made.parcel(), 0.0)
        if "call is over" in reached:
            made.held.expect_no_more(SECRET)
        if "released" in reached:
            made.held.release(SECRET)
            made.held.expect(SECRET)
        else:
            with pytest.raises(DuplicateRequestError) as caught:
                made.held.expect(SECRET)
            assert caught.value.reason == "PARCEL_IN_USE"
            assert made.known(SECRET) == ["parcel is there" in reached]
        made.held.expect_no_more(SECRET)


def test_one_that_is_given_up_before_it_comes_stays_its_owners() -> None:
    with retaining() as made:
        made.held.expect(SECRET)
        made.held.release(SECRET)
        with pytest.raises(DuplicateRequestError):
            made.held.expect(SECRET)
        parcel = made.parcel()
        assert not made.held.retain(SECRET, parcel, 0.0)
        assert made.held.filling_bytes == KIB
        made.store.free(parcel.slot)
        made.held.expect_no_more(SECRET)
        made.held.expect(SECRET)
        assert made.held.retain(SECRET, made.parcel(), 0.0)
        made.held.expect_no_more(SECRET)


def test_a_call_that_is_over_leaves_the_secret_to_whoever_asks_next() -> None:
    with retaining() as made:
        made.held.expect(SECRET)
        made.held.expect_no_more(SECRET)
        made.held.expect(SECRET)
        made.held.expect_no_more(SECRET)
        assert made.known(SECRET) == [False]


def test_a_call_retains_one_parcel() -> None:
    with retaining() as made:
        made.held.expect(SECRET)
        first, second = made.parcel(), made.parcel()
        assert made.held.retain(SECRET, first, 0.0)
        assert not made.held.retain(SECRET, second, 0.0)
        with made.held.sending(SECRET, 0.0) as known:
            assert known is first
        made.store.free(second.slot)
        made.held.expect_no_more(SECRET)


def test_nothing_is_retained_without_a_secret() -> None:
    with retaining() as made:
        made.held.expect(b"")
        made.held.expect(b"")
        parcel = made.parcel()
        assert not made.held.retain(b"", parcel, 0.0)
        made.store.free(parcel.slot)
        made.held.expect_no_more(b"")


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
            assert not made.offer(parcel)
            assert made.known(first, idle) == [True, False]
        assert made.offer(parcel)
        assert made.known(first, SECRET) == [False, True]


@pytest.mark.parametrize("capacity", [0, KIB - 64])
def test_one_that_is_larger_than_all_that_may_be_stays_its_owners(capacity: int) -> None:
    with retaining(capacity=capacity) as made:
        parcel = made.parcel()
        assert not made.offer(parcel)
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
        assert made.offer(parcel)
        room.hand_over()
        room.free()
        assert made.store.used_bytes == KIB
        made.held.release(SECRET)

    with retaining() as made:
        asyncio.run(main(made))
