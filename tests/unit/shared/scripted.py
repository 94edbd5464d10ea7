"""A real aio server whose handlers are written in the test, and a channel to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import grpc

from shared.rpc.options import Option, client_options
from shared.rpc.server import RpcServer

SERVICE = "test.Scripted"
TIMEOUT_S = 20.0


class Served(NamedTuple):
    server: RpcServer
    channel: grpc.aio.Channel


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test's coroutine; a hang fails it."""
    asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


@contextlib.asynccontextmanager
async def serving(
    handlers: dict[str, grpc.RpcMethodHandler],
    *,
    service: str = SERVICE,
    name: str = "scripted",
    options: Sequence[Option] = (),
) -> AsyncIterator[Served]:
    def register(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    server = await RpcServer.start(
        name=name, host="127.0.0.1", port=0, register=register, services=[service], options=options
    )
    try:
        async with grpc.aio.insecure_channel(server.address, options=client_options()) as channel:
            yield Served(server, channel)
    finally:
        await server.stop(0)


def raising(error: Exception) -> dict[str, grpc.RpcMethodHandler]:
    """One handler of each kind; the streams raise after one message."""

    async def unary(request: Any, context: Any) -> bytes:
        raise error

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"one"
        raise error

    return {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(stream),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(unary),
        "StreamStream": grpc.stream_stream_rpc_method_handler(stream),
    }


async def once() -> AsyncIterator[bytes]:
    yield b"request"


async def call(channel: grpc.aio.Channel, kind: str) -> list[bytes]:
    """Calls the handler of one kind; returns the responses."""
    path = f"/{SERVICE}/{kind}"
    match kind:
        case "UnaryUnary":
            return [await channel.unary_unary(path)(b"request")]
        case "UnaryStream":
            return [message async for message in channel.unary_stream(path)(b"request")]
        case "StreamUnary":
            return [await channel.stream_unary(path)(once())]
        case "StreamStream":
            return [message async for message in channel.stream_stream(path)(once())]
    raise AssertionError(kind)


async def failure(channel: grpc.aio.Channel, kind: str = "UnaryUnary") -> grpc.aio.AioRpcError:
    """Calls a handler that must fail; returns the error."""
    try:
        await call(channel, kind)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"{kind} did not fail")
