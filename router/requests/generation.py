"""The life of one request, from its admission to its last event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.accounting import RequestAccount
from router.deadline import Deadline
from router.requests.attempt import Source
from router.requests.course import Course
from router.requests.delivery import Delivery, Responses
from router.requests.inbox import PrefillEnded, Said
from router.requests.means import Means
from router.requests.recovery import MIGRATION, REPREFILL, Loss, LostError, Recovery, is_of_receiver, way_after
from router.stages import DECODE, PREFILL
from router.validation import AcceptedRequest
from shared.errors import InternalError, ServiceError, UnavailableError
from shared.telemetry.scope import current, within


class Generation:
    """Turns what workers say into the events of a request's answers.

        queue ── reserve ─▶ prefill ── first token ─▶ decode ── last token, prefill call ended ─▶ finished
          ▲                    │ worker lost            │ worker lost
          ├── compute again ◀──┴────── parcel gone ─────┤
          └── resend the parcel ◀───────────────────────┘

    The client hears of a loss only when no way is left: the next worker goes on behind what the client has of its
    answer (`Delivery`). `close` may be called at any moment and by anyone; it leaves nothing behind on any worker.
    """

    def __init__(
        self,
        request: AcceptedRequest,
        means: Means,
        *,
        account: RequestAccount,
        deadline: Deadline,
        on_close: Callable[[], None],
    ) -> None:
        """Prepares the request; nothing happens before `events` is iterated.

        Args:
            on_close: Called once, when nothing of this request can happen any more.
        """
        self.request = request
        self._means = means
        self._account = account
        self._deadline = deadline
        self._on_close = on_close
        self._delivery = Delivery(account, request.asked, request.n)
        self._course = Course(request, means, delivery=self._delivery, deadline=deadline)
        self._recovery = Recovery(means.limits.max_failovers)
        self._pending: Loss | None = None
        """The decode worker was lost while the prefill worker still makes the parcel."""
        self._alarm: asyncio.TimerHandle | None = None
        self._open = True
        # of the call that it was made in; others may end it, or move it
        self._scope = current()

    async def events(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer.

        Raises:
            ServiceError: Why there is none, or no more of it.
        """
        try:
            self._watch_deadline()
            await self._course.compute_prompt(avoid=())
            self._placed()
            # not before memory is promised: until its first event a client may safely ask again
            yield self._started()
            while not self._complete:
                for response in await self._step():
                    yield response
            finished = self._finished()
            # whoever has seen the last event finds the id free
            self.close()
            yield finished
        except Exception as error:
            self._account.failed(error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Ends the request wherever it is; if it was not over, its client has left. Idempotent."""
        if not self._open:
            return
        self._open = False
        stage = self._course.stage
        if self._alarm is not None:
            self._alarm.cancel()
        with within(self._scope):
            self._account.left(stage, self._deadline.error(stage) if self._deadline.passed else None)
            self._course.close()
        self._on_close()

    @property
    def can_leave(self) -> bool:
        """Whether its decode worker is leaving and the answer could go on at another one."""
        return self._open and not self._delivery.complete and self._course.can_leave

    async def leave(self) -> bool:
        """Goes on at another decode worker if one has room at once. Called while `can_leave`.

        Raises:
            ServiceError: There is no other decode worker.
        """
        left = self._course.attempt.worker.info.name
        with within(self._scope):
            transfer = await self._course.leave()
        if transfer is None:
            return False
        self._account.interrupted()
        self._account.goes_on(MIGRATION, "DRAINING", left)
        self._placed()
        self._delivery.on_transfer(transfer)
        return True

    @property
    def _complete(self) -> bool:
        # the transfer report may come after the last token
        return self._delivery.complete and self._course.call.ended

    async def _step(self) -> Responses:
        source, said = await self._course.inbox.get()
        try:
            responses = self._hear(source, said)
        except LostError as lost:
            return await self._recover(lost.loss)
        if self._delivery.complete and self._course.attempt.is_open:
            # only the prefill call may still have something to say
            self._course.attempt.close()
            self._course.call.end_after(self._means.limits.patience_s)
        return responses

    def _hear(self, source: object, said: Said) -> Responses:
        """What a worker says; whatever is left of one that was given up is passed over."""
        if source is self:
            assert isinstance(said, ServiceError)
            raise said
        if source is self._course.call and not self._course.call.ended:
            return self._on_prefill(said)
        # of those that are lost together the first says it for all
        if isinstance(source, Source) and source.attempt is self._course.attempt and source.attempt.is_open:
            return self._on_decode(said, source.choice)
        return ()

    def _on_prefill(self, said: Said) -> Responses:
        if isinstance(said, PrefillEnded):
            return self._on_prefill_ended(said.error)
        assert isinstance(said, prefill_pb2.PrefillEvent)
        kind = said.WhichOneof("event")
        if kind == "first_token":
            self._course.stage = DECODE
            return self._delivery.on_first_token(said.first_token)
        if kind == "next_token":
            return self._delivery.on_token(said.next_token)
        if kind == "compression":
            return self._on_compression(said.compression)
        if self._pending is not None and kind in ("retained", "transfer"):
            # the parcel is there, or will never be
            raise LostError(self._pending)
        if kind == "transfer":
            self._course.call.commit()
            return self._delivery.on_transfer(said.transfer)
        return ()

    def _on_compression(self, message: pb.Compression) -> Responses:
        """The prefill worker has said its last token: what follows comes from the decode worker."""
        if not self._delivery.complete:
            self._course.attempt.attach(self._delivery.open_answers)
        return self._delivery.on_compression(message)

    def _on_decode(self, said: Said, choice: int) -> Responses:
        if isinstance(said, ServiceError):
            return self._on_decode_lost(said)
        assert isinstance(said, decode_pb2.SequenceUpdate)
        self._course.call.commit()
        return self._delivery.on_update(said, choice)

    def _on_decode_lost(self, error: ServiceError) -> Responses:
        loss = Loss(error, self._course.attempt.worker, parcel_gone=False)
        self._course.attempt.close()
        self._note(loss)
        if self._course.call.parcel is None and not self._course.call.ended:
            self._pending = loss
            return ()
        raise LostError(loss)

    def _on_prefill_ended(self, error: ServiceError | None) -> Responses:
        call = self._course.call
        call.ended = True
        if self._delivery.complete or call.committed:
            # nothing that happens to the prefill worker now can take back what it has handed over
            return ()
        if self._pending is not None:
            # its transfer could only fail
            raise LostError(self._pending)
        if error is not None:
            loss = self._loss_in_prefill(error)
            self._note(loss)
            raise LostError(loss)
        if self._course.stage == PREFILL:
            raise InternalError("the prefill worker ended without a token", reason="NO_FIRST_TOKEN")
        if not self._course.attempt.attached:
            raise InternalError("the prefill worker ended before it handed over", reason="NO_HAND_OVER")
        return ()

    def _loss_in_prefill(self, error: ServiceError) -> Loss:
        pair = self._course.attempt.lease.pair
        if is_of_receiver(error, pair.decode):
            return Loss(error, pair.decode, parcel_gone=False)
        return Loss(error, pair.prefill, parcel_gone=True)

    def _note(self, loss: Loss) -> None:
        self._account.interrupted()
        self._recovery.note(loss)

    async def _recover(self, loss: Loss) -> Responses:
        """Goes on elsewhere, by the cheapest way that is left.

        Raises:
            ServiceError: There is no way; what the first worker was lost by, where nobody is left.
        """
        self._pending = None
        while True:
            way = way_after(loss, self._course.call.parcel)
            self._account.goes_on(way, loss.error.reason, loss.error.worker)
            try:
                responses = await self._go(way)
                self._placed()
                return responses
            except LostError as lost:
                loss = lost.loss
                self._note(loss)
            except UnavailableError as nobody:
                if way == REPREFILL:
                    raise loss.error from nobody
                # nobody can take the parcel, but another pair may take the prompt
                loss = replace(loss, parcel_gone=True)

    async def _go(self, way: str) -> Responses:
        if way == REPREFILL:
            await self._course.compute_prompt(self._recovery.avoid)
            return ()
        return self._delivery.on_transfer(await self._course.resend_parcel(self._recovery.avoid))

    def _watch_deadline(self) -> None:
        remaining_s = self._deadline.remaining_s()
        if remaining_s is not None:
            self._alarm = asyncio.get_running_loop().call_later(remaining_s, self._deadline_passed)

    def _deadline_passed(self) -> None:
        self._course.inbox.put_nowait((self, self._deadline.error(self._course.stage)))

    def _started(self) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            started=pb.Started(request_id=self.request.request_id, model=self.request.model.name)
        )

    def _placed(self) -> None:
        pair = self._course.attempt.lease.pair
        self._account.placed(pair.prefill.info.name, pair.decode.info.name)

    def _finished(self) -> pb.GenerateResponse:
        pair = self._course.attempt.lease.pair
        placement = pb.Placement(prefill_worker=pair.prefill.info.name, decode_worker=pair.decode.info.name)
        return self._delivery.finished(placement, self.request.message.sampling.seed)
