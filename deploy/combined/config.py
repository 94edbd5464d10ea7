"""Settings of a combined worker."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from shared.config import WorkerConfig
from shared.flags import NETWORK

Half = TypeVar("Half", bound=WorkerConfig)


@dataclass(frozen=True, kw_only=True)
class CombinedConfig(PrefillConfig, DecodeConfig):
    """Settings of a combined worker, parsed once from the command line: those of both halves, the common ones once.

    Each half has ports of its own, on one host: `port`, `metrics_port` and `advertise` are the prefill half's.
    """

    roles: ClassVar[tuple[str, ...]] = (*PrefillConfig.roles, *DecodeConfig.roles)

    name: Annotated[str, NETWORK] = "combined-0"
    """Name of the process in logs; its halves are NAME-prefill and NAME-decode in placements and metrics."""
    decode_port: Annotated[int, NETWORK] = 0
    """gRPC port of the decode half, where `--port` is the prefill half's; 0 picks a free one."""
    decode_metrics_port: Annotated[int, NETWORK] = 0
    """HTTP port of the decode half's /metrics; 0 picks a free one."""
    decode_advertise: Annotated[str, NETWORK] = ""
    """host:port of the decode half that is written to the registry, as `--advertise` is that of the prefill half."""

    def __post_init__(self) -> None:
        # every half checks its own
        self.prefill()
        self.decode()

    def prefill(self) -> PrefillConfig:
        """The settings of the prefill half."""
        return self._half(PrefillConfig, "prefill")

    def decode(self) -> DecodeConfig:
        """The settings of the decode half."""
        return self._half(
            DecodeConfig,
            "decode",
            port=self.decode_port,
            metrics_port=self.decode_metrics_port,
            advertise=self.decode_advertise,
        )

    def _half(self, kind: type[Half], role: str, **own: Any) -> Half:
        settings = {field.name: getattr(self, field.name) for field in fields(kind)}
        return kind(**{**settings, "name": f"{self.name}-{role}", **own})
