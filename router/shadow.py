"""Shadow mode: a sample of the answers is drawn once more from the full cache, to see what compression changed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from vlcache.v1 import inference_pb2 as pb

from router import validation
from router.accounting import Accounting
from router.admission.admission import Admission
from router.admission.waiting import Rooms
from router.background import Background
from router.deadline import Deadline
from router.placement.least_loaded import LeastLoaded
from router.requests.generation import Generation
from router.requests.means import Limits, Means
from router.requests.parcels import Parcels
from router.validation import AcceptedRequest
from router.workers.table import WorkerTable
from shared.errors import ResourceExhaustedError
from shared.telemetry.metrics import RouterMetrics
from shared.telemetry.scope import Scope, enter

log = logging.getLogger(__name__)

COMPARED, DROPPED, FAILED = "compared", "dropped", "failed"
# A worker that hangs must not end the sampling for ever.
REPLAY_LIMIT_S = 600.0


class Shadow:
    """Repeats a share of the finished requests at retention 1 with their seeds, one at a time, for nobody but a metric.

    Clients go first. A replay begins only while no request waits for memory; it ends when a request comes while its
    prompt is computed, and when a request finds no memory. What cannot begin or has to end is dropped, not postponed.
    A replay has books of its own: nothing of it is in what is counted for clients.
    """

    def __init__(
        self,
        share: float,
        *,
        table: WorkerTable,
        rooms: Rooms,
        accounting: Accounting,
        parcels: Parcels,
        limits: Limits,
    ) -> None:
        """Prepares; nothing runs before a request of the sample has finished.

        Args:
            share: Of the requests that are sampled, by a hash of their ids.
            rooms: Where clients wait for memory.
            accounting: Is told how replays ended.
            parcels: Who keeps and gives up what their prefill workers retain.
            limits: Of a client's request. A replay is not worth a second worker.
        """
        self._share = share
        self._accounting = accounting
        self._patience_s = limits.patience_s
        self._background = Background()
        self._own_accounting = Accounting(RouterMetrics(worker="shadow"), report=lambda _: None)
        admission = Admission(
            table,
            LeastLoaded(Random()),  # noqa: S311 -- no secret depends on it
            background=self._background,
            accounting=self._own_accounting,
            rooms=rooms,
            queue_timeout_s=0.0,
            comeback_s=0.0,
        )
        self._means = Means(
            admission=admission,
            parcels=parcels,
            background=self._background,
            limits=replace(limits, max_failovers=0),
        )
        self._replay: asyncio.Task[float] | None = None
        self._prompt_computed = False
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a replay runs or something is left of the last one."""
        return len(self._background) > 0

    def follow(self, generation: Generation) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The events of a client's request that has just come, as they are; read along where it is in the sample."""
        if not self._prompt_computed:
            self._end_replay()
        if is_sampled(generation.request.request_id, self._share):
            return self._read_along(generation)
        return generation.events()

    async def give_way(self) -> bool:
        """Ends a replay and waits until its memory is free; False when there was none to end."""
        if not self.busy:
            return False
        self._end_replay()
        await self._background.settle(self._patience_s)
        return True

    async def close(self) -> None:
        """Ends a replay; no other will begin."""
        self._closed = True
        await self.give_way()

    async def settle(self, timeout_s: float) -> None:
        """Waits for a replay and its clean-up."""
        await self._background.settle(timeout_s)

    async def _read_along(self, generation: Generation) -> AsyncGenerator[pb.GenerateResponse, None]:
        answer = _Answer(generation.request)
        async with contextlib.aclosing(generation.events()) as events:
            async for event in events:
                answer.add(event)
                # the answer is complete, its client gets the last event whatever happens here
                if event.HasField("finished") and answer.is_compressed:
                    self._begin(answer)
                yield event

    def _begin(self, answer: _Answer) -> None:
        if self._closed or self.busy:
            return self._accounting.replayed(DROPPED)
        self._prompt_computed = False
        self._replay = self._background.spawn(self._repeat(answer))
        self._replay.add_done_callback(self._ended)
        return None

    def _end_replay(self) -> None:
        if self._replay is not None:
            self._replay.cancel()

    async def _repeat(self, answer: _Answer) -> float:
        """The agreement of an answer with that of the full cache."""
        message = _at_retention_one(answer.request.message)
        # and not the scope of the request that it repeats, which is over
        enter(Scope(request_id=message.request_id))
        generation = Generation(
            validation.accept(message, answer.request.model, tenant=answer.request.tenant),
            self._means,
            account=self._own_accounting.open(answer.request.tenant),
            deadline=Deadline.after(REPLAY_LIMIT_S),
            on_close=lambda: None,
        )
        full: list[int] = []
        async with contextlib.aclosing(generation.events()) as events:
            async for event in events:
                full.extend(event.delta.token_ids)
                self._prompt_computed = bool(full)
        return agreement(answer.token_ids, full)

    def _ended(self, replay: asyncio.Task[float]) -> None:
        if self._replay is replay:
            self._replay = None
        error = None if replay.cancelled() else replay.exception()
        if replay.cancelled() or isinstance(error, ResourceExhaustedError):
            self._accounting.replayed(DROPPED)
        elif error is not None:
            log.warning("a shadow request failed: %s", error)
            self._accounting.replayed(FAILED)
        else:
            self._accounting.replayed(COMPARED)
            self._accounting.agreed(replay.result())


def is_sampled(request_id: str, share: float) -> bool:
    """Whether a request is among the `share` that is repeated; every router says the same."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def agreement(compressed: Sequence[int], full: Sequence[int]) -> float:
    """Share of the positions that both answers have at which their tokens are equal; 1 when there are none.

    The first position does not count: prefill draws that token before anything is compressed.
    """
    pairs = list(zip(compressed[1:], full[1:], strict=False))
    return sum(one == other for one, other in pairs) / len(pairs) if pairs else 1.0


@dataclass
class _Answer:
    """What is remembered of a request in the sample."""

    request: AcceptedRequest
    token_ids: list[int] = field(default_factory=list)
    is_compressed: bool = False

    def add(self, event: pb.GenerateResponse) -> None:
        # one answer tells as much of the compression as all of them
        if event.delta.choice == 0:
            self.token_ids.extend(event.delta.token_ids)
        if event.HasField("compression"):
            self.is_compressed = event.compression.realised_retention < 1


def _at_retention_one(message: pb.GenerateRequest) -> pb.GenerateRequest:
    """The request's first answer, of which nothing is lost: no policy, no wire, and the seed that was used."""
    sampling = pb.SamplingParams()
    sampling.CopyFrom(message.sampling)
    sampling.n = 1
    return pb.GenerateRequest(
        request_id=f"shadow-{uuid.uuid4().hex}",
        model=message.model,
        messages=message.messages,
        sampling=sampling,
        compression=pb.CompressionParams(retention=1.0),
    )
