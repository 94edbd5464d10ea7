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
from shared.errors import DuplicateRequestError, NotFoundError
from shared.kv.arena import Arena
from shared.kv.secret import SECRET_BYTES
from shared.kv.transport.base import Parcel
from tests.unit.prefill_worker.manifests import manifest

ARENA_BYTES = 4096
LEASE_S = 30.0
SECRETS = [bytes([number]) * SECRET_BYTES for number in range(8)]


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
class Call:
    """One that runs: the parcel that it makes, and whether that may be retained."""

    secret: bytes
    parcel: Parcel | None
    wanted: bool = True


@dataclass(eq=False)
class Send:
    parcel: Model
    stack: contextlib.ExitStack


class Life(RuleBasedStateMachine):
    """`kept` is in the order of last use; a call that has handed its parcel over, or given it up, runs on without."""

    @initialize(capacity=st.sampled_from([0, 1024, 2048, ARENA_BYTES]))
    def start(self, capacity: int) -> None:
        self.arena = Arena(ARENA_BYTES)
        self.store = ParcelStore(self.arena)
        self.capacity = capacity
        self.held = RetainedParcels(self.store, capacity=capacity, lease_s=LEASE_S)
        self.now = 0.0
        self.calls: list[Call] = []
        self.kept: list[Model] = []
        self.sends: list[Send] = []

    def teardown(self) -> None:
        if hasattr(self, "held"):
            for send in self.sends:
                send.stack.close()
            self.held.clear()
            for parcel in self.filling:
                self.store.free(parcel.slot)
            for call in self.calls:
                self.held.expect_no_more(call.secret)
            self.held.check_integrity(idle=True)
            assert self.store.used_bytes == self.held.used_bytes == 0
            self.arena.close()

    @rule(nbytes=st.integers(1, 1024) | st.integers(1, ARENA_BYTES), secret=st.sampled_from(SECRETS))
    def begin_a_call(self, nbytes: int, secret: bytes) -> None:
        try:
            self.held.expect(secret)
        except DuplicateRequestError:
            assert secret in self.in_use()
            return
        assert secret not in self.in_use()
        self.calls.append(Call(secret, self.begin_a_parcel(nbytes)))

    def begin_a_parcel(self, nbytes: int) -> Parcel | None:
        extents = copy.deepcopy(self.arena._extents)
        given_up: list[Model] = []
        while (fits := extents.allocate(nbytes)) is None and (idle := self.idle(given_up)):
            given_up.append(idle[0])
            extents.free(idle[0].parcel.slot.extent)
        slot = self.store.allocate_now(nbytes)
        assert (slot is None) == (fits is None)
        for model in given_up:
            self.end(model)
        if slot is None:
            return None
        assert slot.extent == fits
        return Parcel(manifest=manifest(), body=self.store.view(slot, nbytes), slot=slot)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def end_a_call(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))
        if call.parcel is not None:
            self.store.free(call.parcel.slot)
        self.held.expect_no_more(call.secret)
        self.calls.remove(call)

    @precondition(lambda self: self.filling)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from([call for call in self.calls if call.parcel is not None]))
        parcel = call.parcel
        assert parcel is not None
        retained = self.held.retain(call.secret, parcel, self.now)
        assert retained == (call.wanted and self.make_room(parcel.slot.extent.nbytes))
        if retained:
            call.parcel, call.wanted = None, False
            self.kept.append(Model(call.secret, parcel, self.now + LEASE_S))

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
        secret = data.draw(st.sampled_from([b"never", *SECRETS]))
        model = next((model for model in self.kept if model.secret == secret), None)
        assert self.held.renew(secret, self.now) == (model is not None)
        if model is not None:
            self.use(model)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        secret = data.draw(st.sampled_from([b"never", *SECRETS]))
        self.held.release(secret)
        for call in self.calls:
            call.wanted = call.wanted and call.secret != secret
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
            gone = {b"never", *SECRETS} - {model.secret for model in self.kept}
            with self.held.sending(data.draw(st.sampled_from(sorted(gone))), self.now):
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

    @property
    def filling(self) -> list[Parcel]:
        """Of slots that are still their calls'."""
        return [call.parcel for call in self.calls if call.parcel is not None]

    def in_use(self) -> set[bytes]:
        return {each.secret for each in (*self.calls, *self.kept)}

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
