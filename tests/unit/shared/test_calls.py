"""A call has the scope of its request until it has ended, however it ends; then its span has ended, too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from shared.errors import AbortedError
from shared.rpc.calls import enter_call
from shared.telemetry.scope import current
from shared.telemetry.span import Attributes, Metadata
from tests.unit.shared.recording_span import RecordingSpan
from tests.unit.shared.scripted import SERVICE, TIMEOUT_S, run, serving


class RecordingTracer:
    """Makes one span and keeps it."""

    def __init__(self) -> None:
        self.span = RecordingSpan()
        self.begun: tuple[str, Metadata, Attributes] | None = None
        self.ended = asyncio.Event()
        self.span.end = self._end

    def begin(self, name: str, metadata: Metadata, attributes: Attributes) -> RecordingSpan:
        self.begun = (name, metadata, attributes)
        return self.span

    def _end(self, error: str = "") -> None:
        self.span.ends.append(error)
        self.ended.set()


async def outcome_of(ending: Exception | None) -> RecordingTracer:
    """A streamed call that ends so after one message; without an end it is cancelled by its caller."""
    tracer = RecordingTracer()

    async def handle(request: Any, context: Any) -> AsyncIterator[bytes]:
        enter_call(context, tracer, "Prefill", "r-1", attempt=2)
        yield b"one"
        if isinstance(ending, asyncio.TimeoutError):
            await asyncio.sleep(TIMEOUT_S)
        if ending is not None:
            raise ending

    async with serving({"Go": grpc.unary_stream_rpc_method_handler(handle)}) as served:
        call = served.channel.unary_stream(f"/{SERVICE}/Go")(b"", metadata=(("traceparent", "mine"),))
        assert await call.read() == b"one"
        if isinstance(ending, asyncio.TimeoutError):
            call.cancel()
        else:
            try:
                await call.read()
            except grpc.aio.AioRpcError:
                assert ending is not None
        await asyncio.wait_for(tracer.ended.wait(), TIMEOUT_S)
    return tracer


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        (None, ""),
        (AbortedError("no"), "ABORTED"),
        (KeyError("a bug"), "INTERNAL"),
        (asyncio.TimeoutError(), "CANCELLED"),
    ],
)
def test_the_span_of_a_call_ends_with_it(ending: Exception | None, error: str) -> None:
    async def main() -> None:
        tracer = await outcome_of(ending)
        assert tracer.span.ends == [error]
        name, metadata, attributes = tracer.begun
        assert (name, attributes) == ("Prefill", {"request_id": "r-1", "attempt": 2})
        assert dict(metadata)["traceparent"] == "mine"

    run(main)


def test_a_bug_is_logged_with_its_request() -> None:
    seen: list[str] = []

    class Ids(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(current().request_id)

    async def main() -> None:
        await outcome_of(KeyError("a bug"))

    handler, logger = Ids(), logging.getLogger("shared.rpc.interceptor")
    logger.addHandler(handler)
    try:
        run(main)
    finally:
        logger.removeHandler(handler)
    assert seen == ["r-1"]
