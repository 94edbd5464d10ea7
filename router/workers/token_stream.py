"""The tokens of all sequences of one decode worker, over one stream.

    request A ─ attach ─┐                              ┌─ sink A
    request B ─ attach ─┼─▶ writer ═ StreamTokens ═▶ reader ─┼─ sink B
    request C ─ cancel ─┘                              └─ sink C

One message per decode step carries the tokens of every sequence, which costs the router a third and the worker a
fifteenth of what a stream per request does.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from vlcache.worker.v1 import decode_pb2

from shared.errors import AbortedError, InternalError, ServiceError, UnavailableError
from shared.rpc.status import ERROR_BY_CODE
from shared.telemetry.scope import NOBODY, within

log = logging.getLogger(__name__)

# Reason of the error that ends whoever is attached to a stream that broke.
STREAM_BROKE = "DECODE_WORKER_LOST"
CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}

# Called in the event loop, in order, and never after an update that ends the sequence or after an error. What it
# stores is bounded by max_new_tokens, so a slow client cannot make it grow without end.
Sink = Callable[["decode_pb2.SequenceUpdate | ServiceError"], None]


class TokenStream:
    """Attaches reservations to the stream, which opens at first use and again after it broke."""

    def __init__(self, open_call: Callable[[], Any]) -> None:
        self._open_call = open_call
        self._handles = itertools.count(1)
        self._connection: _Connection | None = None

    @property
    def attached(self) -> int:
        """Sequences whose end has not been seen."""
        return len(self._connection.sinks) if self._connection else 0

    @property
    def draining(self) -> bool:
        """Whether the worker has said that its sequences should go on elsewhere."""
        return self._connection is not None and self._connection.draining

    @property
    def silent_s(self) -> float:
        """Seconds since anything was heard while sequences are attached; 0 when there are none."""
        if not self.attached or self._connection is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._connection.heard_at_s

    def attach(self, token: bytes, sink: Sink, *, delivered: Sequence[int] = (), choice: int = 0) -> Attachment:
        """Binds one answer of the reservation `token`; its updates go to `sink`, or one `UnavailableError` when the
        stream breaks.

        Args:
            delivered: The answer as its reader has it; the first update begins behind it.
        """
        if self._connection is None or self._connection.broken:
            self._connection = _Connection(self._open_call())
        handle = next(self._handles)
        attach = decode_pb2.Attach(handle=handle, token=token, delivered=delivered, choice=choice)
        self._connection.attach(attach, sink)
        return Attachment(self._connection, handle)

    async def close(self) -> None:
        """Breaks the stream: whoever is attached gets an `UnavailableError`."""
        if self._connection is not None:
            await self._connection.close()


class Attachment:
    """One sequence on one opened stream."""

    def __init__(self, connection: _Connection, handle: int) -> None:
        self._connection = connection
        self._handle = handle

    def cancel(self) -> None:
        """Ends the sequence unless it has ended; its sink is not called any more. Idempotent."""
        if self._connection.sinks.pop(self._handle, None) is not None:
            cancel = decode_pb2.Cancel(handle=self._handle)
            self._connection.send(decode_pb2.TokenStreamRequest(cancel=cancel))

    def reports_break(self) -> bool:
        """True for the first that asks after its stream broke: that is one failure, however many were attached."""
        first, self._connection.break_reported = not self._connection.break_reported, True
        return first


class _Connection:
    """One opened call with its reader and its writer."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._outbox: asyncio.Queue[decode_pb2.TokenStreamRequest] = asyncio.Queue()
        self.sinks: dict[int, Sink] = {}
        self.broken = False
        self.break_reported = False
        self.draining = False
        self.heard_at_s = asyncio.get_running_loop().time()
        # opened for whoever came first, and then everybody's
        with within(NOBODY):
            self._tasks = (asyncio.create_task(self._read()), asyncio.create_task(self._write()))

    def attach(self, attach: decode_pb2.Attach, sink: Sink) -> None:
        if not self.sinks:
            # nobody was owed anything until now
            self.heard_at_s = asyncio.get_running_loop().time()
        self.sinks[attach.handle] = sink
        self.send(decode_pb2.TokenStreamRequest(attach=attach))

    def send(self, request: decode_pb2.TokenStreamRequest) -> None:
        self._outbox.put_nowait(request)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # a reader that never started has no finally
        self._break()

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self.heard_at_s = asyncio.get_running_loop().time()
                self.draining = self.draining or message.draining
                for update in message.updates:
                    self._deliver(update)
        except grpc.aio.AioRpcError as error:
            log.warning("a token stream broke: %s", error.code().name)
        finally:
            self._break()

    def _deliver(self, update: decode_pb2.SequenceUpdate) -> None:
        ended = bool(update.finish_reason) or update.HasField("error")
        sink = self.sinks.pop(update.handle, None) if ended else self.sinks.get(update.handle)
        # updates of a cancelled sequence may still be on their way
        if sink is not None:
            sink(_error_of(update.error) if update.HasField("error") else update)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # the reader sees the same break and reports it
            return

    def _break(self) -> None:
        self.broken = True
        self._tasks[1].cancel()
        self._call.cancel()
        while self.sinks:
            _, sink = self.sinks.popitem()
            sink(UnavailableError("the decode worker was lost", reason=STREAM_BROKE))


def _error_of(message: decode_pb2.SequenceError) -> ServiceError:
    name = CODE_NAMES.get(message.code, "")
    # our own client did not cancel: it must not be told that it did
    cls = AbortedError if name == "CANCELLED" else ERROR_BY_CODE.get(name, InternalError)
    return cls(message.message, reason=message.reason)
