"""The life of one sequence: reserve -> install -> join the batch -> tokens out -> memory back."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vlcache.v1 import inference_pb2 as public

from decode_worker.eviction.kinds import opened
from decode_worker.kv_pool.base import KVPool
from decode_worker.kv_pool.seen_rows import SeenRows
from decode_worker.parcel_reader import plain_body
from decode_worker.parking import Parking
from decode_worker.promise import Promise
from decode_worker.replay import tokens_to_replay
from decode_worker.reservations import Reservation, Reservations
from decode_worker.scheduler import DecodeScheduler, NewToken, StepOutcome
from decode_worker.sequence import Sequence, resumed
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
from shared.model.grammar import Grammar
from shared.model.grammars import Grammars
from shared.model.identity import ModelIdentity
from shared.model.text_stream import TextStream
from shared.model.wave_order import in_body_order
from shared.telemetry.metrics import DecodeMetrics
from shared.telemetry.scope import within
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
        self.promise = Promise(pool=pool, identity=identity, new_tokens=promised_tokens)
        self._reservations = reservations
        self._identity = identity
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._grammars = Grammars(tokenizer, vocabulary=identity.vocabulary, eos_token_ids=eos_token_ids)
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

    def grow(self, token: bytes, kept_tokens_bound: int) -> Reservation:
        """Promises room for a parcel of at most `kept_tokens_bound` tokens per layer that has not begun to arrive.

        Raises:
            NotFoundError: The reservation has ended.
            AlreadyCommittedError: A delivery is under way or done.
            ResourceExhaustedError: No room now; what was promised stays.
            TooLargeError: The whole pool has no room for it and all its new tokens.
        """
        reservation = self._reservations.find(token)
        new = (reservation.max_new_tokens, reservation.delivered_tokens)
        self._reservations.grow(reservation, self.promise.nbytes(kept_tokens_bound, *new))
        return reservation

    async def install(
        self,
        reservation: Reservation,
        manifest: Manifest,
        body: memoryview,
        *,
        verify: bool = True,
        in_waves: bool = False,
    ) -> None:
        """Decodes, copies, verifies and activates a parcel whose fill has begun: whole or not at all.

        Args:
            verify: Whether the body must match its digest: always when it came from another process.
            in_waves: Whether the body lies as `shared/kv/waves.py` says.

        Raises:
            DataLossError: The digest does not match.
            InvalidRequestError: An encoded body contradicts its manifest, or its answer the constraint.
            AbortedError: The reservation ended meanwhile.
        """
        started = time.monotonic()
        grammar = await self._grammars.of(manifest.sampling.constraint)
        work = partial(self._copy, reservation, manifest, body, grammar, verify=verify, in_waves=in_waves)
        sequence = await run_to_end(self._install_thread, work)
        if reservation.ended:
            raise AbortedError("the request was released during its transfer", reason="RELEASED")
        sampling = manifest.sampling
        reservation.text = TextStream(self._tokenizer, sampling.stop, min_tokens=sampling.min_new_tokens)
        for token in manifest.generated:
            reservation.text.push(token)  # the prefill worker has sent that text
        reservation.arrived = manifest.generated
        layout = manifest.layout
        kept_bytes = layout.body_bytes(manifest.num_kept)
        reservation.saved_bytes = max(0, layout.full_bytes(manifest.logical_length) - kept_bytes)
        self._reservations.activate(reservation, sequence, self.promise.bytes_needed(reservation, manifest))
        self._metrics.observe_stage("install", time.monotonic() - started)
        self._join_when_ready(reservation)

    def attach(
        self, reservation: Reservation, outbox: TokenOutbox, handle: int, delivered: tuple[int, ...] = ()
    ) -> None:
        """Sends the sequence's tokens to an outbox from now on.

        Args:
            delivered: The answer as its reader has it; what follows it is sent. Where it is not the parcel's answer,
                the request ends as soon as the parcel is there.

        Raises:
            FailedPreconditionError: Someone else reads them, or the handle is taken.
        """
        subscription = Subscription(outbox, handle)
        if reservation.subscription is not None:
            raise FailedPreconditionError("the sequence is attached already", reason="ATTACHED")
        if any(held.subscription == subscription for held in self._reservations):
            raise FailedPreconditionError("the handle is in use", reason="HANDLE")
        reservation.subscription, reservation.delivered = subscription, delivered
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
        if not reservation.ended:
            _close_span(reservation, error)
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
        for sequence, error in outcome.refused:
            self.end(self._joined[sequence], error)
        for sequence in (*outcome.left, *outcome.failed, *(sequence for sequence, _ in outcome.refused)):
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
        self._grammars.close()

    def check_integrity(self) -> None:
        """Asserts that every extent has an owner, and that rows at rest are those that their evictions know."""
        self._reservations.check_integrity()
        self._grammars.check_integrity()
        for held in self._reservations:
            eviction = held.eviction_at_rest
            if eviction is not None:
                eviction.check_integrity()

    def _copy(
        self,
        reservation: Reservation,
        manifest: Manifest,
        body: memoryview,
        grammar: Grammar | None,
        *,
        verify: bool,
        in_waves: bool,
    ) -> Sequence:
        sampler = resumed(manifest, self._eos_token_ids, grammar)
        if in_waves:
            body = in_body_order(manifest, body)
        if manifest.encoding is not None:
            body, verify = plain_body(manifest, body, verify=verify), False
        rows, eviction = opened(manifest, body)
        room = self.promise.room(reservation, manifest, eviction)
        seen = SeenRows.of(manifest)
        kv = self._pool.install(reservation.allocation, manifest.num_kept, rows, room, eviction, seen)
        if verify:
            # after the copy: a slot that was reused meanwhile shows
            manifest.check_digest(body)
        if eviction is not None and not eviction.rows.scores.isfinite().all():
            raise InvalidRequestError("a score is not a number", reason="PARCEL_SCORES")
        return Sequence.from_manifest(manifest, kv, sampler, reservation.scope)

    def _join_when_ready(self, reservation: Reservation) -> None:
        if reservation.sequence is None or reservation.subscription is None:
            return
        try:
            self._name_known(reservation, reservation.sequence)
        except InvalidRequestError as error:
            self.end(reservation, error)
        else:
            self._join(reservation)

    def _name_known(self, reservation: Reservation, sequence: Sequence) -> None:
        known = tokens_to_replay(
            reservation.delivered,
            reservation.arrived,
            max_new_tokens=sequence.sampling.max_new_tokens,
            vocabulary=self._identity.vocabulary,
        )
        sequence.known.extend(known)
        sequence.known_since = time.monotonic()

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
            with within(reservation.scope):
                log.exception("the text of a request failed")
            self.end(reservation, InternalError("the text failed; the worker's log has the details"))

    def _send(self, reservation: Reservation, new: NewToken) -> None:
        assert reservation.text is not None
        assert reservation.subscription is not None
        text, reason = reservation.text.push(new.token), new.finish_reason
        if new.known:
            return  # the reader has it, and its text
        if reservation.text.stopped:
            reason = public.FINISH_REASON_STOP
        if reason:
            text += reservation.text.finish()
        logprobs = [new.logprobs.to_proto(self._tokenizer)] if new.logprobs else ()
        reservation.subscription.send(tokens=[new.token], text=text, finish_reason=reason, logprobs=logprobs)
        if reason:
            self.end(reservation)


def _close_span(reservation: Reservation, error: ServiceError | None) -> None:
    span, sequence = reservation.scope.span, reservation.sequence
    if sequence is not None and sequence.runs_since:
        span.stage("decode", time.monotonic() - sequence.runs_since, {"generated_tokens": sequence.generated})
    span.end(error.code if error else "")
