"""Sequences that outgrow their promise, event by event: who leaves, who comes back first, who is told what.

A token takes 64 bytes, the pool has eight of them. The old request keeps one token and the young one three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from decode_worker.reservations import Reservation
from shared.errors import ResourceExhaustedError, TooLargeError
from tests.unit.decode_worker.hand_driven import LAYOUT, Client, HandDriven, hand_driven, manifest_for
from tests.unit.decode_worker.pools import Pool, block_pool, poison, slab_pool

TOKEN_BYTES = 64
PROMISED = 2
OLD_ANSWER, YOUNG_ANSWER = 6, 5


def pool_of(storage: str, tokens: int) -> Pool:
    capacity = tokens * TOKEN_BYTES
    pool: Pool = slab_pool(LAYOUT, capacity) if storage == "slabs" else block_pool(LAYOUT, capacity + 32, block_size=1)
    poison(pool)
    assert pool.capacity == capacity
    return pool


@pytest.fixture(params=["slabs", "blocks"])
def it(request: pytest.FixtureRequest) -> Iterator[HandDriven]:
    with hand_driven(pool_of(request.param, tokens=8), promised_tokens=PROMISED) as driven:
        yield driven


def deliver_all(it: HandDriven) -> None:
    while it.delivered:
        it.deliver()
    it.check()


def parked(it: HandDriven) -> list[Reservation]:
    return [held for held in it.reservations if held.parked]


# What comes before each moment in the life of the old request, which the young one's memory lets go on. `outgrown` and
# `back` may also mean that nothing is asked of the event loop.
MOMENTS = ("running", "outgrown", "moving out", "parked", "moving in", "back")


def bring_to(moment: str, it: HandDriven) -> tuple[Client, Client]:
    old = it.ready(OLD_ANSWER, stream=0)
    it.turn()
    young = it.ready(YOUNG_ANSWER, stream=1)
    if moment == "running":
        return old, young
    it.turn()
    assert it.delivered[-1].outgrown == [old.held.sequence]
    if moment == "outgrown":
        return old, young
    deliver_all(it)
    assert len(it.thread.waiting) == 1
    if moment == "moving out":
        return old, young
    it.copy()
    assert parked(it) == [old.held]
    assert it.runner._evicted == {young.held}
    if moment == "parked":
        return old, young
    it.turn()
    deliver_all(it)
    it.copy()
    assert parked(it) == [young.held]
    assert len(it.thread.waiting) == 1
    if moment == "moving in":
        return old, young
    it.copy()
    assert old.held.sequence in it.runner._joined
    return old, young


@pytest.mark.parametrize("moment", MOMENTS)
def test_both_finish_with_their_tokens(it: HandDriven, moment: str) -> None:
    old, young = bring_to(moment, it)
    it.finish(rounds=12)
    assert (old.tokens, young.tokens) == (old.expected, young.expected)
    assert it.preemptions("outgrown") + it.preemptions("evicted") >= 2


@pytest.mark.parametrize("who", ["old", "young", "both"])
@pytest.mark.parametrize("how", ["cancel", "release", "stream break", "expiry", "drain"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_end_at_every_moment_gives_everything_back(it: HandDriven, moment: str, how: str, who: str) -> None:
    old, young = bring_to(moment, it)
    for client in {"old": [old], "young": [young], "both": [young, old]}[who]:
        it.end(how, client)
        it.check()
    it.finish(rounds=12)
    if how == "drain":
        assert it.drain.done()
        assert {old.error, young.error} == {"DRAINING"}
    elif how == "expiry":
        assert (old.tokens, young.tokens) == (old.expected, young.expected), "who is read needs no lease"
    elif who != "both":
        stayed = young if who == "old" else old
        assert stayed.tokens == stayed.expected


@pytest.mark.parametrize("who", ["old", "young"])
@pytest.mark.parametrize("ends_first", [False, True])
def test_a_copy_that_fails_ends_its_request_alone(
    it: HandDriven, who: str, ends_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    old, young = bring_to("parked" if who == "young" else "moving out", it)
    if who == "young":
        it.turn()
        deliver_all(it)
    failing, other = (old, young) if who == "old" else (young, old)
    if ends_first:
        it.end("cancel", failing)
    it.copy(RuntimeError("secret detail"))
    it.check()
    assert failing.held not in list(it.reservations)
    assert failing.error == ("" if ends_first else "INTERNAL")
    it.finish(rounds=12)
    assert other.tokens == other.expected
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("ends_first", [False, True])
def test_a_copy_back_that_fails_ends_its_request_alone(it: HandDriven, ends_first: bool) -> None:
    old, young = bring_to("moving in", it)
    if ends_first:
        it.end("cancel", old)
    it.copy(RuntimeError("a bug"))
    it.check()
    assert old.error == ("" if ends_first else "INTERNAL")
    it.finish(rounds=12)
    assert young.tokens == young.expected


def test_no_reservation_is_accepted_while_someone_waits(it: HandDriven) -> None:
    old, young = bring_to("parked", it)
    more = {"attempt": 1, "prefill_epoch": "", "max_new_tokens": 2, "arena": None, "now": 0.0}
    with pytest.raises(ResourceExhaustedError, match="wait") as caught:
        it.reservations.reserve(request_id="third", nbytes=TOKEN_BYTES, **more)
    assert (caught.value.reason, caught.value.retry_after_s) == ("KV_FULL", 0.1)
    it.end("cancel", old)
    it.reservations.end(it.reservations.reserve(request_id="third", nbytes=TOKEN_BYTES, **more))
    it.finish(rounds=8)
    assert young.tokens == young.expected


def test_what_is_parked_is_counted_outside_the_pool(it: HandDriven) -> None:
    old, _ = bring_to("parked", it)
    scraped = {
        (sample.labels.get("state", ""), sample.labels.get("reason", ""), sample.name): sample.value
        for family in it.worker.metrics.registry.collect()
        for sample in family.samples
    }
    assert scraped["parked", "", "vlcache_kv_resident_bytes"] == 3 * TOKEN_BYTES
    assert scraped["active", "", "vlcache_kv_resident_bytes"] == it.pool.used_bytes == 5 * TOKEN_BYTES
    assert scraped["", "outgrown", "vlcache_preemptions_total"] == 1
    assert scraped["", "", "vlcache_kv_fragmentation_ratio"] == it.pool.fragmentation
    assert scraped["", "", "vlcache_kv_cache_usage_ratio"] == pytest.approx(5 / 8)
    assert old.held.pool_bytes == 0
    it.finish(rounds=12)
    assert it.preemptions("evicted") == 1


def test_a_head_that_ends_while_it_waits_lets_the_next_go() -> None:
    with hand_driven(pool_of("slabs", tokens=18), promised_tokens=2) as it:
        for client in [it.reserve(2) for _ in range(4)]:
            it.end("release", client)
        head = it.ready(12)
        between = it.reserve(12)
        it.turn()
        behind = it.ready(12)
        for _ in range(2):
            it.turn()
            deliver_all(it)
            it.copy()
        assert parked(it) == [head.held, behind.held]
        it.end("cancel", head)
        assert not parked(it), "there was room for the smaller one all the time"
        it.end("release", between)
        it.finish(rounds=30)


def test_a_head_that_ends_on_its_way_back_lets_the_next_go(it: HandDriven) -> None:
    old, young = bring_to("moving in", it)
    assert parked(it) == [young.held]
    it.end("cancel", old)
    it.copy()
    assert not parked(it), "its memory was free once the copy had ended"
    it.copy()
    assert young.held.sequence in it.runner._joined
    it.finish(rounds=8)


def test_room_at_least_doubles() -> None:
    """A long answer moves only a few times."""
    with hand_driven(pool_of("slabs", tokens=80), promised_tokens=1) as it:
        client = it.ready(65)
        assert client.held.sequence is not None
        places = [client.held.sequence.kv]
        for _ in range(100):
            it.round()
            if client.held.sequence.kv is not places[-1]:
                places.append(client.held.sequence.kv)
        assert [kv.room for kv in places] == [1, 2, 4, 8, 16, 32, 1], "the last one is what is left"
        it.finish(rounds=1)
        assert it.preemptions("outgrown") == 6


def test_without_a_small_promise_nobody_ever_moves() -> None:
    with hand_driven(pool_of("slabs", tokens=8), promised_tokens=None) as it:
        client = it.ready(7)
        with pytest.raises(ResourceExhaustedError):
            it.reserve(2)
        it.finish(rounds=8)
        assert client.tokens == client.expected
        assert it.preemptions("outgrown") == 0


def test_all_may_outgrow_in_one_step(it: HandDriven) -> None:
    """The oldest goes back at once, the others in their order when there is room."""
    old, young = it.ready(OLD_ANSWER), it.ready(YOUNG_ANSWER)
    it.turn()
    it.turn()
    deliver_all(it)
    assert len(it.thread.waiting) == 2
    it.copy()
    it.copy()
    it.check()
    assert parked(it) == [young.held]
    assert old.held.in_use
    it.finish(rounds=12)
    assert (it.preemptions("outgrown"), it.preemptions("evicted")) == (2, 0)


def test_nobody_leaves_for_a_younger_one(it: HandDriven) -> None:
    old, young = bring_to("back", it)
    while not old.finished:
        assert parked(it) == [young.held]
        assert not it.runner._evicted
        it.turn()
        deliver_all(it)
    it.finish(rounds=8)


@pytest.mark.parametrize("how_far", ["asked", "moving out"])
def test_while_memory_is_on_its_way_nobody_else_is_asked_to_leave(how_far: str) -> None:
    with hand_driven(pool_of("slabs", tokens=25), promised_tokens=3) as it:
        oldest = it.ready(12)
        it.turn()
        it.turn()
        middle, youngest = it.ready(12), it.ready(12)
        reserved = it.reserve(12)  # 4 + 6 + 8 + 7 tokens: full
        it.turn()
        deliver_all(it)
        it.copy()
        assert parked(it) == [oldest.held]
        assert it.runner._evicted == {youngest.held}
        if how_far == "moving out":
            it.turn()
            deliver_all(it)
        it.end("release", reserved)
        assert parked(it) == [oldest.held], "the free pieces are too small"
        assert it.runner._evicted <= {youngest.held}, "its memory may suffice, and does"
        if how_far == "asked":
            it.turn()
            deliver_all(it)
        it.copy()
        it.check()
        assert parked(it) == [youngest.held]
        assert middle.held.sequence in it.runner._joined
        it.finish(rounds=60)


def test_who_joins_while_an_elder_waits_leaves_at_once() -> None:
    with hand_driven(pool_of("slabs", tokens=8), promised_tokens=PROMISED) as it:
        old = it.ready(OLD_ANSWER)
        it.turn()
        young = it.reserve(YOUNG_ANSWER)
        it.turn()
        deliver_all(it)
        it.copy()
        assert parked(it) == [old.held]
        assert not it.runner._evicted, "a reservation cannot leave"
        it.put(young)
        it.attach(young)
        it.copy()
        assert it.runner._evicted == {young.held}
        it.finish(rounds=12)
        assert it.preemptions("evicted") == 1


def test_a_sequence_that_finishes_when_asked_to_leave_is_not_parked(it: HandDriven) -> None:
    old = it.ready(OLD_ANSWER)
    it.turn()
    young = it.ready(3, stream=1)
    it.turn()
    deliver_all(it)
    it.turn()
    it.copy()
    assert it.runner._evicted == {young.held}
    assert young.held.sequence in it.delivered[-1].left, "it has finished meanwhile"
    deliver_all(it)
    assert young.finished
    assert not it.runner._evicted
    it.finish(rounds=8)
    assert it.preemptions("evicted") == 0
    assert old.tokens == old.expected


def test_the_first_of_two_to_go_back_is_the_elder_although_it_came_out_later() -> None:
    with hand_driven(pool_of("slabs", tokens=16), promised_tokens=2, max_batch=2) as it:
        first, second = it.ready(9), it.ready(9)
        it.turn()
        it.turn()
        it.delivered[-1].outgrown.reverse()
        deliver_all(it)
        it.copy()
        assert parked(it) == [second.held], "there is room, but not before its elder"
        it.copy()
        assert (first.held.in_use, first.held.parked) == (True, None)
        it.finish(rounds=30)
        assert (first.tokens, second.tokens) == (first.expected, second.expected)


@pytest.mark.parametrize("storage", ["slabs", "blocks"])
def test_who_alone_needs_more_than_the_pool_is_refused_at_once(storage: str) -> None:
    with hand_driven(pool_of(storage, tokens=8), promised_tokens=1) as it:
        with pytest.raises(TooLargeError):
            it.reserve(9)
        only = it.reserve(8)
        assert only.held.pool_bytes == 2 * TOKEN_BYTES
        it.put(only)
        it.attach(only)
        it.finish(rounds=20)
        assert only.tokens == only.expected


def test_a_parcel_with_more_than_its_bound_may_not_wait_for_ever() -> None:
    """Blocks are rounded up, so it fits the reservation; all of its tokens would never fit the pool."""
    pool = block_pool(LAYOUT, 5 * 512, block_size=16)
    with hand_driven(pool, promised_tokens=1) as it:
        client = it.reserve(19)
        it.runner.check_parcel(client.held, manifest_for(client))
        too_much = dataclasses.replace(manifest_for(client), num_kept=(15, 15), logical_length=30)
        assert pool.sequence_bytes((15, 15), 1) <= client.held.pool_bytes
        with pytest.raises(TooLargeError):
            it.runner.check_parcel(client.held, too_much)
        it.finish(rounds=1)
