"""Settings of a combined worker."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, TypeVar

from decode_worker.config import DecodeConfig
from prefill_worker.config import PrefillConfig
from shared.config import WorkerConfig, WorkerListen

Half = TypeVar("Half", bound=WorkerConfig)


@dataclass(frozen=True, kw_only=True)
class CombinedConfig(PrefillConfig, DecodeConfig):
    """Settings of a combined worker, parsed once from the command line: those of both halves, the common ones once."""

    roles: ClassVar[tuple[str, ...]] = (*PrefillConfig.roles, *DecodeConfig.roles)

    name: str = "combined-0"
    """Name of the process in logs; its halves are NAME-prefill and NAME-decode in placements and metrics."""
    listen: WorkerListen = field(default_factory=WorkerListen)
    """Where the prefill half listens."""
    decode_listen: WorkerListen = field(default_factory=WorkerListen)
    """Where the decode half listens."""

    def __post_init__(self) -> None:
        # every half checks its own
        self.prefill()
        self.decode()

    def prefill(self) -> PrefillConfig:
        """The settings of the prefill half."""
        return self._half(PrefillConfig, "prefill", self.listen)

    def decode(self) -> DecodeConfig:
        """The settings of the decode half."""
        return self._half(DecodeConfig, "decode", self.decode_listen)

    def _half(self, kind: type[Half], role: str, listen: WorkerListen) -> Half:
        settings = {field.name: getattr(self, field.name) for field in fields(kind)}
        return kind(**{**settings, "name": f"{self.name}-{role}", "listen": listen})
