"""The life of one request, from its admission to its last event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import decode_pb2, prefill_pb2

from router.accounting import RequestAccount
from router.admission import Admission
from router.attempt import Attempt, Inbox, PrefillEnded
from router.background import Background
from router.deadline import Deadline
from router.validation import AcceptedRequest
from router.worker import TOKENS, Worker
from router.workers import WorkerTable
from shared.errors import FailedPreconditionError, InternalError, UnavailableError

MAX_ATTEMPTS = 2
QUEUE, PREFILL, DECODE = "queue", "prefill", "decode"


class Generation:
    """Turns what two workers say into the events of one answer.

        queue ── reserve ─▶ prefill ── first token ─▶ decode ── last token, prefill call ended ─▶ finished
          ▲                    │ worker lost
          └────────────────────┘ (once)

    Messages of the public contract pass through as they are: a router that forwards them has no other form for them.
    `close` may be called at any moment and by anyone; it leaves nothing behind on either worker.
    """

    def __init__(
        self,
        request: AcceptedRequest,
        *,
        table: WorkerTable,
        admission: Admission,
        background: Background,
        account: RequestAccount,
        deadline: Deadline,
        patience_s: float,
        on_close: Callable[[], None],
    ) -> None:
        """Prepares the request; nothing happens before `events` is iterated.

        Args:
            patience_s: How long a prefill worker may take to end its call after the answer is complete.
            on_close: Called once, when nothing of this request can happen any more.
        """
        self.request = request
        self._table = table
        self._admission = admission
        self._background = background
        self._account = account
        self._deadline = deadline
        self._patience_s = patience_s
        self._on_close = on_close
        self._inbox: Inbox = asyncio.Queue()
        self._timers: list[asyncio.TimerHandle] = []
        self._lost: set[Worker] = set()
        self._attempts = 0
        self._attempt: Attempt | None = None
        self._stage = QUEUE
        self._reason = pb.FINISH_REASON_UNSPECIFIED
        self._usage = pb.Usage()
        self._open = True

    async def events(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The answer.

        Raises:
            ServiceError: Why there is none, or no more of it.
        """
        try:
            self._watch_deadline()
            await self._begin_attempt()
            # not before memory is promised: until its first event a client may safely ask again
            yield self._started()
            while not self._complete:
                for response in await self._step():
                    yield response
            finished = self._finished()
            self._account.finished()
            # whoever has seen the last event may use the id again
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
        self._account.left(self._stage, self._deadline.error(self._stage) if self._deadline.passed else None)
        for timer in self._timers:
            timer.cancel()
        if self._attempt is not None:
            self._attempt.close()
        self._on_close()

    @property
    def _current(self) -> Attempt:
        assert self._attempt is not None
        return self._attempt

    @property
    def _complete(self) -> bool:
        # the transfer report may come after the last token
        return bool(self._reason) and self._current.prefill_ended

    async def _begin_attempt(self) -> None:
        self._attempts += 1
        self._stage = QUEUE
        lease = await self._admission.reserve(self.request, avoid=self._lost, deadline=self._deadline)
        self._attempt = Attempt(lease, self._inbox, self._background)
        self._stage = PREFILL
        self._attempt.start_prefill(self.request.message, self._deadline)

    async def _step(self) -> Sequence[pb.GenerateResponse]:
        item = await self._inbox.get()
        if isinstance(item, decode_pb2.SequenceUpdate):
            return self._on_update(item)
        if isinstance(item, prefill_pb2.PrefillEvent):
            return self._on_prefill_event(item)
        if isinstance(item, PrefillEnded):
            await self._on_prefill_ended(item)
            return ()
        self._current.lease.decode_charge.failed(TOKENS, item)
        raise item

    def _on_prefill_event(self, event: prefill_pb2.PrefillEvent) -> Sequence[pb.GenerateResponse]:
        kind = event.WhichOneof("event")
        if kind == "first_token":
            return self._on_first_token(event.first_token)
        if kind == "next_token":
            return self._on_next_token(event.next_token)
        if kind == "compression":
            return self._on_compression(event.compression)
        if kind == "transfer":
            self._account.transfer(event.transfer)
            return (pb.GenerateResponse(transfer=event.transfer),)
        return ()

    def _on_first_token(self, token: prefill_pb2.FirstToken) -> Sequence[pb.GenerateResponse]:
        self._stage = DECODE
        self._usage = pb.Usage(prompt_tokens=token.prompt_tokens, visual_tokens=token.visual_tokens)
        self._account.prompt(token.prompt_tokens, token.visual_tokens)
        self._account.tokens(1)
        return self._on_token(token)

    def _on_next_token(self, token: prefill_pb2.NextToken) -> Sequence[pb.GenerateResponse]:
        self._account.tokens(1)
        return self._on_token(token)

    def _on_token(self, token: prefill_pb2.FirstToken | prefill_pb2.NextToken) -> Sequence[pb.GenerateResponse]:
        if token.finish_reason:
            self._answered(token.finish_reason)
        return (pb.GenerateResponse(delta=pb.Delta(token_ids=[token.token_id], text=token.text)),)

    def _on_compression(self, message: pb.Compression) -> Sequence[pb.GenerateResponse]:
        """The prefill worker has said its last token: what follows comes from the decode worker."""
        text, visual = message.prompt_tokens - message.visual_tokens, message.visual_tokens
        message.asked_retention = float(self.request.asked.retention_of(text, visual))
        self._account.compression(message)
        if not self._reason:
            self._current.attach()
        return (pb.GenerateResponse(compression=message),)

    def _on_update(self, update: decode_pb2.SequenceUpdate) -> Sequence[pb.GenerateResponse]:
        self._account.tokens(len(update.token_ids))
        if update.finish_reason:
            self._current.sequence_ended()
            self._answered(update.finish_reason)
        if not (update.token_ids or update.text):
            return ()
        return (pb.GenerateResponse(delta=pb.Delta(token_ids=update.token_ids, text=update.text)),)

    def _answered(self, reason: pb.FinishReason) -> None:
        """The answer is complete; only the prefill call may still have something to say."""
        self._reason = reason
        self._current.release()
        self._after(self._patience_s, PrefillEnded())

    async def _on_prefill_ended(self, ended: PrefillEnded) -> None:
        self._current.prefill_ended = True
        error = ended.error
        lost = isinstance(error, (UnavailableError, FailedPreconditionError))
        if self._reason:
            # nothing that happens to the prefill worker now can take the answer back
            return
        if self._stage == PREFILL and lost and self._attempts < MAX_ATTEMPTS:
            await self._start_over()
            return
        if self._stage == PREFILL and error is None:
            error = InternalError("the prefill worker ended without a token", reason="NO_FIRST_TOKEN")
        if error is None and not self._current.attached:
            error = InternalError("the prefill worker ended before it handed over", reason="NO_HAND_OVER")
        if error is not None:
            raise error

    async def _start_over(self) -> None:
        """Tries another prefill worker; the seed and hence the answer stay the same."""
        self._lost.add(self._current.lease.pair.prefill)
        self._current.close()
        await self._begin_attempt()

    def _watch_deadline(self) -> None:
        remaining_s = self._deadline.remaining_s()
        if remaining_s is not None:
            self._timers.append(asyncio.get_running_loop().call_later(remaining_s, self._deadline_passed))

    def _deadline_passed(self) -> None:
        self._inbox.put_nowait(self._deadline.error(self._stage))

    def _after(self, delay_s: float, item: PrefillEnded) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, self._inbox.put_nowait, item))

    def _started(self) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            started=pb.Started(request_id=self.request.request_id, model=self.request.model.name)
        )

    def _finished(self) -> pb.GenerateResponse:
        pair = self._current.lease.pair
        self._usage.generated_tokens = self._account.generated_tokens
        return pb.GenerateResponse(
            finished=pb.Finished(
                reason=self._reason,
                usage=self._usage,
                seed=self.request.message.sampling.seed,
                placement=pb.Placement(prefill_worker=pair.prefill.info.name, decode_worker=pair.decode.info.name),
            )
        )
