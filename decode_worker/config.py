"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.config import Listen


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings of a decode worker, parsed once from the command line."""

    model: str
    """Checkpoint: a directory, or a Hugging Face hub id. Only its language model is read."""
    model_name: str = ""
    """Name under which clients ask for the model; the checkpoint's own name when empty."""
    name: str = "decode-0"
    """Name of this worker in placements, metrics and logs."""
    listen: Listen = field(default_factory=Listen)
    """Where to listen."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of weights and KV; must be that of the prefill workers."""
    device: str = "cpu"
    """torch device; on the CPU the KV lies in slabs, on a GPU in blocks."""
    threads: int = 0
    """torch threads; 0 leaves torch's own choice."""
    kv_memory_mib: int = 512
    """Memory for KV on the device, MiB; allocated once at start."""
    block_size: int = 16
    """Tokens in a block of KV on a GPU."""
    promised_tokens: int | None = None
    """New tokens whose room a reservation includes; without it all that a request may generate. A small number admits
    more sequences; one that outgrows it waits outside the pool for room, together with the youngest when it is full."""
    transport: Literal["auto", "grpc"] = "auto"
    """auto maps the arena of a prefill worker on the same host; grpc never does."""
    max_batch: int = 64
    """Sequences in one step at most; more wait their turn."""
    lease_s: float = 30.0
    """Life of a reservation without renewal, seconds."""
    drain_s: float = 30.0
    """Time that running sequences get to finish at SIGTERM, seconds."""

    def __post_init__(self) -> None:
        for name in ("kv_memory_mib", "max_batch", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.promised_tokens is not None and self.promised_tokens < 1:
            raise ValueError(f"promised_tokens must be at least 1, not {self.promised_tokens}")
