"""Errors of all four kinds of RPC become statuses, bugs leak nothing, cancellation stays cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from shared.errors import InvalidRequestError
from tests.unit.shared.scripted import SERVICE, call, failure, once, raising, run, serving

KINDS = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_error_ends_any_kind_with_its_status(kind: str) -> None:
    async def main() -> None:
        async with serving(raising(InvalidRequestError("no such thing"))) as (_, channel):
            error = await failure(channel, kind)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "no such thing"

    run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bug_becomes_internal_leaks_nothing_and_is_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(raising(KeyError("secret 10.0.0.7:443"))) as (_, channel):
            error = await failure(channel, kind)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(error)
        assert "KeyError" not in str(error)
        assert "internal error" in (error.details() or "")

    with caplog.at_level(logging.ERROR, logger="shared.rpc.interceptor"):
        run(main)
    (record,) = [record for record in caplog.records if record.name == "shared.rpc.interceptor"]
    assert kind in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_error_is_not_logged_as_a_bug(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(raising(InvalidRequestError("no"))) as (_, channel):
            await failure(channel, kind)

    run(main)
    assert not [record for record in caplog.records if record.name.startswith("shared")]


@pytest.mark.parametrize("kind", ["UnaryStream", "StreamStream"])
def test_messages_before_the_error_arrive(kind: str) -> None:
    async def main() -> None:
        async with serving(raising(InvalidRequestError("no"))) as (_, channel):
            path = f"/{SERVICE}/{kind}"
            stream = channel.unary_stream(path)(b"") if kind == "UnaryStream" else channel.stream_stream(path)(once())
            assert await stream.read() == b"one"
            with pytest.raises(grpc.aio.AioRpcError):
                await stream.read()

    run(main)


def echoing() -> dict[str, grpc.RpcMethodHandler]:
    async def unary(request: bytes, context: Any) -> bytes:
        return request

    async def unary_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(2):
            yield request

    async def stream_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([request async for request in requests])

    async def stream_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    return {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(unary_stream),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(stream_unary),
        "StreamStream": grpc.stream_stream_rpc_method_handler(stream_stream),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_succeeds_is_not_disturbed(kind: str) -> None:
    async def main() -> None:
        async with serving(echoing()) as (_, channel):
            expected = [b"request"] * (2 if kind == "UnaryStream" else 1)
            assert await call(channel, kind) == expected

    run(main)


def test_a_stream_that_writes_to_its_context_works() -> None:
    """As grpc's own health Watch does."""

    async def write(request: bytes, context: grpc.aio.ServicerContext) -> None:
        await context.write(b"one")
        await context.write(b"two")

    async def main() -> None:
        async with serving({"UnaryStream": grpc.unary_stream_rpc_method_handler(write)}) as (_, channel):
            assert await call(channel, "UnaryStream") == [b"one", b"two"]

    run(main)


def test_an_abort_by_the_handler_keeps_its_status() -> None:
    async def abort(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
        return b""

    async def main() -> None:
        async with serving({"UnaryUnary": grpc.unary_unary_rpc_method_handler(abort)}) as (_, channel):
            error = await failure(channel)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error.details() == "who are you"

    run(main)


@pytest.mark.parametrize("kind", ["UnaryUnary", "UnaryStream"])
def test_cancellation_reaches_the_handler_and_is_no_bug(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        begun, ended, outcome = asyncio.Event(), asyncio.Event(), []

        async def wait() -> None:
            begun.set()
            try:
                await asyncio.sleep(3600)
            except BaseException as error:
                outcome.append(type(error))
                raise
            finally:
                ended.set()

        async def unary(request: bytes, context: Any) -> bytes:
            await wait()
            return b""

        async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            await wait()
            yield b""

        handlers = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(stream),
        }
        async with serving(handlers) as (_, channel):
            task = asyncio.create_task(call(channel, kind))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await ended.wait()
        assert outcome == [asyncio.CancelledError]

    run(main)
    assert not [record for record in caplog.records if record.name.startswith("shared")]


def test_a_stream_whose_client_leaves_while_it_writes_is_closed() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def flood(request: bytes, context: Any) -> AsyncIterator[bytes]:
            try:
                while True:
                    yield bytes(1 << 20)
            finally:
                ended.set()

        async with serving({"UnaryStream": grpc.unary_stream_rpc_method_handler(flood)}) as (_, channel):
            stream = channel.unary_stream(f"/{SERVICE}/UnaryStream")(b"")
            assert len(await stream.read()) == 1 << 20
            stream.cancel()
            await ended.wait()

    run(main)
