"""Memory before compute: finds a pair, reserves decode memory, and waits for it when there is none."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.accounting import Accounting
from router.admission.lanes import Rank
from router.admission.retention import Offer
from router.admission.waiting import Rooms
from router.background import Background
from router.deadline import Deadline
from router.placement.base import Demand, Group, Pair, Placement
from router.placement.cheapest import pairs_of
from router.validation import AcceptedRequest
from router.workers.client import WorkerClient
from router.workers.table import WorkerTable
from router.workers.worker import DECODE, PREFILL, RESERVE, Charge, Worker
from shared.errors import FailedPreconditionError, ResourceExhaustedError, ServiceError, TooLargeError, UnavailableError

log = logging.getLogger(__name__)

# Nobody knows when a worker comes; a client that asks again is told at once.
RETRY_AFTER_S = 1.0
# attempt numbers are 32 bits wide
ATTEMPTS = 1 << 32


@dataclass(eq=False, kw_only=True)
class Lease:
    """Decode memory promised to one attempt, and the load that the attempt puts on its pair."""

    pair: Pair
    offer: Offer
    attempt: int
    choices: Sequence[int]
    """The answers that it is for."""
    ticket: prefill_pb2.Ticket
    prefill_charge: Charge
    decode_charge: Charge
    memory_freed: Callable[[], None]

    def end(self) -> None:
        """Takes the load off the decode worker; that of the prefill worker ends with its call. Idempotent."""
        self.decode_charge.end()
        self.memory_freed()

    async def release(self) -> None:
        """Gives the memory back, whatever the worker does with it now; without an answer the worker's lease ends it."""
        try:
            await self.pair.decode.client.release(self.ticket.token)
        except ServiceError as error:
            log.warning("%s did not confirm a release: %s", self.pair.decode.info.name, error.message)
        self.memory_freed()


class Admission:
    """Called once per attempt of a request. Loads are counted before the first await, so a burst spreads out."""

    def __init__(
        self,
        table: WorkerTable,
        placement: Placement,
        *,
        background: Background,
        accounting: Accounting,
        rooms: Rooms,
        queue_timeout_s: float,
        comeback_s: float,
        make_room: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Prepares.

        Args:
            rooms: Where requests wait; nobody overtakes those who do.
            queue_timeout_s: How long they wait.
            comeback_s: How long one that has lost a worker waits for any to be ready.
            make_room: Frees memory that is held for less than a client, where there is any, and says whether it did.
        """
        self._table = table
        self._placement = placement
        self._background = background
        self._accounting = accounting
        self._queue_timeout_s = queue_timeout_s
        self._comeback_s = comeback_s
        # One count for all requests: whoever asks again under the same id cannot meet the remains of the last try.
        self._attempts = itertools.count(1)
        self._rooms = rooms
        self._make_room = make_room

    async def reserve(
        self,
        request: AcceptedRequest,
        *,
        deadline: Deadline,
        avoid: Collection[Worker] = (),
        begun: BegunAnswer | None = None,
    ) -> Lease:
        """Waits for a pair with decode memory.

        Before it waits, and whenever it is its turn to ask again, everything that the request puts up with is tried,
        what it asked for first: memory that became free goes into quality before it goes into the next request.

        Args:
            avoid: Workers that have failed this request: taken only where no other is ready.
            begun: What the client has of the answer, if anything.

        Raises:
            UnavailableError: No ready pair is left; and none has come within the comeback, for a request that has
                lost a worker.
            ResourceExhaustedError: No memory within the queue timeout, or too much waits for it.
            DeadlineExceededError: The client's deadline came first.
        """
        since_s = self._accounting.clock()
        has_lost_one = bool(avoid) or begun is not None
        # where nobody takes a parcel, its prompt may still be computed elsewhere, at once
        resends = begun is not None and begun.holder is not None
        comeback_s = self._comeback_s if has_lost_one and not resends else 0.0
        workers_by_s = asyncio.get_running_loop().time() + comeback_s
        lease = await self._wait_for_lease(_Ask(request, avoid, deadline, begun, workers_by_s))
        self._accounting.admitted(
            self._accounting.clock() - since_s,
            prefill_worker=lease.pair.prefill.info.name,
            decode_worker=lease.pair.decode.info.name,
        )
        return lease

    async def _wait_for_lease(self, ask: _Ask) -> Lease:
        request, deadline = ask.request, ask.deadline
        room = self._rooms[request.model.name]
        # whoever comes later must not overtake those who go first
        rank = Rank(tenant=request.tenant, priority=request.priority, begun=ask.begun is not None)
        if room.would_be_first(rank) and (lease := await self._try(ask)):
            return lease
        with room.place(rank, request.num_bytes) as place, self._accounting.waiting(request.tenant):
            give_up_at_s = asyncio.get_running_loop().time() + deadline.at_most(self._queue_timeout_s)
            while await place.turn(give_up_at_s):
                if lease := await self._try(ask):
                    place.served = True
                    return lease
        if deadline.passed:
            raise deadline.error("queue")
        raise ResourceExhaustedError(
            "no decode memory became free in time", retry_after_s=room.come_back_in_s(), stage="queue"
        )

    async def reserve_now(
        self, request: AcceptedRequest, *, deadline: Deadline, avoid: Collection[Worker], begun: BegunAnswer
    ) -> Lease | None:
        """One round without a wait, for an answer that may as well stay where it is; None when there is no room.

        Raises:
            UnavailableError: No ready pair is left.
            TooLargeError: No worker will ever have room.
        """
        return await self._round(_Ask(request, avoid, deadline, begun), begun.offer)

    async def _try(self, ask: _Ask) -> Lease | None:
        """Down the offers; None when the last one met a decode worker that is full only for now."""
        *better, last = (ask.begun.offer,) if ask.begun else ask.request.offers
        for offer in better:
            with contextlib.suppress(TooLargeError):
                if lease := await self._insist(ask, offer):
                    return lease
        return await self._insist(ask, last)

    async def _insist(self, ask: _Ask, offer: Offer) -> Lease | None:
        """A round, and a second one when memory could be made free."""
        lease = await self._round(ask, offer)
        if lease is None and self._make_room is not None and await self._make_room():
            return await self._round(ask, offer)
        return lease

    async def _round(self, ask: _Ask, offer: Offer) -> Lease | None:
        """Over the decode workers; None when at least one of them is full, or nobody is there, only for now."""
        groups = self._groups(ask)
        asked: set[Worker] = set()
        short = False
        hopeless: TooLargeError | None = None
        for pair in self._order(groups, ask, offer):
            if pair.decode in asked or not ask.may_use(pair):
                continue
            asked.add(pair.decode)
            try:
                return await self._reserve(pair, ask, offer)
            except TooLargeError as error:
                self._accounting.reservation_rejected(error)
                hopeless = error
            except ResourceExhaustedError as error:
                self._accounting.reservation_rejected(error)
                short = True
            except (UnavailableError, FailedPreconditionError) as error:
                self._accounting.reservation_rejected(error)
            if all(worker in asked or not worker.ready for group in groups for worker in group.decode):
                break
        if short or (hopeless is None and asyncio.get_running_loop().time() < ask.workers_by_s):
            return None
        raise hopeless or self.no_pair(ask.request.model.name)

    def _groups(self, ask: _Ask) -> Sequence[Group]:
        """Where a request may go; workers that have failed it only when nobody else is ready."""
        if ask.holder is not None:
            partners = self._table.partners(ask.holder)
            return [Group([ask.holder], [worker for worker in partners if worker not in ask.avoid] or partners)]
        groups = self._table.groups(ask.request.model.name)
        if not ask.avoid:
            return groups
        trusted = [group.without(ask.avoid) for group in groups]
        return [group for group in trusted if group.ready] or groups

    def _order(self, groups: Sequence[Group], ask: _Ask, offer: Offer) -> Iterator[Pair]:
        demand = Demand(
            prompt_tokens=ask.request.prompt_tokens_bound,
            kv_tokens=_kv_tokens(ask.request, offer),
            image_key=lambda: ask.request.image_key,
        )
        if ask.holder is not None:
            return pairs_of(ask.holder, groups[0].decode, demand)
        return self._placement.order(groups, demand)

    async def _reserve(self, pair: Pair, ask: _Ask, offer: Offer) -> Lease:
        attempt = next(self._attempts) % ATTEMPTS
        prefill_charge = pair.prefill.charge(0 if ask.holder else ask.request.prompt_tokens_bound)
        decode_charge = pair.decode.charge(pair.decode.layout.full_bytes(_kv_tokens(ask.request, offer)))
        message = _reserve_request(pair, attempt, ask, offer)
        try:
            response = await self._answer(pair.decode.client, message, ask.deadline)
        except BaseException as error:
            if isinstance(error, ServiceError):
                decode_charge.failed(RESERVE, error)
            prefill_charge.end()
            decode_charge.end()
            raise
        decode_charge.succeeded(RESERVE)
        decode_charge.resize(response.reserved_bytes)
        pair.learn(response.transport)
        self._accounting.reserved(offer.share)
        return Lease(
            pair=pair,
            offer=offer,
            attempt=attempt,
            choices=[answer.choice for answer in message.answers],
            ticket=_ticket(pair.decode, response),
            prefill_charge=prefill_charge,
            decode_charge=decode_charge,
            memory_freed=self._rooms[ask.request.model.name].memory_freed,
        )

    async def _answer(
        self, client: WorkerClient, message: decode_pb2.ReserveRequest, deadline: Deadline
    ) -> decode_pb2.ReserveResponse:
        """The worker's answer. A client that leaves meanwhile must not leave a reservation behind."""
        asking = self._background.spawn(client.reserve(message))
        try:
            await asyncio.wait({asking}, timeout=deadline.remaining_s())
        except asyncio.CancelledError:
            self._background.spawn(_give_back(client, asking))
            raise
        if not asking.done():
            self._background.spawn(_give_back(client, asking))
            raise deadline.error("queue")
        return asking.result()

    def no_pair(self, model: str) -> UnavailableError:
        """What a client is told when nobody can serve `model` at present."""
        ready = {worker.info.role for worker in self._table.workers() if worker.ready}
        missing = [role for role in (PREFILL, DECODE) if role not in ready]
        what = f"no {' and no '.join(missing)} worker is ready" if missing else "no pair of workers is ready"
        where = f" for model {model!r}" if model else ""
        return UnavailableError(what + where, reason="NO_WORKER", retry_after_s=RETRY_AFTER_S)


@dataclass(frozen=True, kw_only=True)
class BegunAnswer:
    """An answer that goes on after its worker was lost, or before it leaves."""

    offer: Offer
    """The budget it was begun with: another one would draw other tokens."""
    delivered_tokens: Mapping[int, int]
    """Of the answers that are not complete, by choice."""
    holder: Worker | None = None
    """The prefill worker that sends its parcel again; None: its prompt is computed again."""


@dataclass(frozen=True)
class _Ask:
    """What stays the same over all tries of one reservation."""

    request: AcceptedRequest
    avoid: Collection[Worker]
    deadline: Deadline
    begun: BegunAnswer | None
    workers_by_s: float = 0.0
    """Until then, in the loop's clock, nobody being ready is taken for a want of room."""

    @property
    def holder(self) -> Worker | None:
        """Of the parcel that is sent again, if one is: nothing to choose there, whatever a poll says of him."""
        return self.begun.holder if self.begun else None

    def may_use(self, pair: Pair) -> bool:
        return pair.ready or (pair.prefill is self.holder and pair.decode.ready)


def _kv_tokens(request: AcceptedRequest, offer: Offer) -> int:
    """Tokens that decode holds at most, until the worker says what it has reserved."""
    kept = request.n if request.copies else 1
    return kept * offer.kept_tokens_bound + request.n * request.max_new_tokens


def _reserve_request(pair: Pair, attempt: int, ask: _Ask, offer: Offer) -> decode_pb2.ReserveRequest:
    request = ask.request
    delivered = ask.begun.delivered_tokens if ask.begun else dict.fromkeys(range(request.n), 0)
    return decode_pb2.ReserveRequest(
        request_id=request.request_id,
        attempt=attempt,
        model=request.model.name,
        compatibility=pair.decode.info.model.compatibility,
        kept_tokens_bound=offer.kept_tokens_bound,
        max_new_tokens=request.max_new_tokens,
        prefill_epoch=pair.prefill.info.epoch,
        arena_socket=pair.prefill.info.arena_socket,
        epoch=pair.decode.info.epoch,
        answers=[
            decode_pb2.ReservedAnswer(choice=choice, delivered_tokens=tokens) for choice, tokens in delivered.items()
        ],
        copies=request.copies,
    )


def _ticket(decode: Worker, response: decode_pb2.ReserveResponse) -> prefill_pb2.Ticket:
    return prefill_pb2.Ticket(
        decode_worker=decode.info.name,
        decode_address=decode.client.address,
        token=response.token,
        transport=response.transport,
        lease_s=response.lease_s,
        promised_tokens=response.promised_tokens,
    )


async def _give_back(client: WorkerClient, asking: asyncio.Task[decode_pb2.ReserveResponse]) -> None:
    try:
        response = await asking
        await client.release(response.token)
    except ServiceError as error:
        log.debug("nothing to give back: %s", error.message)
