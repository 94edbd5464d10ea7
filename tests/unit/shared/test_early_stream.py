"""A transfer that begins before its parcel is complete, to a scripted receiver over real gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from vlcache.worker.v1 import kv_pb2 as pb

from shared import errors
from shared.kv.arena import Arena
from shared.kv.manifest import FORMAT_VERSION, Manifest
from shared.kv.transport.base import Parcel, SendReport
from shared.kv.transport.early_stream import EarlyStream
from shared.kv.transport.frames import CHUNK_BYTES, Chunk, decode_first, decode_later
from shared.kv.waves import LAST_WAVE
from shared.model.wave_order import in_body_order, last_wave
from tests.unit.shared.parcels import parcel_in
from tests.unit.shared.receiver import SERVICE
from tests.unit.shared.scripted import run, serving

TOKEN = b"secret of the reservation"


class Receiver:
    """Keeps what arrived. After message `fail_after` it raises `error`, if there is one."""

    def __init__(self, *, error: Exception | None = None, fail_after: int = 0) -> None:
        self._error, self._fail_after = error, fail_after
        self.frames: list[bytes] = []
        self.received = asyncio.Event()
        self.has_ended = asyncio.Event()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        serializer = pb.PutKVResponse.SerializeToString
        return {"PutKV": grpc.stream_unary_rpc_method_handler(self.put, response_serializer=serializer)}

    async def put(self, frames: AsyncIterator[bytes], context: Any) -> pb.PutKVResponse:
        try:
            async for frame in frames:
                self.frames.append(frame)
                self.received.set()
                if self._error and len(self.frames) == self._fail_after:
                    raise self._error
            return pb.PutKVResponse()
        finally:
            self.has_ended.set()

    @property
    def complete(self) -> bool:
        """Whether it has heard what the parcel was."""
        return any(isinstance(frame, pb.PutKVTrailer) for frame in self.later)

    @property
    def later(self) -> list[Chunk | pb.PutKVTrailer]:
        return [decode_later(frame) for frame in self.frames[1:]]

    @property
    def data(self) -> bytes:
        return b"".join(bytes(frame.data) for frame in self.later if isinstance(frame, Chunk))


class Sent:
    """A parcel of which the first row, its K and its V, has left early."""

    def __init__(self, arena: Arena, nbytes: int = 4096) -> None:
        self.parcel: Parcel = parcel_in(arena, nbytes)
        manifest = self.parcel.manifest
        rows, size = sum(manifest.num_kept), manifest.layout.row_bytes
        value = next(iter(manifest.layout.sections(manifest.num_kept))).value_offset
        body = bytes(self.parcel.body)
        self.early = body[:size] + body[value : value + size]
        self.waves = bytes([0]) + bytes([LAST_WAVE]) * (rows - 1)

    def add_to(self, stream: EarlyStream) -> None:
        stream.add(lambda: memoryview(self.early))
        stream.placed(self.waves)

    async def finish(self, stream: EarlyStream) -> SendReport:
        manifest, body = self.parcel.manifest, self.parcel.body
        rest = memoryview(bytes(last_wave(body, manifest.layout, manifest.num_kept, self.waves)))
        return await stream.finish(manifest, [lambda: rest, lambda: memoryview(stream.waves)])


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(4 * CHUNK_BYTES)
    yield made
    made.close()


def with_stream(receiver: Receiver, body: Callable[[EarlyStream], Coroutine[Any, Any, None]]) -> None:
    """Afterwards the stream is closed, and no task is left."""

    async def main() -> None:
        async with serving(receiver.handlers(), service=SERVICE) as (_, channel):
            with ThreadPoolExecutor(1) as thread:
                stream = EarlyStream(channel, TOKEN, thread)
                try:
                    await body(stream)
                finally:
                    await stream.close()

    run(main)


@pytest.mark.parametrize("nbytes", [4096, CHUNK_BYTES, 3 * CHUNK_BYTES + 4096])
def test_opening_chunks_and_trailer(arena: Arena, nbytes: int) -> None:
    receiver, sent = Receiver(), Sent(arena, nbytes)

    async def body(stream: EarlyStream) -> None:
        assert not stream.begun
        sent.add_to(stream)
        assert stream.begun
        report = await sent.finish(stream)
        assert decode_first(receiver.frames[0]) == pb.PutKVOpening(token=TOKEN, format_version=FORMAT_VERSION)
        *chunks, trailer = receiver.later
        assert isinstance(trailer, pb.PutKVTrailer)
        assert Manifest.from_proto(trailer.manifest) == sent.parcel.manifest
        ends = [0]
        for chunk in chunks:
            assert isinstance(chunk, Chunk)
            assert chunk.offset == ends[-1]
            assert 0 < len(chunk.data) <= CHUNK_BYTES
            ends.append(chunk.offset + len(chunk.data))
        assert receiver.data[: len(sent.early)] == sent.early
        assert bytes(in_body_order(sent.parcel.manifest, memoryview(receiver.data))) == bytes(sent.parcel.body)
        assert (report.transport, report.sent_bytes) == ("grpc", sum(map(len, receiver.frames)))
        assert report.seconds > 0

    with_stream(receiver, body)


def test_a_wave_leaves_when_its_bytes_are_there_and_in_its_turn(arena: Arena) -> None:
    receiver, arrived = Receiver(), threading.Event()

    def late() -> memoryview:
        assert arrived.wait(10)
        return memoryview(b"first")

    async def body(stream: EarlyStream) -> None:
        stream.add(late)
        stream.add(lambda: memoryview(b"second"))
        await receiver.received.wait()
        assert receiver.data == b""
        arrived.set()
        while receiver.data != b"firstsecond":
            receiver.received.clear()
            await receiver.received.wait()

    with_stream(receiver, body)


def test_waves_are_added_in_another_thread(arena: Arena) -> None:
    receiver, sent = Receiver(), Sent(arena)

    async def body(stream: EarlyStream) -> None:
        await asyncio.get_running_loop().run_in_executor(None, sent.add_to, stream)
        await sent.finish(stream)
        assert bytes(in_body_order(sent.parcel.manifest, memoryview(receiver.data))) == bytes(sent.parcel.body)

    with_stream(receiver, body)


def test_without_a_wave_nothing_is_opened() -> None:
    receiver = Receiver()

    async def body(stream: EarlyStream) -> None:
        await stream.close()

    with_stream(receiver, body)
    assert receiver.frames == []


def test_closing_breaks_the_transfer_off(arena: Arena) -> None:
    receiver, sent = Receiver(), Sent(arena)

    async def body(stream: EarlyStream) -> None:
        sent.add_to(stream)
        await receiver.received.wait()
        await stream.close()
        await receiver.has_ended.wait()

    with_stream(receiver, body)
    assert not receiver.complete


def test_who_waits_for_the_end_may_be_cancelled(arena: Arena) -> None:
    """The last bytes may be waited for just then: nobody touches them afterwards."""
    receiver, sent, waiting, go_on = Receiver(), Sent(arena), threading.Event(), threading.Event()

    def blocked() -> memoryview:
        waiting.set()
        assert go_on.wait(10)
        return memoryview(b"late")

    async def body(stream: EarlyStream) -> None:
        stream.add(blocked)
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait, 10)
        finishing = asyncio.create_task(sent.finish(stream))
        while stream._pieces.empty():  # noqa: ASYNC110 - until it waits
            await asyncio.sleep(0)
        finishing.cancel()
        done, _ = await asyncio.wait([finishing], timeout=0.05)
        assert not done
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await finishing
        await receiver.has_ended.wait()

    with_stream(receiver, body)
    assert not receiver.complete


REFUSALS = [
    errors.DataLossError("digest", reason="PARCEL_DIGEST"),
    errors.NotFoundError("no reservation"),
    errors.AbortedError("released", reason="RELEASED"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: error.code)
@pytest.mark.parametrize("fail_after", [1, 2, 3])
def test_a_refusal_is_the_receivers_error_however_early_it_came(
    arena: Arena, refusal: errors.ServiceError, fail_after: int
) -> None:
    receiver, sent = Receiver(error=refusal, fail_after=fail_after), Sent(arena)

    async def body(stream: EarlyStream) -> None:
        sent.add_to(stream)
        if fail_after < 3:
            await receiver.has_ended.wait()
        with pytest.raises(type(refusal)) as caught:
            await sent.finish(stream)
        assert (caught.value.reason, caught.value.message) == (refusal.reason, refusal.message)

    with_stream(receiver, body)


def test_a_receiver_that_breaks_off_does_not_cancel_the_sender(arena: Arena) -> None:
    receiver, sent = Receiver(), Sent(arena)

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            async with serving(receiver.handlers(), service=SERVICE) as (server, channel):
                stream = EarlyStream(channel, TOKEN, thread)
                sent.add_to(stream)
                await receiver.received.wait()
                await server.stop(0)
                with pytest.raises(errors.ServiceError) as caught:
                    await sent.finish(stream)
                assert caught.value.code in ("CANCELLED", "UNAVAILABLE")

    run(main)


def test_a_bug_behind_a_piece_is_not_hidden(arena: Arena) -> None:
    receiver, sent = Receiver(), Sent(arena)

    def bug() -> memoryview:
        raise RuntimeError("a bug")

    async def body(stream: EarlyStream) -> None:
        stream.add(bug)
        with pytest.raises(RuntimeError, match="a bug"):
            await sent.finish(stream)
        await receiver.has_ended.wait()

    with_stream(receiver, body)
    assert not receiver.complete
