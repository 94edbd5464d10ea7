"""One run of a prompt on a prefill worker, and the parcel that it leaves there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from vlcache.worker.v1 import prefill_pb2

from router.admission.admission import Lease
from router.deadline import Deadline
from router.requests.delivery import AnswerSoFar
from router.requests.inbox import Inbox, PrefillEnded
from router.requests.means import Means
from router.requests.parcels import Parcel
from router.stages import PREFILL, TRANSFER
from router.validation import AcceptedRequest
from router.workers.worker import PROMPT, TOKENS, UNREACHABLE, Worker
from shared.errors import ServiceError, UnavailableError

LOOKS_PER_TIMEOUT = 10


class PrefillCall:
    """Fills `inbox` with the events of the call, then with one `PrefillEnded`; until it is closed.

    Two clocks run one after the other, fed by what the worker says and not by when it is read: the prompt's until its
    compression, set again for as long as the worker gets on with other prompts; then the transfer's. Both run out early
    when the worker fails its polls all the while. The call then counts as ended, but is not cancelled: a worker drops
    the parcel of a call that is cancelled, and the parcel may be what the answer goes on with.
    """

    def __init__(self, lease: Lease, inbox: Inbox, means: Means) -> None:
        self.ended = False
        """Whether the request has taken `PrefillEnded`, or gone on without it."""
        self.committed = False
        """Whether the decode worker has the parcel."""
        self._lease = lease
        self._inbox = inbox
        self._means = means
        self._parcel: Parcel | None = None
        self._pump: asyncio.Task[None] | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._looks_in_vain = 0
        self._passes_ended = 0

    @property
    def worker(self) -> Worker:
        """The prefill worker."""
        return self._lease.pair.prefill

    @property
    def parcel(self) -> Parcel | None:
        """What can be sent again, once the worker holds it."""
        return self._parcel if self._parcel is not None and self._parcel.retained else None

    def start(self, asked: AcceptedRequest, delivered: Sequence[AnswerSoFar], deadline: Deadline) -> None:
        """Sends the prompt, with the budget that memory was promised for.

        Args:
            delivered: The answers as the client has them: these tokens are not drawn anew.
        """
        self._parcel = self._means.parcels.name(self.worker)
        request = prefill_pb2.PrefillRequest(
            request=asked.message,
            attempt=self._lease.attempt,
            ticket=self._lease.ticket,
            epoch=self.worker.info.epoch,
            delivered=[prefill_pb2.DeliveredTokens(tokens=answer.token_ids) for answer in delivered],
            tenant=asked.tenant,
            parcel=self._parcel.secret,
        )
        self._lease.offer.budget.write_to(request.request.compression)
        self._set_clock(PREFILL, self._means.limits.prefill_timeout_s)
        self._pump = self._means.background.spawn(self._read(request, self._parcel, deadline.remaining_s()))

    def commit(self) -> None:
        """The decode worker has the parcel: nothing that happens to this call can take it back."""
        self.committed = True
        self._stop_clock()

    def end_after(self, delay_s: float) -> None:
        """Counts as ended then, if it has not ended before."""
        self._stop_clock()
        self._clock = asyncio.get_running_loop().call_later(delay_s, self._say, PrefillEnded())

    def close(self) -> None:
        """Cancels what still runs and gives the parcel up. Idempotent; does not wait.

        Once the prompt is computed, the worker may end the call before it hears of the cancellation, and keep a parcel
        of which nobody has read: so it is given up in any case.
        """
        self._stop_clock()
        self._lease.prefill_charge.end()
        if self._pump is not None:
            self._pump.cancel()
        if self._parcel is not None:
            self._parcel.release()

    async def _read(self, request: prefill_pb2.PrefillRequest, parcel: Parcel, timeout_s: float | None) -> None:
        error: ServiceError | None = None
        events = self.worker.client.prefill(request, timeout_s=timeout_s)
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self._note(event, parcel)
                    self._inbox.put_nowait((self, event))
            self._lease.prefill_charge.succeeded(PROMPT)
            if not parcel.retained:
                parcel.lose()
        except ServiceError as service_error:
            error = service_error
            self._failed(error.at(PREFILL, self.worker.info.name))
        finally:
            self._lease.prefill_charge.end()
        self._stop_clock()
        self._say(PrefillEnded(error))

    def _note(self, event: prefill_pb2.PrefillEvent, parcel: Parcel) -> None:
        """What must not wait until the request has read its inbox."""
        if event.HasField("compression"):
            self._set_clock(TRANSFER, self._means.limits.transfer_timeout_s)
        elif event.HasField("retained"):
            parcel.keep(event.retained.lease_s)
        elif event.HasField("transfer"):
            self._stop_clock()

    def _set_clock(self, stage: str, timeout_s: float) -> None:
        self._stop_clock()
        self._looks_in_vain = 0
        self._passes_ended = self.worker.info.passes_ended
        self._look(stage, timeout_s, asyncio.get_running_loop().time() + timeout_s)

    def _look(self, stage: str, timeout_s: float, late_at_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._looks_in_vain = self._looks_in_vain + 1 if self.worker.state == UNREACHABLE else 0
        if stage == PREFILL and self._gets_on():
            late_at_s = loop.time() + timeout_s
        if self._looks_in_vain > LOOKS_PER_TIMEOUT or loop.time() >= late_at_s:
            return self._ran_out(stage)
        next_at_s = loop.time() + self._means.limits.token_timeout_s / LOOKS_PER_TIMEOUT
        self._clock = loop.call_at(min(next_at_s, late_at_s), self._look, stage, timeout_s, late_at_s)
        return None

    def _gets_on(self) -> bool:
        """Whether the worker has computed prompts since the last look: ours may stand in a long queue."""
        before, self._passes_ended = self._passes_ended, self.worker.info.passes_ended
        return self._passes_ended > before

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()

    def _ran_out(self, stage: str) -> None:
        """A transfer that hangs is the decode worker's fault, unless it is the prefill worker that fails its polls."""
        at_fault = self.worker
        if stage == TRANSFER and self.worker.state != UNREACHABLE:
            at_fault = self._lease.pair.decode
        error = UnavailableError(f"the worker took too long in stage {stage!r}", reason=f"{stage.upper()}_TIMEOUT")
        self._failed(error.at(stage, at_fault.info.name))
        self._say(PrefillEnded(error))

    def _failed(self, error: ServiceError) -> None:
        """Each of the two knows by the name in `error` whether it is meant."""
        self._lease.prefill_charge.failed(PROMPT, error)
        self._lease.decode_charge.failed(TOKENS, error)

    def _say(self, ended: PrefillEnded) -> None:
        self._inbox.put_nowait((self, ended))
