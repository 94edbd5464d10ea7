"""What competes, by name, and how the sender's process calls the receiver's."""

from __future__ import annotations

import enum
from dataclasses import dataclass

SERVICE = "benchmarks.Transfer"
RESERVE, RELEASE, BARE, TOKENS = (f"/{SERVICE}/{name}" for name in ("Reserve", "Release", "Bare", "Tokens"))


class End(enum.Enum):
    """Where a delivery ends; the value is the request id of its reservation."""

    HAND_OVER = "hand-over"
    """In the receive buffer, every chunk verified; through shared memory, with its place in the arena checked."""
    INSTALL = "install"
    """In the KV pool, the digest verified."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the product delivers a parcel that lies in the arena, or is copied there first."""

    transport: str
    end: End
    copied_in: bool = False


RIVALS = ("memcpy", "tcp", "bare_grpc")
DELIVERIES = {
    "grpc": Delivery(transport="grpc", end=End.HAND_OVER),
    "grpc_installed": Delivery(transport="grpc", end=End.INSTALL),
    "memory_in_place": Delivery(transport="memory", end=End.HAND_OVER),
    "memory": Delivery(transport="memory", end=End.HAND_OVER, copied_in=True),
    "memory_installed": Delivery(transport="memory", end=End.INSTALL),
}
METHODS = (*RIVALS, *DELIVERIES)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One transfer: seconds of wall time, and of CPU time of either process."""

    method: str
    nbytes: int
    wall_s: float
    sender_cpu_s: float
    receiver_cpu_s: float
