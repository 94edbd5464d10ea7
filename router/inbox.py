"""What reaches a request, from both workers and from its own timers, in one line."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from vlcache.worker.v1 import decode_pb2, prefill_pb2

from shared.errors import ServiceError


@dataclass(frozen=True)
class PrefillEnded:
    """The last thing that is heard of a prefill call; no error means that it did all it had to."""

    error: ServiceError | None = None


Said: TypeAlias = "prefill_pb2.PrefillEvent | PrefillEnded | decode_pb2.SequenceUpdate | ServiceError"

# Who says it, and what: what is still in line of a source that was given up is passed over.
Inbox: TypeAlias = "asyncio.Queue[tuple[object, Said]]"
