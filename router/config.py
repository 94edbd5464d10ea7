"""Configuration of a router."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from router.admission.api_tokens import read_tokens
from router.admission.tenants import TenantLimits
from router.admission.waiting import RoomLimits
from router.http_extra import http_server
from router.placement.catalogue import POLICIES, PlacementName
from shared.config import ServiceConfig, check_port
from shared.flags import COMPRESSION, FAILURES, HTTP, LIMITS, NETWORK, PLACEMENT, SECURITY, TELEMETRY
from shared.registry.location import open_registry
from shared.rpc.identity import ROUTER
from shared.rpc.options import MIB

STAGE_TIMEOUTS = ("prefill_timeout_s", "transfer_timeout_s", "token_timeout_s")

URL_HOST = re.compile(r"[A-Za-z0-9._-]+(?::[0-9]{1,5})?")

NOT_NEGATIVE = (
    "max_failovers",
    "drain_s",
    "slow_start_s",
    "comeback_s",
    "max_waiting",
    "max_waiting_mib",
    "tenant_concurrency",
    "tenant_rate",
)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(ServiceConfig):
    """Everything that a router can be told."""

    roles: ClassVar[tuple[str, ...]] = (ROUTER,)

    registry: Annotated[str, NETWORK]
    """Where the workers are: static://host:port,host:port, or where they publish themselves:
    redis://[user@]host:port[/db][?prefix=...], rediss:// for TLS. A password is best left to VLCACHE_REDIS_PASSWORD."""
    http_port: Annotated[int | None, HTTP] = None
    """Port of OpenAI's chat API over HTTP, on `--host`; 0 picks a free one, and without it there is none.
    Needs the extra `http`."""
    http_timeout_s: Annotated[float, HTTP] = 600.0
    """Seconds that a request over HTTP may take in all; its client has no way to say so itself."""
    image_url_hosts: Annotated[tuple[str, ...], HTTP] = ()
    """Hosts from which images are fetched that requests over HTTP name by URL, each `name` or `name:port`; never from
    addresses that are not public. Without any, images come in data: URIs alone."""
    ui: Annotated[bool, HTTP] = False
    """Serve a page at /ui of the HTTP port, on which people ask about images and see what was kept of them."""
    api_tokens: Annotated[Path | None, SECURITY] = None
    """File of the tokens that clients need, one per line: a tenant, and the SHA-256 of a token in hexadecimal. It is
    read again when it changes. Absent, everybody who can connect is a client."""
    demand_client_cert: Annotated[bool, SECURITY] = False
    """Let only clients connect that have a certificate of the CA; needs TLS."""
    name: Annotated[str, NETWORK] = "router"
    """Name of this process in logs, metrics and error details."""
    placement: Annotated[PlacementName, PLACEMENT] = "least_loaded"
    """How the workers of a request are chosen: the pair on which it costs least, the better of two random workers, the
    one that may still know its image, or everybody in turn."""
    slow_start_s: Annotated[float, PLACEMENT] = 10.0
    """Seconds over which a worker that comes or comes back is given a growing share of the requests; 0: all at once."""
    poll_interval_s: Annotated[float, FAILURES] = 1.0
    """Seconds between two looks at a worker."""
    poll_timeout_s: Annotated[float, FAILURES] = 5.0
    """Seconds after which a worker that does not say who it is counts as unreachable."""
    control_timeout_s: Annotated[float, FAILURES] = 5.0
    """Seconds that a reservation, a release or the end of a finished prompt's transfer report may take."""
    prefill_timeout_s: Annotated[float, FAILURES] = 120.0
    """Seconds a prefill worker may take from a prompt's dispatch to its compression before it counts as lost to it.
    They begin anew whenever it has computed another prompt: a queue that moves on is no sign of trouble."""
    transfer_timeout_s: Annotated[float, FAILURES] = 30.0
    """Seconds that a parcel's transfer, or a repeated one, may take before one end of it counts as lost."""
    token_timeout_s: Annotated[float, FAILURES] = 10.0
    """Seconds that a worker may say nothing to its requests, neither tokens nor events, while it fails its polls as
    well; then it counts as lost."""
    max_failovers: Annotated[int, FAILURES] = 4
    """Failures of workers that a request survives by going on at others; 0: the first one ends it."""
    queue_timeout_s: Annotated[float, LIMITS] = 30.0
    """Seconds that a request waits for decode memory before it is refused."""
    comeback_s: Annotated[float, FAILURES] = 5.0
    """Seconds that a request that has lost a worker waits for another one where none is ready, before it is lost as
    well; new ones are refused at once."""
    max_waiting: Annotated[int, LIMITS] = 256
    """Requests per model that may wait for decode memory; further ones are refused at once."""
    max_waiting_mib: Annotated[int, LIMITS] = 512
    """MiB of requests, images included, that may wait per model; further ones are refused at once."""
    tenant_concurrency: Annotated[int, LIMITS] = 0
    """Requests that each tenant may have in flight at this router, those that wait included; 0 limits nothing. A tenant
    is whose token a request has; without `--api-tokens` what its metadata says (`vlcache-tenant`), which is trusted."""
    tenant_rate: Annotated[float, LIMITS] = 0.0
    """Requests per second that each tenant may send to this router; 0 limits nothing."""
    tenant_burst: Annotated[int, LIMITS] = 10
    """Requests that a tenant may send at once after a rest, where `--tenant-rate` limits it."""
    min_retention: Annotated[float, COMPRESSION] = 1.0
    """How far the retention of a request that names no floor of its own may be lowered while decode memory is short, in
    (0, 1]; 1 lowers none. Requests that keep everything are spared."""
    shadow_share: Annotated[float, TELEMETRY] = 0.0
    """Share of the finished requests, in [0, 1], that is answered once more at retention 1 while no client needs the
    memory, to measure how many tokens compression changed."""
    trace_share: Annotated[float, TELEMETRY] = 1.0
    """Share of the requests, in [0, 1], that are traced where `--otlp-endpoint` is given. A request that comes with its
    client's trace is part of that, or is not traced, as the client says."""

    @property
    def room_limits(self) -> RoomLimits:
        """What may wait."""
        return RoomLimits(requests=self.max_waiting, num_bytes=self.max_waiting_mib * MIB)

    @property
    def tenant_limits(self) -> TenantLimits:
        """What a tenant may ask for."""
        return TenantLimits(concurrency=self.tenant_concurrency, rate=self.tenant_rate, burst=self.tenant_burst)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_callers()
        self._check_http()
        for name in (
            *STAGE_TIMEOUTS,
            "http_timeout_s",
            "poll_interval_s",
            "poll_timeout_s",
            "control_timeout_s",
            "queue_timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            # false for nan as well
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        self._check_bounds()
        open_registry(self.registry)

    def _check_bounds(self) -> None:
        if self.tenant_burst < 1:
            raise ValueError(f"tenant_burst must be at least 1, not {self.tenant_burst}")
        if not 0 < self.min_retention <= 1:
            raise ValueError(f"min_retention must lie in (0, 1], not {self.min_retention}")
        for name in ("shadow_share", "trace_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.placement not in POLICIES:
            raise ValueError(f"placement must be one of {', '.join(POLICIES)}, not {self.placement!r}")
        if not self.name:
            raise ValueError("name must not be empty")

    def _check_http(self) -> None:
        if self.http_port is not None:
            check_port(self.http_port)
            http_server()
        elif self.ui:
            raise ValueError("ui needs --http-port")
        for host in self.image_url_hosts:
            if not URL_HOST.fullmatch(host):
                raise ValueError(f"image_url_hosts are names like images.example.org or host:8080, not {host!r}")

    def _check_callers(self) -> None:
        if self.demand_client_cert and self.tls_ca is None:
            raise ValueError("demand_client_cert needs --tls-cert, --tls-key and --tls-ca")
        if self.api_tokens is not None:
            read_tokens(self.api_tokens)
