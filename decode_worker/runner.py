"""The life of a request's sequences: reserve -> install -> join the batch -> tokens out -> memory back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence as Batch
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vlcache.v1 import inference_pb2 as public

from decode_worker.answers import Answer, Reservation
from decode_worker.arrivals import Arrivals
from decode_worker.kv_pool.base import KVPool
from decode_worker.parking import Parking
from decode_worker.promise import Arrival, Promise
from decode_worker.replay import tokens_to_replay
from decode_worker.reservations import Reservations
from decode_worker.scheduler import DecodeScheduler, NewToken, StepOutcome
from decode_worker.sequence import Sequence, resumed
from decode_worker.token_outbox import Subscription, TokenOutbox
from shared.errors import (
    AbortedError,
    FailedPreconditionError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from shared.kv.manifest import Manifest
from shared.model.grammar import Grammar
from shared.model.grammars import Grammars
from shared.model.identity import ModelIdentity
from shared.model.text_stream import TextStream
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
        self._arrivals = Arrivals(pool=pool, promise=self.promise)
        self._joined: dict[Sequence, Answer] = {}
        self._scheduler: DecodeScheduler
        # copies parcels into the pool, so that neither the event loop nor a step waits for memory
        self._install_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="install")
        # asked to leave the batch because someone older needs their memory
        self._evicted: set[Answer] = set()
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
        delivered = {choice: answer.delivered_tokens for choice, answer in reservation.answers.items()}
        new = (kept_tokens_bound, reservation.max_new_tokens, delivered)
        self._reservations.grow(reservation, self.promise.wanted(*new, copies=not reservation.shares))
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
        for choice, answer in list(reservation.answers.items()):
            if choice not in manifest.choices:
                self.end(answer, NotFoundError("the answer had ended before its parcel came", reason="NO_ANSWER"))
        _check_goes_on(reservation)
        arrival = self.promise.arrival(reservation, manifest)
        # of those that end meanwhile the memory stays as long as it is written
        answers = [reservation.answers[choice] for choice in arrival.alone]
        work = partial(self._copy, answers, arrival, manifest, body, grammar, verify=verify, in_waves=in_waves)
        sequences = await run_to_end(self._install_thread, work)
        _check_goes_on(reservation)
        for choice, answer in reservation.answers.items():
            self._begin_text(answer, arrival.alone[choice])
        layout = manifest.layout
        kept_bytes = layout.body_bytes(manifest.num_kept)
        reservation.saved_bytes = max(0, layout.full_bytes(manifest.logical_length) - kept_bytes)
        reservation.shared_rows = arrival.shared_rows
        self._reservations.activate(reservation, sequences, arrival.wanted)
        self._metrics.observe_stage("install", time.monotonic() - started)
        for answer in list(reservation.answers.values()):
            self._join_when_ready(answer)

    def attach(
        self,
        reservation: Reservation,
        outbox: TokenOutbox,
        handle: int,
        delivered: tuple[int, ...] = (),
        choice: int = 0,
    ) -> None:
        """Sends the tokens of one answer to an outbox from now on.

        Args:
            delivered: The answer as its reader has it; what follows it is sent. Where it is not the parcel's answer,
                it ends as soon as the parcel is there.

        Raises:
            NotFoundError: That answer has ended, or was not reserved.
            FailedPreconditionError: Someone else reads it, or the handle is taken.
        """
        subscription, answer = Subscription(outbox, handle), reservation.answers.get(choice)
        if answer is None:
            raise NotFoundError("the answer has ended", reason="NO_ANSWER")
        if answer.subscription is not None:
            raise FailedPreconditionError("the sequence is attached already", reason="ATTACHED")
        if any(held.subscription == subscription for held in self._reservations.answers):
            raise FailedPreconditionError("the handle is in use", reason="HANDLE")
        answer.subscription, answer.delivered = subscription, delivered
        self._join_when_ready(answer)

    def cancel(self, outbox: TokenOutbox, handle: int) -> None:
        """Ends the sequence behind a handle, if it is still there."""
        for answer in self._reservations.answers:
            if answer.subscription == Subscription(outbox, handle):
                self.end(answer)

    def detach(self, outbox: TokenOutbox) -> None:
        """The reader is gone: ends everything it read."""
        for answer in self._reservations.answers:
            if answer.subscription is not None and answer.subscription.outbox is outbox:
                self.end(answer)

    def end_all(self, reservation: Reservation, error: ServiceError | None = None) -> None:
        """Ends all answers of a request at whatever stage; readers hear `error`."""
        for answer in list(reservation.answers.values()):
            self.end(answer, error)

    def end(self, answer: Answer, error: ServiceError | None = None) -> None:
        """Ends an answer at whatever stage; a reader hears `error`."""
        if error is not None and answer.subscription is not None and not answer.ended:
            answer.subscription.fail(error)
        if answer.sequence in self._joined:
            self._scheduler.leave(answer.sequence)
        first_end = not answer.ended
        self._reservations.end(answer)
        if first_end:
            _close_span(answer, error)

    def expire(self, now: float) -> None:
        """Ends what nobody renewed."""
        expired = self._reservations.expired(now)
        leases = {answer.reservation.token for answer in expired}
        self._metrics.labelled(self._metrics.lease_expired, side="decode").inc(len(leases))
        for answer in expired:
            self.end(answer, AbortedError("the lease ended without renewal", reason="LEASE_EXPIRED"))

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
            for answer in self._reservations.answers:
                self.end(answer, UnavailableError("the worker is shutting down", reason="DRAINING"))
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
        for answer in self._reservations.answers:
            eviction = answer.eviction_at_rest
            if eviction is not None:
                eviction.check_integrity()

    def _copy(
        self,
        answers: Batch[Answer],
        arrival: Arrival,
        manifest: Manifest,
        body: memoryview,
        grammar: Grammar | None,
        *,
        verify: bool,
        in_waves: bool,
    ) -> dict[int, Sequence]:
        """By choice."""
        samplers = {choice: resumed(alone, self._eos_token_ids, grammar) for choice, alone in arrival.alone.items()}
        kvs = self._arrivals.copy(answers, arrival, manifest, body, verify=verify, in_waves=in_waves)
        return {
            answer.choice: Sequence.from_manifest(
                arrival.alone[answer.choice], kvs[answer.choice], samplers[answer.choice], answer.scope
            )
            for answer in answers
        }

    def _begin_text(self, answer: Answer, alone: Manifest) -> None:
        sampling = alone.sampling
        answer.text = TextStream(self._tokenizer, sampling.stop, min_tokens=sampling.min_new_tokens)
        for token in alone.generated:
            answer.text.push(token)  # the prefill worker has sent that text
        answer.arrived = alone.generated

    def _join_when_ready(self, answer: Answer) -> None:
        if answer.sequence is None or answer.subscription is None:
            return
        try:
            self._name_known(answer, answer.sequence)
        except InvalidRequestError as error:
            self.end(answer, error)
        else:
            self._join(answer)

    def _name_known(self, answer: Answer, sequence: Sequence) -> None:
        known = tokens_to_replay(
            answer.delivered,
            answer.arrived,
            max_new_tokens=sequence.sampling.max_new_tokens,
            vocabulary=self._identity.vocabulary,
        )
        sequence.known.extend(known)
        sequence.known_since = time.monotonic()

    def _join(self, answer: Answer, *, first: bool = False) -> None:
        assert answer.sequence is not None
        answer.in_use = True
        self._joined[answer.sequence] = answer
        self._scheduler.join(answer.sequence, first=first)
        # whoever came before and waits may need its memory
        self._parking.restore()

    def _fail(self, reservation: Reservation) -> None:
        error = InternalError("the KV could not be moved; the worker's log has the details")
        self.end_all(reservation, error)

    def _evict_younger(self, waiting: Answer) -> None:
        """Asks the youngest running sequence to leave for an older one; one at a time, since it may suffice."""
        younger = [sequence for sequence, running in self._joined.items() if running.arrival > waiting.arrival]
        if younger and not self._evicted:
            victim = max(younger, key=lambda sequence: self._joined[sequence].arrival)
            self._evicted.add(self._joined[victim])
            self._scheduler.leave(victim)

    def _let_go(self, answer: Answer, reason: str) -> None:
        """The step thread no longer touches the sequence: its memory is free, or it is moved out to come back."""
        self._evicted.discard(answer)
        finished = answer.sequence is None or answer.sequence.finish_reason
        if finished or answer.ended:
            self._reservations.end(answer)
            self._reservations.release_memory(answer)
        else:
            self._metrics.labelled(self._metrics.preemptions, reason=reason).inc()
            self._parking.park(answer)

    def _pass_on(self, answer: Answer, new: NewToken) -> None:
        if answer.ended:
            return
        try:
            self._send(answer, new)
        except Exception:
            # a bug, but not one that may hang the rest of the batch
            with within(answer.scope):
                log.exception("the text of a request failed")
            self.end(answer, InternalError("the text failed; the worker's log has the details"))

    def _send(self, answer: Answer, new: NewToken) -> None:
        assert answer.text is not None
        assert answer.subscription is not None
        text, reason = answer.text.push(new.token), new.finish_reason
        if new.known:
            return  # the reader has it, and its text
        if answer.text.stopped:
            reason = public.FINISH_REASON_STOP
        if reason:
            text += answer.text.finish()
        logprobs = [new.logprobs.to_proto(self._tokenizer)] if new.logprobs else ()
        answer.subscription.send(tokens=[new.token], text=text, finish_reason=reason, logprobs=logprobs)
        if reason:
            self.end(answer)


def _check_goes_on(reservation: Reservation) -> None:
    if reservation.ended:
        raise AbortedError("the request was released during its transfer", reason="RELEASED")


def _close_span(answer: Answer, error: ServiceError | None) -> None:
    """An ended answer is a stage of the span, which ends with the last of them."""
    span, sequence = answer.scope.span, answer.sequence
    if sequence is not None and sequence.runs_since:
        told = {"generated_tokens": sequence.generated, "choice": answer.choice}
        span.stage("decode", time.monotonic() - sequence.runs_since, told)
    if answer.reservation.ended:
        span.end(error.code if error else "")
