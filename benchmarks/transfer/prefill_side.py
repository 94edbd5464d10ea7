"""What a prefill worker owns besides its model: the real arena, its socket and the real sender."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from benchmarks.transfer.methods import RELEASE, RESERVE, Delivery, End
from benchmarks.transfer.parcels import LAYOUT, MODEL, describe, random_body
from prefill_worker.kv_sender import KVSender, Ticket
from shared.kv.arena import Arena
from shared.kv.arena_socket import ArenaServer
from shared.kv.extents import ALIGNMENT
from shared.kv.manifest import TransferId
from shared.kv.transport.base import Parcel
from shared.rpc.lifecycle import new_epoch
from shared.telemetry.metrics import PrefillMetrics

LEASE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """One parcel, ready in the arena, and the same bytes in ordinary warm memory: `source`, uint8 [nbytes]."""

    tokens: int
    source: np.ndarray
    parcels: dict[End, Parcel]

    @property
    def nbytes(self) -> int:
        """Bytes of the body."""
        return len(self.source)

    @property
    def slot(self) -> np.ndarray:
        """The place of the parcel in the arena, writable."""
        return np.frombuffer(self.parcels[End.HAND_OVER].body, dtype=np.uint8)


class PrefillSide:
    """Delivers parcels of `sizes` (kept tokens) to one decode side. Lives on the event loop."""

    def __init__(self, directory: Path, address: str, sizes: list[int]) -> None:
        self._epoch = new_epoch()
        self._address = address
        self._arena = Arena(sum(LAYOUT.full_bytes(tokens) + ALIGNMENT for tokens in sizes))
        self._socket = ArenaServer.start(directory, "transfer", self._arena, self._epoch)
        self._sender = KVSender(epoch=self._epoch, metrics=PrefillMetrics(worker="transfer", model=MODEL))
        self._control = grpc.aio.insecure_channel(address)
        self.loads = [self._load(tokens) for tokens in sizes]

    async def close(self) -> None:
        """Closes channels and socket."""
        await self._sender.close()
        await self._control.close()
        await self._socket.stop()
        self._arena.close()

    @asynccontextmanager
    async def reserved(self, load: Load, delivery: Delivery) -> AsyncIterator[Ticket]:
        """A reservation, released at the end."""
        wanted = {
            "end": delivery.end.value,
            "tokens": load.tokens,
            "epoch": self._epoch,
            "socket": str(self._socket.path) if delivery.transport == "memory" else "",
        }
        token = await self._control.unary_unary(RESERVE)(json.dumps(wanted).encode())
        yield Ticket(
            decode_worker="", address=self._address, token=token, transport=delivery.transport, lease_s=LEASE_S
        )
        await self._control.unary_unary(RELEASE)(token)

    async def deliver(self, load: Load, delivery: Delivery, ticket: Ticket) -> None:
        """What is measured: the copy into the arena where there is one, and the product's own sending."""
        if delivery.copied_in:
            np.copyto(load.slot, load.source)
        await self._sender.send(load.parcels[delivery.end], ticket)

    def _load(self, tokens: int) -> Load:
        source = random_body(tokens)
        slot = self._arena.allocate(len(source))
        assert slot is not None
        body = self._arena.view(slot, len(source))
        body[:] = source.data
        manifest = describe(body, self._epoch)
        parcels = {}
        for end in End:
            transfer = TransferId(request_id=end.value, attempt=0, prefill_epoch=self._epoch)
            parcels[end] = Parcel(manifest=dataclasses.replace(manifest, transfer=transfer), body=body, slot=slot)
        return Load(tokens=tokens, source=source, parcels=parcels)
