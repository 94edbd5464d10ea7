"""An aio gRPC server with what every service has: health, reflection, error mapping, limits, drain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared.rpc.interceptor import ErrorInterceptor
from shared.rpc.options import MAX_CONTROL_BYTES, server_options

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
    ) -> RpcServer:
        """Binds and starts; health stays NOT_SERVING until `set_ready`, but that of `LIVE`, which never is.

        Args:
            name: Name of this process in error details.
            register: Adds the servicers.
            services: Full service names for reflection.

        Raises:
            OSError: The address cannot be bound.
        """
        server = grpc.aio.server(interceptors=[ErrorInterceptor(name)], options=server_options(max_request_bytes))
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        register(server)
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host}:{port}") from error
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
