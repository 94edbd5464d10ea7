"""The gRPC face of a prefill worker: protobuf in, protobuf out, no logic."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc
from vlcache.v1 import inference_pb2 as public
from vlcache.worker.v1 import prefill_pb2 as pb
from vlcache.worker.v1 import prefill_pb2_grpc, worker_pb2

from prefill_worker.compression.layer_sharing import LayerSharing
from prefill_worker.job import PrefillJob
from prefill_worker.kv_sender import Ticket
from prefill_worker.parcel.retained import RetainedParcels
from prefill_worker.runner import PrefillRunner
from prefill_worker.scheduler import PrefillScheduler
from shared.errors import FailedPreconditionError, UnavailableError
from shared.rpc.calls import enter_call
from shared.telemetry.tracer import NO_TRACER, Tracer
from shared.version import VERSION

SERVICE_NAME = "vlcache.worker.v1.PrefillService"


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Implements `PrefillService`."""

    def __init__(
        self,
        *,
        name: str,
        epoch: str,
        model: worker_pb2.ServedModel,
        arena_socket: str,
        arena_bytes: int,
        runner: PrefillRunner,
        scheduler: PrefillScheduler,
        retained: RetainedParcels,
        vocabulary: int,
        max_dropped_attention: float = 1.0,
        sharing: LayerSharing | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._name = name
        self._epoch = epoch
        self._model = model
        self._arena_socket = arena_socket
        self._arena_bytes = arena_bytes
        self._runner = runner
        self._scheduler = scheduler
        self._retained = retained
        self._vocabulary = vocabulary
        self._max_dropped_attention = max_dropped_attention
        self._sharing = sharing
        self._tracer = tracer
        self._draining = False

    def start_draining(self) -> None:
        """From now on new requests are refused."""
        self._draining = True

    async def GetWorkerInfo(  # noqa: N802
        self, request: worker_pb2.GetWorkerInfoRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerInfo:
        """See the proto file."""
        return self.info()

    def info(self) -> worker_pb2.WorkerInfo:
        """What the worker says about itself, to routers and in a registry."""
        return worker_pb2.WorkerInfo(
            name=self._name,
            role="prefill",
            epoch=self._epoch,
            state="draining" if self._draining else "ready",
            model=self._model,
            requests_running=self._scheduler.running,
            requests_waiting=self._scheduler.waiting,
            outstanding_tokens=self._scheduler.outstanding_tokens,
            kv=public.KVBytes(
                capacity=self._arena_bytes,
                filling=self._retained.filling_bytes,
                retained=self._retained.used_bytes,
            ),
            arena_socket=self._arena_socket,
            version=VERSION,
            passes_ended=self._scheduler.ended,
        )

    async def Prefill(  # noqa: N802
        self, request: pb.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PrefillEvent]:
        """See the proto file."""
        self._enter(context, "Prefill", request.request.request_id, request.attempt)
        if self._draining:
            raise UnavailableError("the worker is draining", reason="DRAINING")
        if request.epoch != self._epoch:
            raise FailedPreconditionError("the worker was restarted", reason="EPOCH")
        job = PrefillJob.from_proto(
            request,
            epoch=self._epoch,
            vocabulary=self._vocabulary,
            default_max_new_tokens=self._model.default_max_new_tokens,
            default_retention=self._model.default_retention,
            default_max_dropped_attention=self._max_dropped_attention,
            sharing=self._sharing,
        )
        async for event in self._runner.stream(job):
            yield event.to_proto()

    async def Resend(  # noqa: N802
        self, request: pb.ResendRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResendResponse:
        """See the proto file. Not refused while draining: an answer that is running may need it."""
        self._enter(context, "Resend", self._retained.request_id(request.parcel), request.attempt)
        sent = await self._runner.resend(request.parcel, request.attempt, Ticket.from_proto(request.ticket))
        return pb.ResendResponse(transfer=sent.message)

    async def RenewParcels(  # noqa: N802
        self, request: pb.RenewParcelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.RenewParcelsResponse:
        """See the proto file."""
        now = time.monotonic()
        return pb.RenewParcelsResponse(gone=[each for each in request.parcels if not self._retained.renew(each, now)])

    async def ReleaseParcels(  # noqa: N802
        self, request: pb.ReleaseParcelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseParcelsResponse:
        """See the proto file."""
        for parcel in request.parcels:
            self._retained.release(parcel)
        return pb.ReleaseParcelsResponse()

    def _enter(self, context: grpc.aio.ServicerContext, call: str, request_id: str, attempt: int) -> None:
        enter_call(context, self._tracer, call, request_id, attempt=attempt, worker=self._name, model=self._model.name)
