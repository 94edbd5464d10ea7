"""`python -m shared.rpc.probe`: whether a process serves, as grpc.health.v1 has it. For health checks of containers."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.command_line import parse_config
from shared.rpc.identity import channel_credentials
from shared.rpc.security import Tls
from shared.rpc.server import SERVING


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Tls):
    """Whom to ask, and in which name: a process with certificates answers to those of its CA."""

    address: str = "127.0.0.1:50051"
    """host:port of the process; by default the port at which the images listen."""
    timeout_s: float = 4.0
    """Seconds that it may take to answer."""


def probe(config: ProbeConfig) -> None:
    """Returns when the process serves.

    Raises:
        SystemExit: It does not, or does not answer; the text says which.
    """
    with contextlib.closing(_channel(config)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=config.timeout_s
            )
        except grpc.RpcError as error:
            raise SystemExit(f"{config.address}: {error.code().name}") from error
    if answer.status != SERVING:
        raise SystemExit(f"{config.address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def _channel(config: ProbeConfig) -> grpc.Channel:
    identity = config.identity()
    if identity is None:
        return grpc.insecure_channel(config.address)
    return grpc.secure_channel(config.address, channel_credentials(identity.current()))


if __name__ == "__main__":
    probe(parse_config(ProbeConfig, "Asks a process whether it serves; exits with 0 if it does."))
