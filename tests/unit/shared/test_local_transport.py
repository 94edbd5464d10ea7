"""Parcels inside one process, to a scripted decode half."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from shared import errors
from shared.kv.arena import Arena
from shared.kv.manifest import Manifest
from shared.kv.transport.local import LocalTransport
from tests.unit.shared.parcels import parcel_in
from tests.unit.shared.scripted import run

TOKEN = b"secret of the reservation"


class Half:
    """Takes parcels, or raises `error`; with `hold` only after `release`, and then copies even when cancelled."""

    def __init__(self, error: Exception | None = None, *, hold: bool = False) -> None:
        self._error = error
        self.taken: list[tuple[bytes, Manifest, memoryview]] = []
        self.begun, self.release = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[object] | None = None
        self.let_go = False
        if not hold:
            self.release.set()

    async def take(self, token: bytes, manifest: Manifest, body: memoryview) -> None:
        self.task = asyncio.current_task()
        self.begun.set()
        cancelled = False
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                cancelled = True
        self.let_go = True
        if cancelled:
            raise asyncio.CancelledError
        if self._error:
            raise self._error
        self.taken.append((token, manifest, body))

    def renew(self, token: bytes) -> None:
        raise AssertionError("a transport renews nothing")


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(1 << 16)
    yield made
    made.close()


def test_the_parcel_is_handed_over_as_it_lies_and_no_byte_counts(arena: Arena) -> None:
    async def main() -> None:
        half, parcel = Half(), parcel_in(arena, 1024)
        report = await LocalTransport(half).send(parcel, TOKEN)
        ((token, manifest, body),) = half.taken
        assert (token, manifest) == (TOKEN, parcel.manifest)
        assert body is parcel.body
        assert (report.transport, report.sent_bytes) == ("local", 0)
        assert report.seconds > 0

    run(main)


@pytest.mark.parametrize(
    "refusal",
    [errors.NotFoundError("the reservation has ended"), errors.InvalidRequestError("too large"), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_is_raised_as_it_is(arena: Arena, refusal: Exception) -> None:
    async def main() -> None:
        with pytest.raises(type(refusal)) as caught:
            await LocalTransport(Half(refusal)).send(parcel_in(arena, 256), TOKEN)
        assert caught.value is refusal

    run(main)


def test_a_cancelled_hand_over_ends_only_when_the_other_half_has_let_go(arena: Arena) -> None:
    async def main() -> None:
        half = Half(hold=True)
        sending = asyncio.create_task(LocalTransport(half).send(parcel_in(arena, 256), TOKEN))
        await half.begun.wait()
        for _ in range(2):
            sending.cancel()
            await asyncio.wait([sending], timeout=0.01)
            assert not sending.done(), "the slot could be reused under the copy"
        half.release.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert half.let_go
        assert half.taken == []

    run(main)


def test_the_delivery_can_be_cancelled_apart_from_the_request(arena: Arena) -> None:
    """`Reservations.end` cancels the task that delivers; the sender's own runs a whole request."""

    async def main() -> None:
        half = Half()
        await LocalTransport(half).send(parcel_in(arena, 256), TOKEN)
        assert half.task is not None
        assert half.task is not asyncio.current_task()

    run(main)
