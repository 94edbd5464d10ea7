"""Whose turn it is when memory is short: the oldest goes on, the youngest leaves, and nobody leaves in vain."""

from __future__ import annotations

import pytest

from decode_worker.answers import Wanted
from shared.errors import ResourceExhaustedError
from tests.unit.decode_worker.hand_driven import HandDriven, hand_driven
from tests.unit.decode_worker.old_and_young import (
    OLD_ANSWER,
    PROMISED,
    TOKEN_BYTES,
    YOUNG_ANSWER,
    bring_to,
    deliver_all,
    parked,
    pool_of,
)


def test_no_reservation_is_accepted_while_someone_waits(it: HandDriven) -> None:
    old, young = bring_to("parked", it)
    assert it.runner.waiting == len(parked(it)) > 0, "who is parked counts as waiting"
    more = {"attempt": 1, "prefill_epoch": "", "max_new_tokens": 2, "arena": None, "now": 0.0}
    with pytest.raises(ResourceExhaustedError, match="wait") as caught:
        it.reservations.reserve(request_id="third", wanted=Wanted({0: TOKEN_BYTES}), **more)
    assert (caught.value.reason, caught.value.retry_after_s) == ("KV_FULL", 0.1)
    it.end("cancel", old)
    it.runner.end_all(it.reservations.reserve(request_id="third", wanted=Wanted({0: TOKEN_BYTES}), **more))
    it.finish(rounds=8)
    assert young.tokens == young.expected


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
    with hand_driven(pool_of("slabs", tokens=16), promised_tokens=2, max_num_seqs=2) as it:
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
