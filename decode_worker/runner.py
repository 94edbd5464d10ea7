"""The life of one sequence: reserve -> install -> join the batch -> tokens out -> memory back."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vlcache.v1 import inference_pb2 as public

from decode_worker.eviction.kinds import opened, rule_of
from decode_worker.kv_pool.base import Growing, KVPool, SequenceKV, growth_of
from decode_worker.parcel_reader import plain_body
from decode_worker.parking import Parking
from decode_worker.reservations import Reservation, Reservations
from decode_worker.scheduler import DecodeScheduler, NewToken, StepOutcome
from decode_worker.sequence import Sequence
from decode_worker.token_outbox import Subscription, TokenOutbox
from shared.errors import (
    AbortedError,
    FailedPreconditionError,
    InternalError,
    InvalidRequestError,
    ServiceError,
    UnavailableError,
)
from shared.kv.manifest import Manifest
from shared.model.identity import ModelIdentity
from shared.model.text_stream import TextStream
from shared.telemetry.metrics import DecodeMetrics
from shared.threads import run_to_end

log = logging.getLogger(__name__)


class DecodeRunner:
    """Owner of the sequences in flight. Lives on the event loop; the step thread reports through `deliver`."""

    def __init__(
        self,
        *,
        pool: KVPool[Any, Any],
        reservations: Reservations,
        identity: ModelIdentity,
        tokenizer: Any,
        eos_token_ids: frozenset[int],
        promised_tokens: int | None,
        metrics: DecodeMetrics,
    ) -> None:
        self._pool = pool
        self._promised_tokens = promised_tokens
        self._reservations = reservations
        self._identity = identity
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._joined: dict[Sequence, Reservation] = {}
        self._scheduler: DecodeScheduler
        # copies parcels into the pool, so that neither the event loop nor a step waits for memory
        self._install_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="install")
        # asked to leave the batch because someone older needs their memory
        self._evicted: set[Reservation] = set()
        self._parking = Parking(
            pool=pool,
            reservations=reservations,
            thread=self._install_thread,
            promised_tokens=promised_tokens or 1,
            make_room=self._evict_younger,
            rejoin=partial(self._join, first=True),
            fail=self._fail,
        )

    def connect(self, scheduler: DecodeScheduler) -> None:
        """Names the scheduler that delivers here; each of the two needs the other."""
        self._scheduler = scheduler

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the batch or, parked, for memory."""
        return self._scheduler.waiting + self._parking.waiting

    def promised(self, max_new_tokens: int) -> int:
        """New tokens whose room comes with a reservation; the KV of the last token is never needed."""
        growth = max_new_tokens - 1
        return growth if self._promised_tokens is None else min(growth, self._promised_tokens)

    def grow(self, token: bytes, kept_tokens_bound: int) -> Reservation:
        """Promises room for a parcel of at most `kept_tokens_bound` tokens per layer that has not begun to arrive.

        Raises:
            NotFoundError: The reservation has ended.
            AlreadyCommittedError: A delivery is under way or done.
            ResourceExhaustedError: No room now; what was promised stays.
            TooLargeError: The whole pool has no room for it and all its new tokens.
        """
        reservation = self._reservations.find(token)
        self._pool.check_fits(self._pool.bound_bytes(kept_tokens_bound, reservation.max_new_tokens - 1))
        growth = self.promised(reservation.max_new_tokens)
        self._reservations.grow(reservation, self._pool.bound_bytes(kept_tokens_bound, growth))
        return reservation

    def check_parcel(self, reservation: Reservation, manifest: Manifest) -> None:
        """Compares a parcel with what was reserved, before anything is allocated or read.

        Raises:
            FailedPreconditionError: Another model, or another transfer.
            InvalidRequestError: It is larger than the reservation, or no step could be made of it.
            TooLargeError: The whole pool has no room for it and all its new tokens.
        """
        manifest.check_compatible(compatibility=self._identity.compatibility, layout=self._identity.layout)
        transfer = manifest.transfer
        expected = (reservation.request_id, reservation.attempt, reservation.prefill_epoch)
        if (transfer.request_id, transfer.attempt, transfer.prefill_epoch) != expected:
            raise FailedPreconditionError("the parcel belongs to another transfer", reason="TRANSFER_ID")
        if manifest.tokens_to_come < 1:
            # it would have no room for a step, whose failure its whole batch would share
            raise InvalidRequestError("the last token is there already", reason="NOTHING_TO_GENERATE")
        if max(manifest.generated) >= self._identity.vocabulary:
            raise InvalidRequestError("a generated token is not in the vocabulary", reason="GENERATED_TOKEN")
        if manifest.logical_length + manifest.tokens_to_come > self._identity.context_tokens:
            raise InvalidRequestError("prompt and answer exceed the model's context", reason="CONTEXT_LENGTH")
        if self.promised(manifest.sampling.max_new_tokens) < len(manifest.generated):
            # their rows took all the room that was promised for new tokens: not even one step could be made
            raise InvalidRequestError(
                "more tokens were decoded ahead than this worker promises", reason="AHEAD_OF_PROMISE"
            )
        if manifest.sampling.max_new_tokens > reservation.max_new_tokens:
            raise InvalidRequestError("more new tokens than were reserved", reason="OVER_RESERVATION")
        if self._bytes_needed(manifest) > reservation.pool_bytes:
            raise InvalidRequestError("the parcel is larger than its reservation", reason="OVER_RESERVATION")
        # the promise holds fewer new tokens: outgrown, such a sequence would wait for ever
        growth = growth_of(manifest.tokens_to_come, rule_of(manifest))
        self._pool.check_fits(self._pool.sequence_bytes(manifest.num_kept, growth))

    async def install(
        self, reservation: Reservation, manifest: Manifest, body: memoryview, *, verify: bool = True
    ) -> None:
        """Decodes, copies, verifies and activates a parcel whose fill has begun: whole or not at all.

        Args:
            verify: Whether the body must match its digest: always when it came from another process.

        Raises:
            DataLossError: The digest does not match.
            InvalidRequestError: An encoded body contradicts its manifest.
            AbortedError: The reservation ended meanwhile.
        """
        started = time.monotonic()
        work = partial(self._copy, reservation, manifest, body, verify=verify)
        kv = await run_to_end(self._install_thread, work)
        if reservation.ended:
            raise AbortedError("the request was released during its transfer", reason="RELEASED")
        sequence = Sequence.from_manifest(manifest, kv, self._eos_token_ids)
        reservation.text = TextStream(self._tokenizer, manifest.sampling.stop)
        for token in manifest.generated:
            reservation.text.push(token)  # the prefill worker has sent that text
        self._reservations.activate(reservation, sequence, self._bytes_needed(manifest))
        self._metrics.observe_stage("install", time.monotonic() - started)
        self._join_when_ready(reservation)

    def attach(self, reservation: Reservation, outbox: TokenOutbox, handle: int) -> None:
        """Sends the sequence's tokens to an outbox from now on.

        Raises:
            FailedPreconditionError: Someone else reads them, or the handle is taken.
        """
        subscription = Subscription(outbox, handle)
        if reservation.subscription is not None:
            raise FailedPreconditionError("the sequence is attached already", reason="ATTACHED")
        if any(held.subscription == subscription for held in self._reservations):
            raise FailedPreconditionError("the handle is in use", reason="HANDLE")
        reservation.subscription = subscription
        self._join_when_ready(reservation)

    def cancel(self, outbox: TokenOutbox, handle: int) -> None:
        """Ends the sequence behind a handle, if it is still there."""
        for reservation in self._reservations:
            if reservation.subscription == Subscription(outbox, handle):
                self.end(reservation)

    def detach(self, outbox: TokenOutbox) -> None:
        """The reader is gone: ends everything it read."""
        for reservation in self._reservations:
            if reservation.subscription is not None and reservation.subscription.outbox is outbox:
                self.end(reservation)

    def end(self, reservation: Reservation, error: ServiceError | None = None) -> None:
        """Ends a request at whatever stage; a reader hears `error`."""
        if error is not None and reservation.subscription is not None and not reservation.ended:
            reservation.subscription.fail(error)
        if reservation.sequence in self._joined:
            self._scheduler.leave(reservation.sequence)
        self._reservations.end(reservation)

    def expire(self, now: float) -> None:
        """Ends what nobody renewed."""
        for reservation in self._reservations.expired(now):
            self._metrics.labelled(self._metrics.lease_expired, side="decode").inc()
            self.end(reservation, AbortedError("the lease ended without renewal", reason="LEASE_EXPIRED"))

    def deliver(self, outcome: StepOutcome) -> None:
        """Takes the outcome of one step; runs on the event loop."""
        for new_token in outcome.tokens:
            self._pass_on(self._joined[new_token.sequence], new_token)
        for sequence in outcome.failed:
            self.end(self._joined[sequence], InternalError("the decode step failed; the worker's log has the details"))
        for sequence in (*outcome.left, *outcome.failed):
            self._let_go(self._joined.pop(sequence), "evicted")
        for sequence in outcome.outgrown:
            self._let_go(self._joined.pop(sequence), "outgrown")

    async def drain(self, timeout_s: float) -> None:
        """Lets what is in flight finish for `timeout_s`, then ends it."""
        try:
            await asyncio.wait_for(self._reservations.idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            for reservation in self._reservations:
                self.end(reservation, UnavailableError("the worker is shutting down", reason="DRAINING"))
            await self._reservations.idle.wait()

    def close(self) -> None:
        """Ends the threads of a drained worker."""
        self._scheduler.close()
        self._install_thread.shutdown()

    def check_integrity(self) -> None:
        """Asserts that every extent has an owner, and that rows at rest are those that their evictions know."""
        self._reservations.check_integrity()
        for held in self._reservations:
            eviction = held.eviction_at_rest
            if eviction is not None:
                eviction.check_integrity()

    def _copy(self, reservation: Reservation, manifest: Manifest, body: memoryview, *, verify: bool) -> SequenceKV:
        if manifest.encoding is not None:
            body, verify = plain_body(manifest, body, verify=verify), False
        rows, eviction = opened(manifest, body)
        room = self._room(manifest, eviction)
        kv = self._pool.install(reservation.allocation, manifest.num_kept, rows, room, eviction)
        if verify:
            # after the copy: a slot that was reused meanwhile shows
            manifest.check_digest(body)
        if eviction is not None and not eviction.rows.scores.isfinite().all():
            raise InvalidRequestError("a score is not a number", reason="PARCEL_SCORES")
        return kv

    def _room(self, manifest: Manifest, eviction: Growing | None) -> int:
        """New tokens that a sequence comes in with: as promised, or all where eviction makes them cost no more."""
        # the rows of tokens that were decoded ahead take their room from the promise
        fed = len(manifest.generated) - 1
        promised = self.promised(manifest.sampling.max_new_tokens) - fed
        return self._pool.free_room(manifest.num_kept, promised, manifest.tokens_to_come, eviction)

    def _bytes_needed(self, manifest: Manifest) -> int:
        rule = rule_of(manifest)
        return self._pool.sequence_bytes(manifest.num_kept, growth_of(self._room(manifest, rule), rule))

    def _join_when_ready(self, reservation: Reservation) -> None:
        if reservation.sequence is not None and reservation.subscription is not None:
            self._join(reservation)

    def _join(self, reservation: Reservation, *, first: bool = False) -> None:
        assert reservation.sequence is not None
        reservation.in_use = True
        self._joined[reservation.sequence] = reservation
        self._scheduler.join(reservation.sequence, first=first)
        # whoever came before and waits may need its memory
        self._parking.restore()

    def _fail(self, reservation: Reservation) -> None:
        self.end(reservation, InternalError("the KV could not be moved; the worker's log has the details"))

    def _evict_younger(self, waiting: Reservation) -> None:
        """Asks the youngest running sequence to leave for an older one; one at a time, since it may suffice."""
        younger = [sequence for sequence, running in self._joined.items() if running.arrival > waiting.arrival]
        if younger and not self._evicted:
            victim = max(younger, key=lambda sequence: self._joined[sequence].arrival)
            self._evicted.add(self._joined[victim])
            self._scheduler.leave(victim)

    def _let_go(self, reservation: Reservation, reason: str) -> None:
        """The step thread no longer touches the sequence: its memory is free, or it is moved out to come back."""
        self._evicted.discard(reservation)
        finished = reservation.sequence is None or reservation.sequence.finish_reason
        if finished or reservation.ended:
            self._reservations.end(reservation)
            self._reservations.release_memory(reservation)
        else:
            self._metrics.labelled(self._metrics.preemptions, reason=reason).inc()
            self._parking.park(reservation)

    def _pass_on(self, reservation: Reservation, new: NewToken) -> None:
        if reservation.ended:
            return
        try:
            self._send(reservation, new)
        except Exception:
            # a bug, but not one that may hang the rest of the batch
            log.exception("the text of request %s failed", reservation.request_id)
            self.end(reservation, InternalError("the text failed; the worker's log has the details"))

    def _send(self, reservation: Reservation, new: NewToken) -> None:
        assert reservation.text is not None
        assert reservation.subscription is not None
        text, reason = reservation.text.push(new.token), new.finish_reason
        if reservation.text.stopped:
            reason = public.FINISH_REASON_STOP
        if reason:
            text += reservation.text.finish()
        reservation.subscription.send(tokens=[new.token], text=text, finish_reason=reason)
        if reason:
            self.end(reservation)
