"""The way of a complete parcel: to the decode worker of its request, and to another one where that was lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from prefill_worker.job import Event, PrefillJob, Retained, Transferred
from prefill_worker.kv_sender import KVSender, Ticket
from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.parcel.room import ParcelRoom
from shared.errors import ServiceError, at_stage
from shared.kv.manifest import Manifest
from shared.kv.transport.base import Parcel
from shared.kv.transport.early_stream import EarlyStream
from shared.telemetry.metrics import PrefillMetrics


class ParcelShipper:
    """Sends parcels and leaves them retained. Lives on the event loop."""

    def __init__(self, sender: KVSender, retained: RetainedParcels, metrics: PrefillMetrics) -> None:
        self._sender = sender
        self._retained = retained
        self._metrics = metrics

    async def ship(
        self,
        room: ParcelRoom,
        manifest: Manifest,
        job: PrefillJob,
        emit: Callable[[Event | None], None],
        early: EarlyStream | None = None,
    ) -> None:
        """Sends what lies in `room` for the first time. It stays retained, whether that works or not.

        When the caller is cancelled, it goes at once: nobody is left who would ask for it.

        Args:
            job: Whose ticket it is sent by and whose secret it is retained under.
            early: Where a part of it has left already, perhaps.

        Raises:
            ServiceError: The transfer failed.
        """
        parcel = room.parcel(manifest)
        if not self._retained.retain(job.parcel, parcel, time.monotonic()):
            emit(await self._send(parcel, job.ticket, early))
            return
        room.hand_over()
        emit(Retained(lease_s=self._retained.lease_s))
        with self._retained.sending(job.parcel, time.monotonic()):
            try:
                emit(await self._send(parcel, job.ticket, early))
            except asyncio.CancelledError:
                self._retained.release(job.parcel)
                raise

    async def resend(self, secret: bytes, attempt: int, ticket: Ticket) -> Transferred:
        """Sends a retained parcel under another reservation, whose attempt its manifest then names.

        Raises:
            NotFoundError: It is not retained any more.
            ServiceError: The transfer failed.
        """
        with at_stage("transfer"), self._retained.sending(secret, time.monotonic()) as parcel:
            self._metrics.labelled(self._metrics.resends, reason="failover").inc()
            transfer = replace(parcel.manifest.transfer, attempt=attempt)
            again = replace(parcel, manifest=replace(parcel.manifest, transfer=transfer))
            async with self._sender.keep_alive(ticket):
                return await self._send(again, ticket)

    async def _send(self, parcel: Parcel, ticket: Ticket, early: EarlyStream | None = None) -> Transferred:
        try:
            report = await self._sender.send(parcel, ticket, early)
        except ServiceError as error:
            # whatever the decode worker calls it: by this the router knows whom it has lost
            error.stage, error.worker = "transfer", ticket.decode_worker
            raise
        self._metrics.observe_stage(
            "transfer",
            report.seconds,
            transport=report.transport,
            sent_bytes=report.sent_bytes,
            decode_worker=ticket.decode_worker,
        )
        return Transferred(transport=report.transport, sent_bytes=report.sent_bytes, seconds=report.seconds)
