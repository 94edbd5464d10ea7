"""What the configurations of all services share. Parsed once in `__main__`; nothing below reads the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import tyro

Config = TypeVar("Config")


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


def parse_config(config: type[Config], description: str) -> Config:
    """Builds a configuration from the command line; a bad value ends the process with a sentence and code 2."""
    try:
        return tyro.cli(config, description=description, config=(tyro.conf.FlagConversionOff,))
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
