"""Retained parcels under any order of events, beside a naive model of what must be there."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.store import ParcelStore
from shared.errors import NotFoundError
from shared.kv.arena import Arena
from shared.kv.transport.base import Parcel
from tests.unit.prefill_worker.manifests import manifest

ARENA_BYTES = 4096
LEASE_S = 30.0


@dataclass(eq=False)
class Model:
    """One parcel as it should be."""

    secret: bytes
    parcel: Parcel
    expires_at: float
    ended: bool = False

    @property
    def nbytes(self) -> int:
        return self.parcel.slot.extent.nbytes


@dataclass(eq=False)
class Send:
    parcel: Model
    stack: contextlib.ExitStack


class Life(RuleBasedStateMachine):
    """`kept` is in the order of last use; `filling` are slots of parcels that are not complete."""

    @initialize(capacity=st.sampled_from([0, 1024, 2048, ARENA_BYTES]))
    def start(self, capacity: int) -> None:
        self.arena = Arena(ARENA_BYTES)
        self.store = ParcelStore(self.arena)
        self.capacity = capacity
        self.held = RetainedParcels(self.store, capacity=capacity, lease_s=LEASE_S)
        self.now = 0.0
        self.filling: list[Parcel] = []
        self.kept: list[Model] = []
        self.gone: list[bytes] = [b"never"]
        self.sends: list[Send] = []

    def teardown(self) -> None:
        if hasattr(self, "held"):
            for send in self.sends:
                send.stack.close()
            self.held.clear()
            for parcel in self.filling:
                self.store.free(parcel.slot)
            assert self.store.used_bytes == self.held.used_bytes == 0
            self.arena.close()

    @rule(nbytes=st.integers(1, 1024) | st.integers(1, ARENA_BYTES))
    def begin_a_parcel(self, nbytes: int) -> None:
        extents = copy.deepcopy(self.arena._extents)
        given_up: list[Model] = []
        while (fits := extents.allocate(nbytes)) is None and (idle := self.idle(given_up)):
            given_up.append(idle[0])
            extents.free(idle[0].parcel.slot.extent)
        slot = self.store.allocate_now(nbytes)
        assert (slot is None) == (fits is None)
        for model in given_up:
            self.end(model)
        if slot is not None:
            assert slot.extent == fits
            self.filling.append(Parcel(manifest=manifest(), body=self.store.view(slot, nbytes), slot=slot))

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def give_up_a_parcel(self, data: st.DataObject) -> None:
        self.store.free(self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1))).slot)

    @precondition(lambda self: self.filling)
    @rule()
    def retain(self) -> None:
        parcel = self.filling[-1]
        secret = self.held.retain(parcel, self.now)
        fits = self.make_room(parcel.slot.extent.nbytes)
        assert (secret is not None) == fits
        if secret is not None:
            self.filling.pop()
            self.kept.append(Model(secret, parcel, self.now + LEASE_S))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def begin_to_send(self, data: st.DataObject) -> None:
        model, stack = data.draw(st.sampled_from(self.kept)), contextlib.ExitStack()
        assert stack.enter_context(self.held.sending(model.secret, self.now)) is model.parcel
        self.use(model)
        self.sends.append(Send(model, stack))

    @precondition(lambda self: self.sends)
    @rule(data=st.data())
    def finish_sending(self, data: st.DataObject) -> None:
        self.sends.pop(data.draw(st.integers(0, len(self.sends) - 1))).stack.close()

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        secret = data.draw(st.sampled_from([*self.gone, *(model.secret for model in self.kept)]))
        model = next((model for model in self.kept if model.secret == secret), None)
        assert self.held.renew(secret, self.now) == (model is not None)
        if model is not None:
            self.use(model)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        secret = data.draw(st.sampled_from([*self.gone, *(model.secret for model in self.kept)]))
        self.held.release(secret)
        for model in [model for model in self.kept if model.secret == secret]:
            self.end(model)

    @rule(passed=st.floats(0, 40))
    def expire(self, passed: float) -> None:
        self.now += passed
        over = [model for model in self.kept if model.expires_at < self.now]
        assert self.held.expire(self.now) == len(over)
        for model in over:
            self.end(model)

    @rule(data=st.data())
    def ask_for_one_that_is_gone(self, data: st.DataObject) -> None:
        try:
            with self.held.sending(data.draw(st.sampled_from(self.gone)), self.now):
                raise AssertionError("it is still there")
        except NotFoundError:
            pass

    @invariant()
    def what_is_known_and_held_is_what_should_be(self) -> None:
        if not hasattr(self, "held"):
            return
        self.store.check_integrity()
        self.held.check_integrity()
        assert list(self.held._by_secret) == [model.secret for model in self.kept]
        assert self.held.used_bytes == self.held_bytes() <= self.capacity
        assert self.held.filling_bytes == sum(parcel.slot.extent.nbytes for parcel in self.filling)
        assert self.store.used_bytes == self.held.used_bytes + self.held.filling_bytes

    def is_sent(self, model: Model) -> bool:
        return any(send.parcel is model for send in self.sends)

    def idle(self, without: list[Model]) -> list[Model]:
        return [model for model in self.kept if model not in without and not self.is_sent(model)]

    def use(self, model: Model) -> None:
        model.expires_at = self.now + LEASE_S
        self.kept.remove(model)
        self.kept.append(model)

    def end(self, model: Model) -> None:
        model.ended = True
        self.kept.remove(model)
        self.gone.append(model.secret)

    def make_room(self, nbytes: int) -> bool:
        """Those that nobody sends go, from the longest unused on, until so many more bytes may be retained."""
        if nbytes > self.capacity:
            return False
        while self.held_bytes() + nbytes > self.capacity and self.idle([]):
            self.end(self.idle([])[0])
        return self.held_bytes() + nbytes <= self.capacity

    def held_bytes(self) -> int:
        lingering = {send.parcel for send in self.sends if send.parcel.ended}
        return sum(model.nbytes for model in (*self.kept, *lingering))


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
