"""Keeps reservations alive and ships parcels: one channel per decode worker, none to the own process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass

import grpc
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.parcel.early_rows import rest_of
from shared.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    RequestCancelledError,
    ServiceError,
    UnavailableError,
)
from shared.kv.transport.base import Parcel, ParcelTransport, SendReport
from shared.kv.transport.early_stream import EarlyStream
from shared.kv.transport.grpc_stream import GrpcTransport
from shared.kv.transport.local import LocalReceiver, LocalTransport
from shared.kv.transport.memory import MemoryTransport
from shared.registry.address import split_address
from shared.rpc.identity import Identity
from shared.rpc.line import Line
from shared.rpc.options import client_options
from shared.rpc.status import from_rpc_error
from shared.telemetry.metrics import PrefillMetrics

log = logging.getLogger(__name__)

# A lease of 30 s is renewed every 5 s: several renewals may be lost before it ends.
RENEWALS_PER_LEASE = 6
# The model thread waits for the answer: a worker that is late with it counts as full.
GROW_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A decode worker's promise to take a parcel; it ends `lease_s` after the last renewal.

    `promised_tokens` are the new tokens that have room at once, None where they all have.
    """

    decode_worker: str
    address: str
    token: bytes
    transport: str
    lease_s: float
    promised_tokens: int | None = None

    @classmethod
    def from_proto(cls, message: pb.Ticket) -> Ticket:
        """Reads a message.

        Raises:
            InvalidRequestError: The lease has no length, or nobody can be reached at such an address.
        """
        if not 0 < message.lease_s < math.inf:
            raise InvalidRequestError("a ticket needs a lease of some seconds", reason="LEASE")
        try:
            split_address(message.decode_address)
        except ValueError as error:
            raise InvalidRequestError(str(error), reason="ADDRESS") from error
        return cls(
            decode_worker=message.decode_worker,
            address=message.decode_address,
            token=message.token,
            transport=message.transport,
            lease_s=message.lease_s,
            promised_tokens=message.promised_tokens or None,
        )


class KVSender:
    """Lives on the event loop of the prefill worker.

    Args:
        epoch: Names the worker's arena.
        local: The decode half of the same process, where there is one.
        ships_early: Whether rows may leave while their prefill goes on, where they have to travel.
        identity: Of the process; plaintext without one.
    """

    def __init__(
        self,
        *,
        epoch: str,
        metrics: PrefillMetrics,
        local: LocalReceiver | None = None,
        ships_early: bool = False,
        identity: Identity | None = None,
    ) -> None:
        self._epoch = epoch
        self._ships_early = ships_early
        self._metrics = metrics
        self._local = local
        self._identity = identity
        self._lines: dict[str, Line] = {}

    @contextlib.asynccontextmanager
    async def early(self, ticket: Ticket, thread: Executor) -> AsyncIterator[EarlyStream | None]:
        """While open, rows of a parcel may leave before it is complete; None where they may not, or need not.

        Args:
            thread: Where their bytes are waited for.
        """
        if not self._ships_early or ticket.transport != GrpcTransport.name:
            yield None
            return
        stream = EarlyStream(self._channel(ticket.address), ticket.token, thread)
        try:
            yield stream
        finally:
            await stream.close()

    async def send(self, parcel: Parcel, ticket: Ticket, early: EarlyStream | None = None) -> SendReport:
        """Ships a parcel over the transport that was agreed on at the reservation; once more where bytes were lost.

        Args:
            early: Where a part of it has left already, perhaps.

        Raises:
            ServiceError: The decode worker refused, or cannot be reached.
        """
        try:
            return await self._send(parcel, ticket, early)
        except DataLossError:
            # a failed delivery leaves the reservation as it was
            self._metrics.labelled(self._metrics.resends, reason="data_loss").inc()
            return await self._send(parcel, ticket)

    async def grow(self, ticket: Ticket, kept_tokens_bound: int) -> bool:
        """Asks for room for a parcel of at most so many tokens per layer; False where it is refused or not granted in
        time, and what was promised before stays."""
        try:
            await self._grow(ticket, kept_tokens_bound)
        except ServiceError as error:
            log.info("%s gave no more room: %s", ticket.decode_worker, error.message)
            return False
        return True

    @contextlib.asynccontextmanager
    async def keep_alive(self, ticket: Ticket) -> AsyncIterator[None]:
        """While open, renews the reservation's lease, whatever the model thread is doing.

        A reservation that has ended ends nothing here: the parcel can still go to another decode worker.
        """
        renewal = asyncio.create_task(self._renew(ticket))
        try:
            yield
        finally:
            renewal.cancel()
            await asyncio.wait([renewal])

    async def close(self) -> None:
        """Closes all connections."""
        for line in self._lines.values():
            await line.close()
        self._lines.clear()

    async def _send(self, parcel: Parcel, ticket: Ticket, early: EarlyStream | None = None) -> SendReport:
        try:
            report = await self._deliver(parcel, ticket, early)
        except ServiceError as error:
            self._metrics.labelled(self._metrics.transfer_failures, reason=error.reason).inc()
            raise
        labels = {"transport": report.transport}
        self._metrics.labelled(self._metrics.transfer_bytes, **labels).inc(report.sent_bytes)
        self._metrics.labelled(self._metrics.transfer_seconds, **labels).observe(report.seconds)
        return report

    async def _deliver(self, parcel: Parcel, ticket: Ticket, early: EarlyStream | None) -> SendReport:
        try:
            if early is not None and early.begun:
                return await early.finish(parcel.manifest, rest_of(parcel, early.waves))
            return await self._transport(ticket).send(parcel, ticket.token)
        except RequestCancelledError as error:
            # not by us, who would not hear of it here: its server is going down
            raise UnavailableError("the decode worker broke the transfer off", reason="TRANSFER_BROKEN") from error

    async def _renew(self, ticket: Ticket) -> None:
        period_s = ticket.lease_s / RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(period_s)
            try:
                await self._renew_once(ticket, timeout_s=period_s)
            except NotFoundError:
                log.info("%s has ended the reservation", ticket.decode_worker)
                return
            except ServiceError as error:
                # a hiccup: the lease outlives several missed renewals
                log.warning("renewal at %s failed: %s", ticket.decode_worker, error.message)

    async def _renew_once(self, ticket: Ticket, *, timeout_s: float) -> None:
        if self._local is not None and ticket.transport == LocalTransport.name:
            self._local.renew(ticket.token)
            return
        stub = decode_pb2_grpc.DecodeServiceStub(self._channel(ticket.address))
        try:
            await stub.Renew(decode_pb2.RenewRequest(token=ticket.token), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def _grow(self, ticket: Ticket, kept_tokens_bound: int) -> None:
        if self._local is not None and ticket.transport == LocalTransport.name:
            self._local.grow(ticket.token, kept_tokens_bound)
            return
        stub = decode_pb2_grpc.DecodeServiceStub(self._channel(ticket.address))
        request = decode_pb2.GrowReservationRequest(token=ticket.token, kept_tokens_bound=kept_tokens_bound)
        try:
            await stub.GrowReservation(request, timeout=GROW_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    def _transport(self, ticket: Ticket) -> ParcelTransport:
        if self._local is not None and ticket.transport == LocalTransport.name:
            return LocalTransport(self._local)
        channel = self._channel(ticket.address)
        if ticket.transport == MemoryTransport.name:
            return MemoryTransport(channel, self._epoch)
        if ticket.transport == GrpcTransport.name:
            return GrpcTransport(channel)
        raise FailedPreconditionError(f"unknown transport {ticket.transport!r}", reason="TRANSPORT")

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._lines:
            self._lines[address] = Line(address, client_options(), self._identity)
        return self._lines[address].channel()
