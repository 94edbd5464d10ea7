"""The public service: protobuf in, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

import grpc
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc

from router.accounting import Accounting
from router.admission.callers import Callers
from router.requests.finished import FinishedAnswers, Key
from router.requests.generations import Generations
from router.shadow import Shadow
from router.workers.table import WorkerTable
from router.workers.worker import UNREACHABLE, Worker
from shared.errors import ServiceError
from shared.telemetry.scope import Scope, within
from shared.version import VERSION

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(
        self,
        generations: Generations,
        finished: FinishedAnswers,
        shadow: Shadow,
        table: WorkerTable,
        accounting: Accounting,
        callers: Callers,
    ) -> None:
        self._generations = generations
        self._finished = finished
        self._shadow = shadow
        self._table = table
        self._accounting = accounting
        self._callers = callers

    def register(self, server: grpc.aio.Server) -> None:
        """Adds this service to a server."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Answers a chat request."""
        tenant = self._tenant(context)
        # before defaults are filled in: a repetition has none either
        key = Key.of(request, tenant)
        if answer := self._find(key, tenant):
            return answer
        generation = self._generations.open(
            request, context.time_remaining(), tenant=tenant, metadata=context.invocation_metadata() or ()
        )
        # a handler that is cancelled while it writes never resumes its generator
        context.add_done_callback(lambda _: generation.close())
        return self._finished.record(key, self._shadow.follow(generation))

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """Models that can be asked now."""
        return pb.ListModelsResponse(models=[_model(worker) for worker in self._table.served_models().values()])

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Workers and totals."""
        unseen = [pb.Worker(name=address, address=address, state=UNREACHABLE) for address in self._table.unseen()]
        return pb.GetServerInfoResponse(
            version=VERSION,
            workers=[*(_worker(worker) for worker in self._table.workers()), *unseen],
            totals=_totals(self._accounting),
            requests_running=self._accounting.requests_running,
            requests_waiting=self._accounting.requests_waiting,
        )

    def _tenant(self, context: grpc.aio.ServicerContext) -> str:
        try:
            return self._callers.tenant_of(context.invocation_metadata() or ())
        except ServiceError as error:
            self._accounting.refused(error)
            raise

    def _find(self, key: Key | None, tenant: str) -> AsyncIterator[pb.GenerateResponse] | None:
        try:
            answer = self._finished.find(key)
        except ServiceError as error:
            with _named(key):
                self._accounting.refused(error, tenant)
            raise
        if answer is not None:
            with _named(key):
                self._accounting.repeated(tenant)
        return answer


def _named(key: Key | None) -> AbstractContextManager[None]:
    """The scope of a request whose answer is known; so is its id, then."""
    return within(Scope(request_id=key.request_id if key else ""))


def _model(worker: Worker) -> pb.Model:
    served = worker.info.model
    return pb.Model(
        name=served.name,
        context_tokens=served.context_tokens,
        max_images=served.max_images,
        policies=served.policies,
        default_policy=served.default_policy,
        default_retention=served.default_retention,
        kv_bytes_per_token=worker.layout.token_bytes,
    )


def _worker(worker: Worker) -> pb.Worker:
    info = worker.info
    return pb.Worker(
        name=info.name,
        role=info.role,
        address=worker.client.address,
        state=worker.state,
        model=info.model.name,
        requests_running=info.requests_running,
        requests_waiting=info.requests_waiting,
        kv=info.kv,
    )


def _totals(accounting: Accounting) -> pb.Totals:
    totals = accounting.totals
    return pb.Totals(
        requests=totals.requests,
        kv_full_bytes=totals.kv_full_bytes,
        kv_kept_bytes=totals.kv_kept_bytes,
        kv_sent_bytes=totals.kv_sent_bytes,
        generated_tokens=totals.generated_tokens,
    )
