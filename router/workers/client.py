"""Every call that the router makes on a worker, and nothing else: one channel, errors of the one tree."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
from vlcache.worker.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2

from shared.errors import (
    AbortedError,
    DeadlineExceededError,
    PermissionDeniedError,
    RequestCancelledError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from shared.rpc.identity import DECODE, PREFILL, Identity
from shared.rpc.line import Line
from shared.rpc.options import MAX_REQUEST_BYTES, client_options
from shared.rpc.status import from_rpc_error
from shared.telemetry.scope import current


class WorkerClient:
    """The line to one address. The worker behind it may be replaced by another without notice."""

    def __init__(
        self, address: str, *, poll_timeout_s: float, control_timeout_s: float, identity: Identity | None = None
    ) -> None:
        """Connects at the first call.

        Args:
            identity: Of the router; plaintext without one.
        """
        self.address = address
        self._poll_timeout_s = poll_timeout_s
        self._control_timeout_s = control_timeout_s
        self._identity = identity
        self._line = Line(address, client_options(MAX_REQUEST_BYTES), identity)
        self._stubs = _Stubs(self._line.channel())
        # the service that answered last comes first
        self._roles = [PREFILL, DECODE]
        self._proven: tuple[str, str] | None = None

    async def info(self) -> worker_pb2.WorkerInfo:
        """What the worker says about itself, whichever role it has.

        Raises:
            UnavailableError: It cannot be reached, does not answer in time, or is no worker at all.
        """
        for role in list(self._roles):
            stub = self._prefill if role == PREFILL else self._decode
            try:
                info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=self._poll_timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise _unanswered(error) from error
            else:
                self._roles.remove(role)
                self._roles.insert(0, role)
                await self._check_role(info)
                return info
        raise UnavailableError("what answers at this address is no worker", reason="NOT_A_WORKER")

    async def reserve(self, request: decode_pb2.ReserveRequest) -> decode_pb2.ReserveResponse:
        """Asks for decode memory.

        Raises:
            ResourceExhaustedError: There is none at present.
            UnavailableError: No answer.
            ServiceError: Whatever else the worker means.
        """
        try:
            metadata = current().span.metadata
            return await self._decode.Reserve(request, timeout=self._control_timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise _unanswered(error) from error

    async def release(self, token: bytes) -> None:
        """Gives a reservation or its sequence up. Idempotent.

        Raises:
            ServiceError: The worker did not confirm.
        """
        try:
            await self._decode.Release(decode_pb2.ReleaseRequest(token=token), timeout=self._control_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _unanswered(error) from error

    async def prefill(
        self, request: prefill_pb2.PrefillRequest, *, timeout_s: float | None
    ) -> AsyncGenerator[prefill_pb2.PrefillEvent, None]:
        """Runs a prompt. Cancelling the task that iterates, or closing the iterator, cancels the work.

        Raises:
            ServiceError: What the worker means.
        """
        call = self._prefill.Prefill(request, timeout=timeout_s, metadata=current().span.metadata)
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise _meant(error) from error
        finally:
            call.cancel()

    async def resend(self, request: prefill_pb2.ResendRequest, *, timeout_s: float) -> prefill_pb2.ResendResponse:
        """Has a retained parcel shipped once more.

        Raises:
            NotFoundError: It is gone.
            UnavailableError: No answer; reason WORKER_TIMEOUT where the time was over.
            ServiceError: Whatever else the worker means, in stage "transfer" where the decode worker did not take it.
        """
        try:
            return await self._prefill.Resend(request, timeout=timeout_s, metadata=current().span.metadata)
        except grpc.aio.AioRpcError as error:
            raise _unanswered(error) from error

    async def renew_parcels(self, parcels: Sequence[bytes]) -> Sequence[bytes]:
        """Extends the leases of retained parcels; those that are gone.

        Raises:
            ServiceError: The worker did not answer.
        """
        request = prefill_pb2.RenewParcelsRequest(parcels=parcels)
        try:
            return (await self._prefill.RenewParcels(request, timeout=self._control_timeout_s)).gone
        except grpc.aio.AioRpcError as error:
            raise _unanswered(error) from error

    async def release_parcels(self, parcels: Sequence[bytes]) -> None:
        """Gives retained parcels up. Idempotent.

        Raises:
            ServiceError: The worker did not confirm.
        """
        request = prefill_pb2.ReleaseParcelsRequest(parcels=parcels)
        try:
            await self._prefill.ReleaseParcels(request, timeout=self._control_timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _unanswered(error) from error

    def open_token_stream(self) -> Any:
        """Opens the bidirectional call that `router.workers.token_stream` reads and writes."""
        return self._decode.StreamTokens()

    async def close(self) -> None:
        """Closes the line; running calls are cancelled."""
        await self._line.close()

    @property
    def _prefill(self) -> Any:
        return self._current_stubs().prefill

    @property
    def _decode(self) -> Any:
        return self._current_stubs().decode

    def _current_stubs(self) -> _Stubs:
        channel = self._line.channel()
        if channel is not self._stubs.channel:
            self._stubs = _Stubs(channel)
        return self._stubs

    async def _check_role(self, info: worker_pb2.WorkerInfo) -> None:
        """A worker of one role must not be sent what is meant for another: prompts, or parcels. Asked once per boot."""
        who = (info.epoch, info.role)
        if self._identity is None or who == self._proven:
            return
        if info.role not in await self._identity.roles_at(self.address, timeout_s=self._poll_timeout_s):
            raise UnavailableError("the worker has no certificate of its role", reason="WORKER_ROLE")
        self._proven = who


class _Stubs:
    """Both services over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
        self.decode = decode_pb2_grpc.DecodeServiceStub(channel)


def _meant(error: grpc.aio.AioRpcError) -> ServiceError:
    meant = from_rpc_error(error)
    if isinstance(meant, RequestCancelledError):
        # our own client did not cancel: it must not be told that it did
        return AbortedError("the worker cancelled the call", reason="CANCELLED_BY_WORKER")
    if isinstance(meant, (PermissionDeniedError, UnauthenticatedError)):
        # it is this router that may not, whatever its client may
        return UnavailableError("the worker does not take calls of this router", reason="WORKER_REFUSES")
    return meant


def _unanswered(error: grpc.aio.AioRpcError) -> ServiceError:
    """For calls whose time limit is ours, not the client's."""
    meant = _meant(error)
    if isinstance(meant, DeadlineExceededError):
        return UnavailableError("the worker did not answer in time", reason="WORKER_TIMEOUT")
    return meant
