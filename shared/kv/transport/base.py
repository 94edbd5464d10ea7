"""What every transport does: bring one parcel from a prefill worker's arena into a decode worker's pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.kv.arena import Slot
from shared.kv.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """The immutable compressed KV of one prompt, lying in a slot of the sender's arena."""

    manifest: Manifest
    body: memoryview
    slot: Slot


@dataclass(frozen=True, kw_only=True)
class SendReport:
    """What a finished transfer cost."""

    transport: str
    sent_bytes: int
    """Bytes handed to the transport: body, manifest and framing."""
    seconds: float


class ParcelTransport(Protocol):
    """Called by the prefill worker's sender, on its event loop, for each reservation that is to have a parcel.

    When `send` returns, the decode worker has installed the whole parcel and does not need the slot any more. When
    it raises (or is cancelled), nothing of the parcel was installed. It only reads the body: others may send the same
    parcel meanwhile, and it can be sent again.
    """

    name: str

    async def send(self, parcel: Parcel, token: bytes) -> SendReport:
        """Sends one parcel under a reservation's secret.

        Raises:
            ServiceError: The decode worker refused, or cannot be reached.
        """
