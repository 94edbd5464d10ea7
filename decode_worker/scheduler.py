"""Continuous batching: one thread steps the running batch; sequences join and leave between steps.

A sequence that goes on here after its worker was lost first has the tokens of its answer fed again: many in one pass,
between two steps of the others, which wait for one such pass at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from decode_worker.engine import DecodeEngine
from decode_worker.sequence import FinishReason, Sequence
from shared.errors import ServiceError
from shared.model.logprobs import Logprobs
from shared.telemetry.metrics import DecodeMetrics
from shared.telemetry.scope import within

log = logging.getLogger(__name__)

Fed = TypeVar("Fed")


@dataclass(frozen=True)
class NewToken:
    """A token of a step. The reason is a copy: by the time it is read, the sequence may be steps ahead.

    `known` says that it was drawn before, by a lost worker; `logprobs` are there where the request wants them.
    """

    sequence: Sequence
    token: int
    finish_reason: FinishReason
    known: bool = False
    logprobs: Logprobs | None = None


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What happened in a step, or between two of them.

    The step thread no longer touches the sequences in `left` (asked to, or finished), `outgrown` (no room for their
    next token), `failed`, and `refused` (nothing may follow, for the reason beside them).
    """

    tokens: list[NewToken] = field(default_factory=list)
    left: list[Sequence] = field(default_factory=list)
    outgrown: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    refused: list[tuple[Sequence, ServiceError]] = field(default_factory=list)


class DecodeScheduler:
    """Owner of the running batch.

    `join` and `leave` may be called from any thread and never wait for a step. `deliver` is called from the step
    thread, after every step or replay and when a sequence has left, and must not block. A step waits for nothing:
    transfers, text and streams are elsewhere.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        deliver: Callable[[StepOutcome], None],
        *,
        max_num_seqs: int,
        metrics: DecodeMetrics,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._max_num_seqs = max_num_seqs
        self._metrics = metrics
        self._changed = threading.Condition()
        self._joining: deque[Sequence] = deque()
        self._leaving: set[Sequence] = set()
        self._stopping = False
        # first come, first served: a sequence is stepped until it ends, so none starves
        self._running: list[Sequence] = []
        self._pass_since: float | None = None
        self._thread = threading.Thread(target=self._loop, name="step", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in the batch."""
        return len(self._joining)

    @property
    def pass_s(self) -> float:
        """For how long the model has been at its present pass, seconds; 0 between passes."""
        since = self._pass_since
        return 0.0 if since is None else time.monotonic() - since

    def join(self, sequence: Sequence, *, first: bool = False) -> None:
        """Adds a sequence before the next step in which there is a place; it has room for that one.

        Args:
            first: Before all others that wait for a place: someone is in the middle of reading it.
        """
        assert not sequence.kv.full, "a step would write beyond the sequence's memory"
        sequence.waits_since = time.monotonic()
        with self._changed:
            # asked when it was out already
            self._leaving.discard(sequence)
            if first:
                self._joining.appendleft(sequence)
            else:
                self._joining.append(sequence)
            self._changed.notify()

    def leave(self, sequence: Sequence) -> None:
        """Takes a sequence out before the next step; it appears in `left`, unless it has left by itself."""
        with self._changed:
            self._leaving.add(sequence)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after the current step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _loop(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One step and what comes before it; False when the scheduler is closed."""
        left = self._admit()
        if left is None:
            return False
        if left:
            # at once: someone may wait for their memory, and need not wait for the step
            self._deliver(StepOutcome(left=left))
        replaying = next((sequence for sequence in self._running if sequence.replays), None)
        if replaying is not None:
            self._deliver(self._timed(self._replay, replaying))
        batch = [sequence for sequence in self._running if not sequence.replays]
        if batch:
            self._deliver(self._timed(self._step, batch))
        return True

    def _timed(self, run: Callable[[Fed], StepOutcome], fed: Fed) -> StepOutcome:
        self._pass_since = time.monotonic()
        try:
            return run(fed)
        finally:
            self._pass_since = None

    def _admit(self) -> list[Sequence] | None:
        """Waits for work; returns the sequences that left, or None when the scheduler is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._joining or self._leaving or self._running)
            if self._stopping:
                return None
            left = self._remove(self._leaving)
            self._leaving = set()
            while self._joining and len(self._running) < self._max_num_seqs:
                joins = self._joining.popleft()
                now = time.monotonic()
                joins.runs_since = joins.runs_since or now
                with within(joins.scope):
                    self._metrics.observe_stage("decode_queue", now - joins.waits_since)
                self._running.append(joins)
            return left

    def _remove(self, leaving: Iterable[Sequence]) -> list[Sequence]:
        left = [sequence for sequence in (*self._running, *self._joining) if sequence in leaving]
        self._running = [sequence for sequence in self._running if sequence not in leaving]
        self._joining = deque(sequence for sequence in self._joining if sequence not in leaving)
        return left

    def _step(self, batch: list[Sequence]) -> StepOutcome:
        started = time.monotonic()
        try:
            drawn = self._engine.step(batch)
        except Exception:
            # a bug, but not one that may hang the clients of this worker
            log.exception("a step of %d sequences failed", len(batch))
            self._let_go(batch)
            return StepOutcome(failed=batch)
        self._metrics.step_seconds.observe(time.monotonic() - started)
        self._metrics.batch_size.observe(len(batch))
        new_tokens = []
        refused: list[tuple[Sequence, ServiceError]] = []
        for sequence, each in zip(batch, drawn, strict=True):
            if sequence.known:
                new_tokens += self._recall(sequence, 1)
                continue
            if each.refusal is not None:
                refused.append((sequence, each.refusal))
                continue
            sequence.accept(each)
            new_tokens.append(NewToken(sequence, each.token, sequence.finish_reason, logprobs=each.logprobs))
        finished = [sequence for sequence in batch if sequence.finish_reason]
        going = {new.sequence for new in new_tokens if not new.sequence.finish_reason}
        outgrown = [sequence for sequence in batch if sequence.kv.full and sequence in going]
        self._let_go([*finished, *outgrown, *(sequence for sequence, _ in refused)])
        return StepOutcome(tokens=new_tokens, left=finished, outgrown=outgrown, refused=refused)

    def _replay(self, sequence: Sequence) -> StepOutcome:
        """One pass, as large as a batch and the sequence's room allow."""
        number = min(len(sequence.known), self._max_num_seqs, sequence.kv.room - sequence.kv.appended)
        try:
            self._engine.replay(sequence, number)
        except Exception:
            # nobody else had a part in it
            with within(sequence.scope):
                log.exception("a replay of %d tokens failed", number)
            self._let_go([sequence])
            return StepOutcome(failed=[sequence])
        tokens = self._recall(sequence, number)
        outgrown = [sequence] if sequence.kv.full else []
        self._let_go(outgrown)
        return StepOutcome(tokens=tokens, outgrown=outgrown)

    def _let_go(self, gone: list[Sequence]) -> None:
        self._running = [sequence for sequence in self._running if sequence not in gone]

    def _recall(self, sequence: Sequence, number: int) -> list[NewToken]:
        tokens = [NewToken(sequence, sequence.recall(), sequence.finish_reason, known=True) for _ in range(number)]
        self._metrics.replayed_tokens.inc(number)
        if not sequence.known:
            with within(sequence.scope):
                self._metrics.observe_stage("replay", time.monotonic() - sequence.known_since)
        return tokens
