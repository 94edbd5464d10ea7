"""The control plane's gRPC face of a decode worker: protobuf in, protobuf out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import decode_pb2 as pb
from vlcache.worker.v1 import decode_pb2_grpc, worker_pb2

from decode_worker.answers import FROM_THE_BEGINNING, Reservation, Stage
from decode_worker.arena_directory import ArenaDirectory
from decode_worker.kv_pool.base import KVPool
from decode_worker.reservations import Reservations
from decode_worker.runner import DecodeRunner
from decode_worker.scheduler import DecodeScheduler
from decode_worker.token_outbox import Subscription, TokenOutbox
from shared.errors import (
    FailedPreconditionError,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from shared.kv.arena import ArenaView
from shared.kv.transport.grpc_stream import GrpcTransport
from shared.kv.transport.local import LocalTransport
from shared.kv.transport.memory import MemoryTransport
from shared.model.identity import ModelIdentity
from shared.request.sampling import MAX_ANSWERS
from shared.telemetry.scope import Scope, enter, within
from shared.telemetry.span import Value
from shared.telemetry.tracer import NO_TRACER, Tracer
from shared.version import VERSION

SERVICE_NAME = "vlcache.worker.v1.DecodeService"


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Implements `DecodeService`."""

    def __init__(
        self,
        *,
        name: str,
        epoch: str,
        identity: ModelIdentity,
        pool: KVPool[Any, Any],
        reservations: Reservations,
        runner: DecodeRunner,
        scheduler: DecodeScheduler,
        arenas: ArenaDirectory | None,
        step_timeout_s: float,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._name = name
        self._epoch = epoch
        self._identity = identity
        self._pool = pool
        self._reservations = reservations
        self._runner = runner
        self._scheduler = scheduler
        self._arenas = arenas
        self._step_timeout_s = step_timeout_s
        self._tracer = tracer
        self._outboxes: set[TokenOutbox] = set()
        self._draining = False

    def start_draining(self) -> None:
        """From now on reservations are refused, and readers know that their sequences should go on elsewhere."""
        if not self._draining:
            self._draining = True
            for outbox in self._outboxes:
                outbox.announce_draining()

    async def GetWorkerInfo(  # noqa: N802
        self, request: worker_pb2.GetWorkerInfoRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerInfo:
        """See the proto file. A loop that turns says little of a model that hangs on its device."""
        if self._scheduler.pass_s > self._step_timeout_s:
            raise UnavailableError(f"a step has not ended after {self._scheduler.pass_s:.0f} s", reason="STEP_TIMEOUT")
        return self.info()

    def info(self) -> worker_pb2.WorkerInfo:
        """What the worker says about itself, to routers and in a registry."""
        held = {stage.value: self._reservations.bytes_in(stage) for stage in Stage}
        return worker_pb2.WorkerInfo(
            name=self._name,
            role="decode",
            epoch=self._epoch,
            state="draining" if self._draining else "ready",
            model=self._identity.to_proto(),
            requests_running=self._scheduler.running,
            requests_waiting=self._runner.waiting,
            kv=public.KVBytes(capacity=self._pool.capacity, **held),
            version=VERSION,
        )

    async def Reserve(  # noqa: N802
        self, request: pb.ReserveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReserveResponse:
        """See the proto file."""
        enter(Scope(request_id=request.request_id))
        self._check_reserve(request)
        promise, delivered = self._runner.promise, _delivered_tokens(request)
        new = (request.kept_tokens_bound, request.max_new_tokens, delivered)
        wanted = promise.wanted(*new, copies=request.copies)
        transport, arena = await self._choose_transport(request)
        reservation = self._reservations.reserve(
            request_id=request.request_id,
            attempt=request.attempt,
            prefill_epoch=request.prefill_epoch,
            wanted=wanted,
            max_new_tokens=request.max_new_tokens,
            delivered_tokens=delivered,
            arena=arena,
            now=time.monotonic(),
        )
        reservation.scope = self._scope_of(request, context, transport=transport)
        return pb.ReserveResponse(
            token=reservation.token,
            transport=transport,
            reserved_bytes=reservation.pool_bytes,
            lease_s=self._reservations.lease_s,
            promised_tokens=promise.tokens(request.max_new_tokens),
        )

    async def GrowReservation(  # noqa: N802
        self, request: pb.GrowReservationRequest, context: grpc.aio.ServicerContext
    ) -> pb.GrowReservationResponse:
        """See the proto file."""
        self._find(request.token)
        reservation = self._runner.grow(request.token, request.kept_tokens_bound)
        return pb.GrowReservationResponse(reserved_bytes=reservation.pool_bytes)

    async def Renew(  # noqa: N802
        self, request: pb.RenewRequest, context: grpc.aio.ServicerContext
    ) -> pb.RenewResponse:
        """See the proto file."""
        self._reservations.renew(self._find(request.token), time.monotonic())
        return pb.RenewResponse(lease_s=self._reservations.lease_s)

    async def Release(  # noqa: N802
        self, request: pb.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseResponse:
        """See the proto file."""
        with contextlib.suppress(NotFoundError):
            self._runner.end_all(self._find(request.token))
        return pb.ReleaseResponse()

    async def StreamTokens(  # noqa: N802
        self, commands: AsyncIterator[pb.TokenStreamRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.TokenStreamResponse]:
        """See the proto file. When the stream ends, so do the sequences that were read over it."""
        outbox = TokenOutbox()
        if self._draining:
            outbox.announce_draining()
        self._outboxes.add(outbox)
        reader = asyncio.create_task(self._follow(commands, outbox))
        try:
            async for message in outbox.messages():
                yield message
        finally:
            reader.cancel()
            self._outboxes.remove(outbox)
            self._runner.detach(outbox)

    async def _follow(self, commands: AsyncIterator[pb.TokenStreamRequest], outbox: TokenOutbox) -> None:
        async for command in commands:
            kind = command.WhichOneof("command")
            if kind == "attach":
                self._attach(command.attach, outbox)
            elif kind == "cancel":
                self._runner.cancel(outbox, command.cancel.handle)

    def _attach(self, attach: pb.Attach, outbox: TokenOutbox) -> None:
        try:
            reservation = self._reservations.find(attach.token)
            with within(reservation.scope):
                self._runner.attach(reservation, outbox, attach.handle, tuple(attach.delivered), attach.choice)
        except ServiceError as error:
            Subscription(outbox, attach.handle).fail(error)

    def _scope_of(self, request: pb.ReserveRequest, context: grpc.aio.ServicerContext, *, transport: str) -> Scope:
        """Of what was reserved, until its sequence has ended. Refusals, of which one that waits may get many, are not
        traced."""
        attributes: dict[str, Value] = {
            "request_id": request.request_id,
            "attempt": request.attempt,
            "worker": self._name,
            "model": request.model,
            "transport": transport,
        }
        span = self._tracer.begin("sequence", context.invocation_metadata() or (), attributes)
        return Scope(request_id=request.request_id, span=span)

    def _find(self, token: bytes) -> Reservation:
        """The live reservation that a call is about; the call is on its behalf from now on."""
        reservation = self._reservations.find(token)
        enter(reservation.scope)
        return reservation

    async def _choose_transport(self, request: pb.ReserveRequest) -> tuple[str, ArenaView | None]:
        """The shortest way from that prefill worker, and its arena where it leads through one."""
        if self._arenas is None:
            return GrpcTransport.name, None
        if request.prefill_epoch == self._epoch:
            # the other half of this very process
            return LocalTransport.name, None
        arena = await self._arenas.find(request.arena_socket, request.prefill_epoch)
        return (MemoryTransport.name, arena) if arena else (GrpcTransport.name, None)

    def _check_reserve(self, request: pb.ReserveRequest) -> None:
        if self._draining:
            raise UnavailableError("the worker is draining", reason="DRAINING")
        if request.epoch != self._epoch:
            raise FailedPreconditionError("the worker was restarted", reason="EPOCH")
        if request.compatibility != self._identity.compatibility:
            raise FailedPreconditionError("the workers serve different models", reason="INCOMPATIBLE")
        if not request.request_id or request.kept_tokens_bound < 1 or request.max_new_tokens < 1:
            raise InvalidRequestError("a reservation needs an id and positive token counts")
        choices = {answer.choice for answer in request.answers}
        if len(choices) < len(request.answers) or max(choices, default=0) >= MAX_ANSWERS:
            raise InvalidRequestError("a reservation is for different answers of one request")


def _delivered_tokens(request: pb.ReserveRequest) -> Mapping[int, int]:
    """By choice."""
    asked = {answer.choice: answer.delivered_tokens for answer in sorted(request.answers, key=lambda each: each.choice)}
    return asked or FROM_THE_BEGINNING
