"""Sequences that outgrow their promise: whoever ends, and whatever fails, at whichever moment."""

from __future__ import annotations

import dataclasses

import pytest

from shared.errors import ResourceExhaustedError, TooLargeError
from tests.unit.decode_worker.hand_driven import HandDriven, hand_driven
from tests.unit.decode_worker.marks import LAYOUT, manifest_for
from tests.unit.decode_worker.old_and_young import MOMENTS, TOKEN_BYTES, bring_to, deliver_all, pool_of
from tests.unit.decode_worker.pools import block_pool


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
    assert failing.held not in it.reservations.answers
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
        it.runner.promise.check(client.held.reservation, manifest_for(client))
        too_much = dataclasses.replace(manifest_for(client), num_kept=(15, 15), logical_length=30)
        assert pool.sequence_bytes((15, 15), 1) <= client.held.pool_bytes
        with pytest.raises(TooLargeError):
            it.runner.promise.check(client.held.reservation, too_much)
        it.finish(rounds=1)
