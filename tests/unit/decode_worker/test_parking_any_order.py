"""Promises that are too small, under any order of steps, copies, arrivals, departures and failures."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.errors import ResourceExhaustedError, TooLargeError
from tests.unit.decode_worker.hand_driven import HandDriven, hand_driven
from tests.unit.decode_worker.marks import LAYOUT, Client
from tests.unit.decode_worker.pools import Pool, block_pool, poison, slab_pool

ENDS = ("cancel", "release", "stream break", "expiry")
# the longest sequence takes half of it, and every promise a twelfth
CAPACITY = 4096
MAX_NEW_TOKENS = 24
# of the answer, where another worker was lost
known = st.sampled_from([0, 0, 1, 4, 11, 30])


def pool_of(storage: str) -> Pool:
    pool: Pool = slab_pool(LAYOUT, CAPACITY) if storage == "slabs" else block_pool(LAYOUT, CAPACITY + 128, block_size=4)
    poison(pool)
    return pool


class Life(RuleBasedStateMachine):
    """Whatever happens, nobody is lost, nobody's memory is another's, and in the end everyone has their tokens."""

    storage: str

    @initialize(promised_tokens=st.sampled_from([1, 1, 2, 5]), max_num_seqs=st.sampled_from([1, 3, 8]))
    def start(self, promised_tokens: int, max_num_seqs: int) -> None:
        self.it = HandDriven(pool_of(self.storage), promised_tokens=promised_tokens, max_num_seqs=max_num_seqs)

    def some(self, data: st.DataObject, clients: list[Client]) -> Client:
        return clients[data.draw(st.integers(0, len(clients) - 1))]

    @property
    def alive(self) -> list[Client]:
        return [each for each in self.it.clients if not each.left and not each.finished]

    @rule(max_new_tokens=st.integers(2, MAX_NEW_TOKENS), stream=st.integers(0, 1), known=known)
    def reserve(self, max_new_tokens: int, stream: int, known: int) -> None:
        someone_waits = any(held.parked for held in self.it.reservations.answers)
        with contextlib.suppress(ResourceExhaustedError):
            self.it.reserve(max_new_tokens, stream, known=known)
            assert not someone_waits

    @rule(max_new_tokens=st.integers(8, MAX_NEW_TOKENS), known=known, announced=st.booleans())
    def come_ready(self, max_new_tokens: int, known: int, announced: bool) -> None:
        try:
            client = self.it.reserve(max_new_tokens, known=known, announced=announced)
        except ResourceExhaustedError:
            return
        self.it.put(client)
        self.it.attach(client)

    @precondition(lambda self: any(each.put is None for each in self.alive))
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        self.it.put(self.some(data, [each for each in self.alive if each.put is None]))

    @precondition(lambda self: any(not each.attached for each in self.alive))
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        self.it.attach(self.some(data, [each for each in self.alive if not each.attached]))

    @rule(times=st.integers(1, 4))
    def turn(self, times: int) -> None:
        for _ in range(times):
            self.it.turn()

    @precondition(lambda self: self.it.delivered)
    @rule()
    def deliver(self) -> None:
        self.it.deliver()

    @precondition(lambda self: self.it.thread.waiting)
    @rule()
    def copy(self) -> None:
        self.it.copy()

    @rule(times=st.integers(1, 5))
    def go_on(self, times: int) -> None:
        for _ in range(times):
            self.it.round()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), how=st.sampled_from(ENDS))
    def end(self, data: st.DataObject, how: str) -> None:
        self.it.end(how, self.some(data, self.alive))

    @precondition(lambda self: self.it.thread.waiting)
    @rule()
    def a_copy_fails(self) -> None:
        """Of a parcel: its sender hears of it. Of a parked sequence: its reader does."""
        told = {each for each in self.it.clients if each.error}
        delivering = [each for each in self.it.clients if each.put is not None and not each.put.done()]
        self.it.copy(RuntimeError("a bug"))
        self.it.check()
        failed = [each for each in self.it.clients if each.error and each not in told]
        refused = [each for each in delivering if each.put is None]
        assert len(failed) + len(refused) == 1 or any(each.left for each in self.it.clients)
        assert all(each.error == "INTERNAL" for each in failed)

    @precondition(lambda self: self.it.scheduler.running)
    @rule()
    def a_step_fails(self) -> None:
        self.it.engine.fails = True
        self.it.turn()
        self.it.engine.fails = False

    @invariant()
    def everything_is_in_order(self) -> None:
        if hasattr(self, "it"):
            self.it.check()

    def teardown(self) -> None:
        if hasattr(self, "it"):
            self.it.finish(rounds=60 * (1 + len(self.it.clients)))
            self.it.close()


class SlabLife(Life):
    storage = "slabs"


class BlockLife(Life):
    storage = "blocks"


for machine in (SlabLife, BlockLife):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
TestSlabLife, TestBlockLife = SlabLife.TestCase, BlockLife.TestCase


@pytest.mark.parametrize("storage", ["slabs", "blocks"])
@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_that_never_fits_is_served_to_the_last(storage: str, seed: int) -> None:
    chance = random.Random(seed)
    with hand_driven(pool_of(storage), promised_tokens=2, max_num_seqs=5) as it:
        wanted = [chance.randint(10, MAX_NEW_TOKENS) for _ in range(40)]
        for _ in range(20_000):
            event = chance.random()
            if event < 0.3:
                it.turn()
            elif event < 0.6 and it.delivered:
                it.deliver()
            elif event < 0.85 and it.thread.waiting:
                it.copy()
            elif wanted:
                try:
                    lost = chance.random() < 0.4
                    known = chance.randint(1, MAX_NEW_TOKENS) if lost else 0
                    client = it.reserve(wanted[-1], known=known, announced=chance.random() < 0.5)
                except ResourceExhaustedError:
                    continue
                wanted.pop()
                it.put(client)
                it.attach(client)
            elif not list(it.reservations):
                break
            it.check()
        assert not wanted, "someone was never admitted"
        it.finish(rounds=1)
        assert it.preemptions("outgrown") > 20
        assert it.preemptions("evicted") > 0
        assert it.worker.metrics.replayed_tokens._value.get() > 20


def test_the_pool_s_capacity_is_what_the_text_says() -> None:
    for storage in ("slabs", "blocks"):
        with hand_driven(pool_of(storage), promised_tokens=1) as it:
            assert it.pool.bound_bytes(6, MAX_NEW_TOKENS - 1) <= CAPACITY
            with pytest.raises(TooLargeError):
                it.reserve(200)
            it.finish(rounds=1)
