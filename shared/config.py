"""What the configurations of all services share. Parsed once in `__main__`; nothing below reads the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import tyro

from shared.registry.address import split_address
from shared.registry.location import open_listing
from shared.rpc.security import Security
from shared.telemetry.logs import LogFormat, LogLevel
from shared.telemetry.tracer import check_endpoint

Config = TypeVar("Config")

WILDCARDS = ("0.0.0.0", "[::]", "::")  # noqa: S104 - to refuse telling others to connect to them


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where a service listens."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: int = 0
    """gRPC port; 0 picks a free one."""
    metrics_port: int = 0
    """HTTP port of /metrics; 0 picks a free one."""

    def __post_init__(self) -> None:
        for port in (self.port, self.metrics_port):
            if not 0 <= port <= 65535:
                raise ValueError(f"a port lies between 0 and 65535, not {port}")


@dataclass(frozen=True, kw_only=True)
class WorkerListen(Listen):
    """Where a worker listens, and where others find it."""

    advertise: str = ""
    """host:port that is written to the registry, port 0 for the bound one; the bound address when empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advertise:
            split_address(self.advertise, lowest_port=0)

    def advertised(self, bound: str) -> str:
        """The address that others are told, of a server that listens at `bound`."""
        host, port = split_address(self.advertise or bound, lowest_port=0)
        return f"{host}:{port or split_address(bound)[1]}"


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(Security):
    """What every service is told."""

    log_level: LogLevel = "INFO"
    """What is logged to stderr; DEBUG tells more of this service's own code, and of no library."""
    log_format: LogFormat = "text"
    """Lines for people, or one JSON object per line."""
    otlp_endpoint: str = ""
    """Where traces go, over OTLP/gRPC: host:port or http://host:port in plaintext, https://host:port over TLS; nothing
    is traced when empty. Needs the extra `traces`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.otlp_endpoint:
            check_endpoint(self.otlp_endpoint)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ServiceConfig):
    """What every kind of worker is told."""

    model: str
    """Checkpoint: a directory, or a Hugging Face hub id."""
    revision: str = ""
    """Branch, tag or commit of a hub id, the same on all workers; its main branch when empty."""
    model_name: str = ""
    """Name under which clients ask for the model; the checkpoint's own name when empty."""
    listen: WorkerListen = field(default_factory=WorkerListen)
    """Where to listen."""
    registry: str = ""
    """Where the worker publishes itself: redis://[user@]host:port[/db][?prefix=...], or rediss:// for TLS; empty when
    routers have a static list. A password is best left to VLCACHE_REDIS_PASSWORD."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of weights and KV, the same on all workers; auto is bf16 on a GPU or an AMX machine, else fp32."""
    device: str = "cpu"
    """torch device, such as cpu or cuda:0; decode keeps KV in slabs on a CPU, in blocks on a GPU."""
    threads: int = 0
    """torch threads of each role in the process; 0 leaves torch's own choice."""
    drain_s: float = 30.0
    """Time that running requests get to finish at SIGTERM, seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_host(self.listen.host)
        if self.registry:
            open_listing(self.registry)
            if self.listen.host in WILDCARDS and not self.listen.advertise:
                raise ValueError(f"nobody can connect to {self.listen.host}: tell others where with --listen.advertise")


def parse_config(config: type[Config], description: str) -> Config:
    """Builds a configuration from the command line; a bad value ends the process with a sentence and code 2."""
    try:
        return tyro.cli(config, description=description, config=(tyro.conf.FlagConversionOff,))
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
