"""The public service: protobuf in, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from vlcache.v1 import inference_pb2 as pb
from vlcache.v1 import inference_pb2_grpc

from router.accounting import Accounting
from router.listing import served_models
from router.requests.reception import Reception
from router.workers.table import WorkerTable
from router.workers.worker import UNREACHABLE, Worker
from shared.version import VERSION

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """What clients call."""

    def __init__(self, reception: Reception, table: WorkerTable, accounting: Accounting) -> None:
        self._reception = reception
        self._table = table
        self._accounting = accounting

    def register(self, server: grpc.aio.Server) -> None:
        """Adds this service to a server."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Answers a chat request."""
        metadata = context.invocation_metadata() or ()
        tenant = self._reception.tenant_of(metadata)
        answer = self._reception.open(request, context.time_remaining(), tenant=tenant, metadata=metadata)
        # a handler that is cancelled while it writes never resumes its generator
        context.add_done_callback(lambda _: answer.close())
        return answer.events

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """Models that can be asked now."""
        return pb.ListModelsResponse(models=served_models(self._table))

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
