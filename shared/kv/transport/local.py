"""The hand-over inside one process: prefill and decode share the memory, nothing travels."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from shared.kv.manifest import Manifest
from shared.kv.transport.base import Parcel, SendReport


class LocalReceiver(Protocol):
    """The decode half of a combined worker; its prefill half calls it, on the event loop that both live on."""

    async def take(self, token: bytes, manifest: Manifest, body: memoryview) -> None:
        """Installs a parcel under a reservation's secret: whole or not at all.

        `body` is read until this returns, or until its cancellation has come through. The digest is not compared:
        nobody else can write to the slot meanwhile, and nothing was carried.

        Raises:
            ServiceError: The parcel is refused.
        """

    def grow(self, token: bytes, kept_tokens_bound: int) -> None:
        """Promises room for a parcel of at most `kept_tokens_bound` tokens per layer that has not begun to arrive.

        Raises:
            NotFoundError: The reservation has ended.
            ResourceExhaustedError: There is no room; what was promised stays.
        """

    def renew(self, token: bytes) -> None:
        """Extends the lease of a reservation.

        Raises:
            NotFoundError: It has ended.
        """


class LocalTransport:
    """Hands parcels to the decode half of the same process."""

    name = "local"

    def __init__(self, receiver: LocalReceiver) -> None:
        self._receiver = receiver

    async def send(self, parcel: Parcel, token: bytes) -> SendReport:
        """See `ParcelTransport.send`; nothing is sent, so no byte is counted."""
        started = time.monotonic()
        # a task of its own: who ends the reservation cancels the delivery, not the sender's whole request
        await asyncio.create_task(self._receiver.take(token, parcel.manifest, parcel.body))
        return SendReport(transport=self.name, sent_bytes=0, seconds=time.monotonic() - started)
