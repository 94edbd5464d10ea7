"""Which workers a request is on, and how it gets onto others."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from dataclasses import replace

from vlcache.v1 import inference_pb2 as pb

from router.admission.admission import BegunAnswer, Lease
from router.admission.retention import Offer
from router.deadline import Deadline
from router.requests.attempt import Attempt
from router.requests.delivery import Delivery
from router.requests.inbox import Inbox
from router.requests.means import Means
from router.requests.parcels import Parcel
from router.requests.prefill_call import PrefillCall
from router.requests.recovery import LostError
from router.requests.resend import resend
from router.stages import DECODE, PREFILL, QUEUE, TRANSFER
from router.validation import AcceptedRequest
from router.workers.worker import Worker


class Course:
    """One prefill call with the parcel that it leaves, and one attempt on a decode worker; each may be replaced.

    `inbox` gets what both say. `close` ends both, at any moment.
    """

    def __init__(self, request: AcceptedRequest, means: Means, *, delivery: Delivery, deadline: Deadline) -> None:
        """No worker is asked before `compute_prompt`."""
        self.inbox = Inbox()
        self.stage = QUEUE
        self._request = request
        self._means = means
        self._delivery = delivery
        self._deadline = deadline
        self._call: PrefillCall | None = None
        self._attempt: Attempt | None = None
        self._moving: asyncio.Task[object] | None = None

    @property
    def call(self) -> PrefillCall:
        """The last run of the prompt."""
        assert self._call is not None
        return self._call

    @property
    def attempt(self) -> Attempt:
        """The last reservation."""
        assert self._attempt is not None
        return self._attempt

    async def compute_prompt(self, avoid: Collection[Worker]) -> None:
        """Finds a pair and sends it the prompt, with what the client has of the answer.

        Raises:
            ServiceError: No pair, no memory, or no time.
        """
        begun = self._begun(self.attempt.lease.offer) if self._delivery.begun else None
        self.close()
        self.stage = QUEUE
        lease = await self._means.admission.reserve(self._request, deadline=self._deadline, avoid=avoid, begun=begun)
        self._attempt = self._attempt_on(lease)
        self._call = PrefillCall(lease, self.inbox, self._means)
        self._delivery.rewind()
        self.stage = PREFILL
        self._call.start(self._request, self._delivery.answers, self._deadline)

    async def resend_parcel(self, avoid: Collection[Worker]) -> pb.Transfer:
        """Has the parcel sent to another decode worker and goes on there.

        Raises:
            LostError: It did not arrive.
            ServiceError: No decode worker, no memory, or no time.
        """
        assert self.call.parcel is not None
        self.attempt.close()
        self.stage = QUEUE
        begun = self._begun(self._parcel_offer(), holder=self.call.worker)
        lease = await self._means.admission.reserve(self._request, deadline=self._deadline, avoid=avoid, begun=begun)
        self._attempt = self._attempt_on(lease)
        self.stage = TRANSFER
        transfer = await self._resend(self.call.parcel, lease)
        # it may still hang on the worker that was lost, and keeps the parcel while it does
        self.call.ended = True
        self._go_on()
        return transfer

    @property
    def can_leave(self) -> bool:
        """Whether the decode worker is leaving, and the parcel is there to go on with elsewhere."""
        if self._call is None or self._attempt is None or self._moving is not None:
            return False
        parcel, attempt = self._call.parcel, self._attempt
        has_parcel = self._call.ended and parcel is not None and not parcel.gone
        return has_parcel and attempt.is_open and attempt.attached and attempt.worker.leaves

    async def leave(self) -> pb.Transfer | None:
        """Goes on at another decode worker that has room at once; the old one works on until the parcel is there.

        Called while `can_leave`; None when it stays for now.

        Raises:
            ServiceError: There is no other decode worker.
        """
        old, parcel = self.attempt, self.call.parcel
        assert parcel is not None
        begun = self._begun(self._parcel_offer(), holder=parcel.worker)
        self._moving = asyncio.current_task()
        try:
            lease = await self._means.admission.reserve_now(
                self._request, deadline=self._deadline, avoid={old.worker}, begun=begun
            )
            return await self._move(old, parcel, lease) if lease is not None else None
        finally:
            self._moving = None

    def close(self) -> None:
        """Ends what runs on either worker. Idempotent; does not wait."""
        if self._moving is not None:
            self._moving.cancel()
        if self._attempt is not None:
            self._attempt.close()
        if self._call is not None:
            self._call.close()

    async def _move(self, old: Attempt, parcel: Parcel, lease: Lease) -> pb.Transfer | None:
        spare = self._attempt_on(lease)
        try:
            transfer = await self._resend(parcel, lease)
            if self._attempt is not old or not old.is_open:
                # it ended meanwhile, or was lost and goes on elsewhere
                return None
            self._attempt, spare = spare, old
            old.close()
            self._go_on()
            return transfer
        except LostError:
            return None
        finally:
            spare.close()

    def _go_on(self) -> None:
        """What of the old attempt is still in line is passed over: the new one says it again."""
        self.stage = DECODE
        self.attempt.attach(self._delivery.open_answers)

    async def _resend(self, parcel: Parcel, lease: Lease) -> pb.Transfer:
        timeout_s = self._means.limits.transfer_timeout_s
        return await resend(parcel, lease, timeout_s=timeout_s, deadline=self._deadline)

    def _attempt_on(self, lease: Lease) -> Attempt:
        return Attempt(lease, self.inbox, self._means.background)

    def _begun(self, offer: Offer, *, holder: Worker | None = None) -> BegunAnswer:
        delivered = {choice: len(tokens) for choice, tokens in self._delivery.open_answers.items()}
        return BegunAnswer(offer=offer, delivered_tokens=delivered, holder=holder)

    def _parcel_offer(self) -> Offer:
        """What the parcel takes: more than its budget said where the quality guard has raised it."""
        offer, report = self.attempt.lease.offer, self._delivery.compression
        assert report is not None, "there is no parcel before its compression"
        kept = math.ceil(report.kept_bytes / self.attempt.worker.layout.token_bytes)
        return replace(offer, kept_tokens_bound=max(offer.kept_tokens_bound, kept))
