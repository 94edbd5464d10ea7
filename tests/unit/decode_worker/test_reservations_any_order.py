"""Reservations under any order of events that the runner can produce."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from decode_worker.answers import Answer, Stage, Wanted
from decode_worker.kv_pool.slabs import SlabPool
from decode_worker.reservations import Reservations
from shared.errors import AlreadyCommittedError, ResourceExhaustedError
from tests.unit.decode_worker.test_reservations import LAYOUT, LEASE_S, activate, reserve, subscribe


class Life(RuleBasedStateMachine):
    """`using` are the reservations whose memory a thread touches."""

    @initialize()
    def start(self) -> None:
        self.pool = SlabPool(8192, LAYOUT)
        self.held = Reservations(self.pool, lease_s=LEASE_S)
        self.now = 0.0
        self.all: list[Answer] = []
        self.using: list[Answer] = []
        self.number = 0

    def pick(self, data: st.DataObject, choice: list[Answer]) -> Answer:
        return choice[data.draw(st.integers(0, len(choice) - 1))]

    @rule(nbytes=st.integers(1, 3000))
    def reserve(self, nbytes: int) -> None:
        self.number += 1
        try:
            self.all.append(reserve(self.held, request_id=str(self.number), nbytes=nbytes, now=self.now))
        except ResourceExhaustedError:
            assert self.pool.used_bytes > 0

    @precondition(lambda self: self.all)
    @rule(data=st.data(), nbytes=st.integers(1, 9000))
    def grow(self, data: st.DataObject, nbytes: int) -> None:
        answer = self.pick(data, self.all)
        if answer.ended:
            return
        held = answer.pool_bytes
        try:
            self.held.grow(answer.reservation, Wanted({0: nbytes}))
        except AlreadyCommittedError:
            assert answer.reservation.stage is not Stage.RESERVED
        except ResourceExhaustedError:
            assert answer.pool_bytes == held < nbytes
        else:
            assert answer.pool_bytes >= max(held, nbytes)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def begin_fill(self, data: st.DataObject) -> None:
        answer = self.pick(data, self.all)
        if answer.reservation.stage is not Stage.RESERVED:
            with pytest.raises(AlreadyCommittedError):
                self.held.begin_fill(answer.reservation)
        elif not answer.ended:
            self.held.begin_fill(answer.reservation)
            self.using.append(answer)

    @precondition(lambda self: any(each.reservation.stage is Stage.FILLING for each in self.using))
    @rule(data=st.data(), works=st.booleans(), attached=st.booleans())
    def finish_fill(self, data: st.DataObject, works: bool, attached: bool) -> None:
        answer = self.pick(data, [each for each in self.using if each.reservation.stage is Stage.FILLING])
        self.using.remove(answer)
        if works and not answer.ended:
            activate(self.held, answer, max(1, answer.pool_bytes // 2))
            if attached:
                subscribe(answer)
                answer.in_use = True
                self.using.append(answer)
        else:
            self.held.end_fill(answer.reservation)

    @precondition(lambda self: any(each.in_use for each in self.using))
    @rule(data=st.data())
    def leave_the_batch(self, data: st.DataObject) -> None:
        answer = self.pick(data, [each for each in self.using if each.in_use])
        self.using.remove(answer)
        self.held.end(answer)
        self.held.release_memory(answer)

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.held.end(self.pick(data, self.all))

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        self.held.renew(self.pick(data, self.all).reservation, self.now)

    @rule(passed=st.floats(0, 40))
    def expire(self, passed: float) -> None:
        self.now += passed
        for answer in self.held.expired(self.now):
            assert answer.reservation.expires_at < self.now
            assert not (answer.reservation.stage is Stage.ACTIVE and answer.subscription)
            self.held.end(answer)

    @invariant()
    def memory_in_use_is_held_and_nothing_else(self) -> None:
        if not hasattr(self, "held"):
            return
        self.held.check_integrity()
        alive = [each for each in self.all if not each.ended]
        lingering = [each for each in self.using if each.ended]
        assert self.pool.used_bytes == sum(each.pool_bytes for each in (*alive, *lingering))
        assert set(self.held.answers) == set(alive)
        assert self.held.idle.is_set() == (not alive and not lingering)


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLife = Life.TestCase
