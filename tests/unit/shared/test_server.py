"""What every service has: health, reflection, limits, one owner per port."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from shared.errors import ResourceExhaustedError
from shared.rpc.options import MAX_CONTROL_BYTES
from shared.rpc.server import LIVE, NOT_SERVING, SERVING, RpcServer
from shared.rpc.status import from_rpc_error
from tests.unit.shared.scripted import SERVICE, call, failure, run, serving
from tests.unit.shared.test_interceptor import echoing

CHECK = health_pb2.HealthCheckRequest()


def test_health_is_not_serving_until_ready() -> None:
    async def main() -> None:
        async with serving({}) as (server, channel):
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(CHECK)).status == NOT_SERVING
            await server.set_ready(True)
            assert (await health.Check(CHECK)).status == SERVING
            await server.set_ready(False)
            assert (await health.Check(CHECK)).status == NOT_SERVING

    run(main)


def test_a_process_lives_before_it_is_ready_and_while_it_drains() -> None:
    async def main() -> None:
        async with serving({}) as (server, channel):
            health = health_pb2_grpc.HealthStub(channel)
            for ready in (False, True, False):
                await server.set_ready(ready)
                assert (await health.Check(health_pb2.HealthCheckRequest(service=LIVE))).status == SERVING

    run(main)


def test_health_can_be_watched() -> None:
    async def main() -> None:
        async with serving({}) as (server, channel):
            watch = health_pb2_grpc.HealthStub(channel).Watch(CHECK)
            assert (await watch.read()).status == NOT_SERVING
            await server.set_ready(True)
            assert (await watch.read()).status == SERVING
            watch.cancel()

    run(main)


def test_reflection_lists_the_services() -> None:
    async def main() -> None:
        async with serving({}) as (_, channel):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            stream = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            listed = {service.name async for reply in stream for service in reply.list_services_response.service}
        assert listed == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}

    run(main)


def test_a_taken_port_is_an_os_error() -> None:
    async def main() -> None:
        async with serving({}) as (server, _):
            port = int(server.address.rpartition(":")[2])
            with pytest.raises(OSError, match="cannot listen"):
                await RpcServer.start(
                    name="second", host="127.0.0.1", port=port, register=lambda _: None, services=[SERVICE]
                )

    run(main)


def test_a_stopped_server_gives_its_port_back() -> None:
    async def main() -> None:
        async with serving({}) as (server, _):
            port = int(server.address.rpartition(":")[2])
        again = await RpcServer.start(name="again", host="127.0.0.1", port=port, register=lambda _: None, services=[])
        assert again.address == f"127.0.0.1:{port}"
        await again.stop(0)

    run(main)


def test_a_message_above_the_limit_is_refused_by_the_server() -> None:
    async def main() -> None:
        unlimited = [("grpc.max_send_message_length", -1)]
        async with (
            serving(echoing()) as (server, _),
            grpc.aio.insecure_channel(server.address, options=unlimited) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/UnaryUnary")(bytes(MAX_CONTROL_BYTES + (1 << 20)))
        assert type(from_rpc_error(caught.value)) is ResourceExhaustedError

    run(main)


def test_a_message_of_exactly_the_limit_passes() -> None:
    async def main() -> None:
        async with serving(echoing()) as (_, channel):
            body = bytes(MAX_CONTROL_BYTES)
            assert await channel.unary_unary(f"/{SERVICE}/UnaryUnary")(body) == body

    run(main)


def test_an_unknown_method_is_unimplemented() -> None:
    async def main() -> None:
        async with serving({}) as (_, channel):
            assert (await failure(channel)).code() is grpc.StatusCode.UNIMPLEMENTED

    run(main)


def test_a_stopped_server_refuses_calls() -> None:
    async def main() -> None:
        async with serving(echoing()) as (server, channel):
            assert await call(channel, "UnaryUnary") == [b"request"]
            await server.stop(0)
            assert (await failure(channel)).code() is grpc.StatusCode.UNAVAILABLE

    run(main)
