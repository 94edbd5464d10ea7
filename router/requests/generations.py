"""All requests in flight."""

from __future__ import annotations

import asyncio

from vlcache.v1 import inference_pb2 as pb

from router import validation
from router.accounting import Accounting
from router.admission.tenants import Stay, Tenants
from router.deadline import Deadline
from router.requests.generation import Generation
from router.requests.means import Means
from router.validation import AcceptedRequest
from router.workers.table import WorkerTable
from shared.errors import DuplicateRequestError, InvalidRequestError, NotFoundError, ServiceError, UnavailableError
from shared.telemetry.scope import Scope, enter
from shared.telemetry.span import Metadata
from shared.telemetry.tracer import NO_TRACER, Tracer


class Generations:
    """Owner of the ids in flight. Accepts requests, refuses them while draining, and knows when all have ended."""

    def __init__(
        self,
        table: WorkerTable,
        means: Means,
        *,
        tenants: Tenants,
        accounting: Accounting,
        min_retention: float,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._table = table
        self._means = means
        self._tenants = tenants
        self._accounting = accounting
        self._min_retention = min_retention
        # by tenant and id: an id is its tenant's own
        self._running: dict[tuple[str, str], Generation] = {}
        self._tracer = tracer
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def open(
        self, message: pb.GenerateRequest, timeout_s: float | None, *, tenant: str, metadata: Metadata = ()
    ) -> Generation:
        """Accepts a request; its caller, the task of its call, iterates `events` and calls `close` when its client is
        gone.

        Args:
            metadata: Of the call; may name the span that the client is in.

        Raises:
            UnavailableError: The router is draining, or no worker serves the model at present.
            DuplicateRequestError: The id is in flight.
            NotFoundError: No worker knows the model.
            InvalidRequestError: The request can never work.
            ResourceExhaustedError: The tenant asks for more than it may.
        """
        try:
            self._enter(message, metadata)
            request = self._accept(message, tenant)
            stay = self._tenants.enter(tenant)
        except ServiceError as error:
            self._accounting.refused(error, tenant)
            raise
        return self._register(request, stay, Deadline.after(timeout_s))

    @property
    def busy(self) -> bool:
        """Whether a request is in flight."""
        return bool(self._running)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def running(self) -> list[Generation]:
        """The requests in flight."""
        return list(self._running.values())

    async def idle(self) -> None:
        """Waits until no request is in flight."""
        await self._idle.wait()

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the running ones; False when some still run after `timeout_s`."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def check_integrity(self) -> None:
        """Asserts that idle means idle."""
        assert self._idle.is_set() == (not self._running)
        self._tenants.check_integrity(idle=not self._running)

    def _enter(self, message: pb.GenerateRequest, metadata: Metadata) -> None:
        """Names the request and its work."""
        message.request_id = validation.request_id_of(message)
        span = self._tracer.begin("Generate", metadata, {"request_id": message.request_id})
        enter(Scope(request_id=message.request_id, span=span))

    def _accept(self, message: pb.GenerateRequest, tenant: str) -> AcceptedRequest:
        if self._draining:
            raise UnavailableError("this router is draining", reason="DRAINING")
        if (tenant, message.request_id) in self._running:
            raise DuplicateRequestError(f"request {message.request_id} is in flight")
        served = self._table.served_models()
        worker = served.get(self._model_name(message.model, list(served)))
        if worker is None:
            raise self._not_served(message.model, list(served))
        return validation.accept(message, worker.info.model, min_retention=self._min_retention, tenant=tenant)

    def _model_name(self, asked: str, served: list[str]) -> str:
        if not asked and len(served) > 1:
            raise InvalidRequestError(f"several models are served, name one: {', '.join(served)}")
        return asked or "".join(served)

    def _not_served(self, asked: str, served: list[str]) -> ServiceError:
        """A model that is unknown for want of workers is not an unknown model."""
        if served and asked not in self._table.known_models():
            return NotFoundError(f"unknown model {asked!r}; served: {', '.join(served)}", reason="UNKNOWN_MODEL")
        return self._means.admission.no_pair(asked)

    def _register(self, request: AcceptedRequest, stay: Stay, deadline: Deadline) -> Generation:
        key = (request.tenant, request.request_id)
        generation = Generation(
            request,
            self._means,
            account=self._accounting.open(request.tenant, request.model.name),
            deadline=deadline,
            on_close=lambda: self._forget(key, stay),
        )
        self._running[key] = generation
        self._idle.clear()
        return generation

    def _forget(self, key: tuple[str, str], stay: Stay) -> None:
        stay.leave()
        del self._running[key]
        if not self._running:
            self._idle.set()
