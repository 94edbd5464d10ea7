"""An aio gRPC server with what every service has: health, reflection, error mapping, limits, drain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.rpc.interceptor import ErrorInterceptor
from shared.rpc.options import MAX_CONTROL_BYTES, Option, server_options

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# The name under which `grpc.health.v1` answers that a process lives: whoever restarts processes asks for it.
LIVE = "live"


class RpcServer:
    """A started server; `address` is where it listens (`host:port`, the port resolved when 0 was asked)."""

    def __init__(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, address: str) -> None:
        self._server = server
        self._health = health_servicer
        self.address = address

    @classmethod
    async def start(
        cls,
        *,
        name: str,
        host: str,
        port: int,
        register: Callable[[grpc.aio.Server], None],
        services: Sequence[str],
        max_request_bytes: int = MAX_CONTROL_BYTES,
        credentials: grpc.ServerCredentials | None = None,
        guards: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[Option] = (),
    ) -> RpcServer:
        """Binds and starts; health stays NOT_SERVING until `set_ready`, but that of `LIVE`, which never is.

        Args:
            name: Name of this process in error details.
            register: Adds the servicers.
            services: Full service names for reflection, which is for development: there is none with credentials or
                guards.
            credentials: TLS; plaintext without it.
            guards: Interceptors that may refuse a call by raising a `ServiceError` in its handler.
            options: Besides those that every server has.

        Raises:
            OSError: The address cannot be bound.
        """
        interceptors = [ErrorInterceptor(name), *guards]
        server = grpc.aio.server(interceptors=interceptors, options=[*server_options(max_request_bytes), *options])
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        register(server)
        if credentials is None and not guards:
            reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        where = f"{host}:{port}"
        try:
            bound = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}") from error
        await server.start()
        await servicer.set(LIVE, SERVING)
        running = cls(server, servicer, f"{host}:{bound}")
        await running.set_ready(False)
        return running

    async def set_ready(self, ready: bool) -> None:
        """Sets what `grpc.health.v1` answers for the whole server."""
        await self._health.set("", SERVING if ready else NOT_SERVING)

    async def stop(self, grace_s: float = 0.5) -> None:
        """Refuses new calls and ends running ones after `grace_s`. Drain first: long-lived streams do not end."""
        await self.set_ready(False)
        await self._server.stop(grace_s)
