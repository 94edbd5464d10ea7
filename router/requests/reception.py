"""What becomes of a request that has come in, whichever port it has come to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from vlcache.v1 import inference_pb2 as pb

from router.accounting import Accounting
from router.admission.callers import Callers
from router.requests.finished import FinishedAnswers, Key
from router.requests.generations import Generations
from router.shadow import Shadow
from shared.errors import ServiceError
from shared.telemetry.scope import Scope, within
from shared.telemetry.span import Metadata


@dataclass(frozen=True)
class Answer:
    """Of one request: its events, and how to end it when its client has left."""

    events: AsyncGenerator[pb.GenerateResponse, None]
    close: Callable[[], None]
    """Idempotent; leaves nothing behind on any worker."""


class Reception:
    """Tells whose a request is, repeats an answer that is known, and begins one that is not. Counts whom it refuses."""

    def __init__(
        self,
        generations: Generations,
        finished: FinishedAnswers,
        shadow: Shadow,
        accounting: Accounting,
        callers: Callers,
    ) -> None:
        self._generations = generations
        self._finished = finished
        self._shadow = shadow
        self._accounting = accounting
        self._callers = callers

    def tenant_of(self, metadata: Metadata) -> str:
        """Whose call has this metadata.

        Raises:
            ServiceError: See `Callers.tenant_of`.
        """
        try:
            return self._callers.tenant_of(metadata)
        except ServiceError as error:
            self._accounting.refused(error)
            raise

    def open(
        self, message: pb.GenerateRequest, timeout_s: float | None, *, tenant: str, metadata: Metadata = ()
    ) -> Answer:
        """Begins to answer `message`, which gets an id if it has none; the task of the call iterates the events.

        Args:
            timeout_s: How long the client waits for all of it.
            metadata: Of the call; may name the span that the client is in.

        Raises:
            ServiceError: See `Generations.open` and `FinishedAnswers.find`.
        """
        # before defaults are filled in: a repetition has none either
        key = Key.of(message, tenant)
        events = self._find(key, tenant)
        if events is not None:
            return Answer(events, lambda: None)
        generation = self._generations.open(message, timeout_s, tenant=tenant, metadata=metadata)
        events = self._finished.record(key, self._shadow.follow(generation))
        return Answer(events, generation.close)

    def refused(self, error: ServiceError, *, tenant: str, request_id: str) -> None:
        """A request was turned away before it could be opened."""
        with within(Scope(request_id=request_id)):
            self._accounting.refused(error, tenant)

    def _find(self, key: Key | None, tenant: str) -> AsyncGenerator[pb.GenerateResponse, None] | None:
        # whose answer is known has said an id
        request_id = key.request_id if key else ""
        try:
            events = self._finished.find(key)
        except ServiceError as error:
            self.refused(error, tenant=tenant, request_id=request_id)
            raise
        if events is not None:
            with within(Scope(request_id=request_id)):
                self._accounting.repeated(tenant)
        return events
