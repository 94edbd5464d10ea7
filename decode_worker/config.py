"""Settings of a decode worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from shared.config import WorkerConfig
from shared.flags import FAILURES, LIMITS, MEMORY, NETWORK
from shared.rpc.identity import DECODE


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """Settings of a decode worker, parsed once from the command line. Only the checkpoint's language model is read."""

    roles: ClassVar[tuple[str, ...]] = (DECODE,)

    name: Annotated[str, NETWORK] = "decode-0"
    """Name of this worker in placements, metrics and logs."""
    kv_memory_mib: Annotated[int, MEMORY] = 512
    """Memory for KV on the device, MiB; allocated once at start."""
    block_size: Annotated[int, MEMORY] = 16
    """Tokens in a block of KV on a GPU."""
    promised_tokens: Annotated[int | None, MEMORY] = None
    """New tokens whose room a reservation includes; without it all that a request may generate. A small number admits
    more sequences; one that outgrows it waits outside the pool for room, together with the youngest when it is full."""
    transport: Annotated[Literal["auto", "grpc"], NETWORK] = "auto"
    """auto takes parcels through memory from a prefill worker in the same process or on the same host; grpc never."""
    max_num_seqs: Annotated[int, LIMITS] = 64
    """Sequences in one step at most; more wait their turn."""
    lease_s: Annotated[float, FAILURES] = 30.0
    """Life of a reservation without renewal, seconds."""
    step_timeout_s: Annotated[float, FAILURES] = 30.0
    """A worker whose step takes longer fails its polls until the step has ended, so that routers give it up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kv_memory_mib", "max_num_seqs", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.step_timeout_s <= 0:
            raise ValueError(f"step_timeout_s must be greater than 0, not {self.step_timeout_s}")
        if self.promised_tokens is not None and self.promised_tokens < 1:
            raise ValueError(f"promised_tokens must be at least 1, not {self.promised_tokens}")
