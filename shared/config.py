"""What the configurations of all services share. Parsed once in `__main__`; nothing below reads the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

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


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What every kind of worker is told."""

    model: str
    """Checkpoint: a directory, or a Hugging Face hub id."""
    model_name: str = ""
    """Name under which clients ask for the model; the checkpoint's own name when empty."""
    listen: Listen = field(default_factory=Listen)
    """Where to listen."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of weights and KV, the same on all workers; auto is bf16 on a GPU or an AMX machine, else fp32."""
    device: str = "cpu"
    """torch device, such as cpu or cuda:0; decode keeps KV in slabs on a CPU, in blocks on a GPU."""
    threads: int = 0
    """torch threads of each role in the process; 0 leaves torch's own choice."""
    drain_s: float = 30.0
    """Time that running requests get to finish at SIGTERM, seconds."""


def parse_config(config: type[Config], description: str) -> Config:
    """Builds a configuration from the command line; a bad value ends the process with a sentence and code 2."""
    try:
        return tyro.cli(config, description=description, config=(tyro.conf.FlagConversionOff,))
    except ValueError as error:
        raise SystemExit(f"configuration error: {error}") from error
