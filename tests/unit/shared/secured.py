"""A real server as workers have it: it demands certificates, and holds callers to the table."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from vlcache.worker.v1 import decode_pb2, kv_pb2, prefill_pb2

from shared.rpc.access import RoleInterceptor
from shared.rpc.identity import Identity
from shared.rpc.server import RpcServer

FILES = (prefill_pb2, decode_pb2, kv_pb2)
METHODS: list[MethodDescriptor] = [
    method for file in FILES for service in file.DESCRIPTOR.services_by_name.values() for method in service.methods
]
ANSWER = b"answered"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
RESERVE = "/vlcache.worker.v1.DecodeService/Reserve"


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def kind_of(method: MethodDescriptor) -> str:
    kinds = {True: "stream", False: "unary"}
    return f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"


def handler_of(method: MethodDescriptor) -> grpc.RpcMethodHandler:
    """Answers with bytes, whatever is sent."""

    async def unary(request: Any, context: Any) -> bytes:
        return ANSWER

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield ANSWER

    make = getattr(grpc, f"{kind_of(method)}_rpc_method_handler")
    return make(stream if method.server_streaming else unary)


def every_method(server: grpc.aio.Server) -> None:
    for name in {method.containing_service.full_name for method in METHODS}:
        handlers = {each.name: handler_of(each) for each in METHODS if each.containing_service.full_name == name}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


@contextlib.asynccontextmanager
async def worker(identity: Identity, register: Any = every_method) -> AsyncIterator[str]:
    """The address of a server with the services of all workers."""
    server = await RpcServer.start(
        name="secured",
        host="127.0.0.1",
        port=0,
        register=register,
        services=[],
        credentials=identity.server_credentials(demand_client_cert=True),
        guards=[RoleInterceptor()],
    )
    try:
        yield server.address
    finally:
        await server.stop(0)


async def call(channel: grpc.aio.Channel, method: MethodDescriptor) -> bytes:
    """The first answer; raises AioRpcError."""
    kind = kind_of(method)
    rpc = getattr(channel, kind)(path_of(method))
    answer = rpc(once() if method.client_streaming else b"", timeout=10)
    return await anext(aiter(answer)) if method.server_streaming else await answer


async def once() -> AsyncIterator[bytes]:
    yield b""


async def reserve(address: str, credentials: grpc.ChannelCredentials | None, **options: Any) -> bytes:
    """One call over a new channel."""
    async with channel_to(address, credentials, **options) as channel:
        return await channel.unary_unary(RESERVE)(b"", timeout=5)


def channel_to(
    address: str, credentials: grpc.ChannelCredentials | None, options: Iterable[tuple[str, Any]] = ()
) -> grpc.aio.Channel:
    # channels of one process share connections otherwise, also those whose certificates were replaced
    options = [*options, ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


async def code_of(address: str, credentials: grpc.ChannelCredentials | None, **options: Any) -> str:
    """OK, or the status that a call ends with."""
    try:
        await reserve(address, credentials, **options)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def health(address: str, credentials: grpc.ChannelCredentials) -> health_pb2.HealthCheckResponse:
    async with channel_to(address, credentials) as channel:
        rpc = channel.unary_unary(
            HEALTH_CHECK,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        return await rpc(health_pb2.HealthCheckRequest(), timeout=5)
