"""What the configurations of all services share. Parsed once in `__main__`; nothing below reads the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.flags import COMPUTE, FAILURES, MODEL, NETWORK, TELEMETRY
from shared.registry.address import split_address
from shared.registry.location import open_listing
from shared.rpc.security import Security
from shared.telemetry.logs import LogFormat, LogLevel
from shared.telemetry.tracer import check_endpoint

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

WILDCARDS = ("0.0.0.0", "[::]", "::")  # noqa: S104 - to refuse telling others to connect to them


def check_port(port: int) -> None:
    """Raises ValueError where there is no such port."""
    if not 0 <= port <= 65535:
        raise ValueError(f"a port lies between 0 and 65535, not {port}")


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where a worker listens, and where others find it."""

    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    advertise: str = ""
    """host:port that others are told, port 0 for the bound one; the bound address when empty."""

    def __post_init__(self) -> None:
        if self.advertise:
            split_address(self.advertise, lowest_port=0)

    def advertised(self, bound: str) -> str:
        """The address that others are told, of a server that listens at `bound`."""
        host, port = split_address(self.advertise or bound, lowest_port=0)
        return f"{host}:{port or split_address(bound)[1]}"


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(Security):
    """What every service is told."""

    host: Annotated[str, NETWORK] = "127.0.0.1"
    """Address to bind. Others than loopback take certificates, or `--allow-plaintext`."""
    port: Annotated[int, NETWORK] = 0
    """gRPC port; 0 picks a free one."""
    metrics_port: Annotated[int, NETWORK] = 0
    """HTTP port of /metrics; 0 picks a free one."""
    log_level: Annotated[LogLevel, TELEMETRY] = "INFO"
    """What is logged to stderr; DEBUG tells more of this service's own code, and of no library."""
    log_format: Annotated[LogFormat, TELEMETRY] = "text"
    """Lines for people, or one JSON object per line."""
    otlp_endpoint: Annotated[str, TELEMETRY] = ""
    """Where traces go, over OTLP/gRPC: host:port or http://host:port in plaintext, https://host:port over TLS; nothing
    is traced when empty. Needs the extra `traces`."""
    drain_s: Annotated[float, FAILURES] = 30.0
    """Time that running requests get to finish at SIGTERM or SIGINT, seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_host(self.host)
        check_port(self.port)
        check_port(self.metrics_port)
        if self.otlp_endpoint:
            check_endpoint(self.otlp_endpoint)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ServiceConfig):
    """What every kind of worker is told."""

    model: Annotated[str, MODEL]
    """Checkpoint: a directory, or a Hugging Face hub id."""
    revision: Annotated[str, MODEL] = ""
    """Branch, tag or commit of a hub id; its main branch when empty."""
    served_model_name: Annotated[str, MODEL] = ""
    """Name under which clients ask for the model; the checkpoint's own name when empty."""
    dtype: Annotated[Dtype, MODEL] = "auto"
    """Precision of weights and KV; auto is bfloat16 on a GPU or an AMX machine, else float32."""
    max_model_len: Annotated[int | None, MODEL] = None
    """Tokens of prompt and answer together; the model's own limit when absent, which is also the most. Workers with
    different ones are never paired."""
    advertise: Annotated[str, NETWORK] = ""
    """host:port that is written to the registry, port 0 for the bound one; the bound address when empty."""
    registry: Annotated[str, NETWORK] = ""
    """Where the worker publishes itself: redis://[user@]host:port[/db][?prefix=...], or rediss:// for TLS; empty when
    routers have a static list. A password is best left to VLCACHE_REDIS_PASSWORD."""
    device: Annotated[str, COMPUTE] = "cpu"
    """torch device, such as cpu or cuda:0; decode keeps KV in slabs on a CPU, in blocks on a GPU."""
    threads: Annotated[int, COMPUTE] = 0
    """torch threads of each role in the process; 0 leaves torch's own choice."""

    @property
    def listen(self) -> Listen:
        """Where to listen."""
        return Listen(host=self.host, port=self.port, metrics_port=self.metrics_port, advertise=self.advertise)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, not {self.max_model_len}")
        listen = self.listen
        if self.registry:
            open_listing(self.registry)
            if listen.host in WILDCARDS and not listen.advertise:
                raise ValueError(f"nobody can connect to {listen.host}: tell others where with --advertise")
