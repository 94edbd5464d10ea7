"""A step thread with a scripted engine that takes one permit per step."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import numpy as np

from decode_worker.kv_pool.base import SequenceKV
from decode_worker.scheduler import DecodeScheduler, StepOutcome
from decode_worker.sequence import Sequence
from shared.model.sampler import Drawn, Sampler
from shared.request.sampling import Sampling
from shared.telemetry.metrics import DecodeMetrics

WAIT_S = 10
EOS = 99


class Engine:
    """Takes one permit per step or replay; notes what it was; answers with what `answers` says, else 1."""

    def __init__(self) -> None:
        self.batches: list[list[Sequence]] = []
        self.replays: list[int] = []
        self.permits = threading.Semaphore(0)
        self.stepping = threading.Semaphore(0)
        self.answers: dict[Sequence, list[int | Drawn]] = {}
        self.error: Exception | None = None

    def step(self, batch: list[Sequence]) -> list[Drawn]:
        self._permitted()
        self.batches.append(list(batch))
        self._fail()
        for each in batch:
            each.kv.appended += 1
        return [self._drawn(each) for each in batch]

    def replay(self, each: Sequence, number: int) -> None:
        self._permitted()
        self.replays.append(number)
        self._fail()
        each.kv.appended += number

    def _drawn(self, each: Sequence) -> Drawn:
        answer = self.answers[each].pop(0) if self.answers.get(each) else 1
        return answer if isinstance(answer, Drawn) else Drawn(answer)

    def _permitted(self) -> None:
        self.stepping.release()
        assert self.permits.acquire(timeout=WAIT_S)

    def _fail(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Running:
    """A scheduler, its engine, and what it delivered."""

    def __init__(self, max_num_seqs: int) -> None:
        self.engine = Engine()
        self.outcomes: queue.Queue[StepOutcome] = queue.Queue()
        self.left: list[Sequence] = []
        """Who left between two steps, so far."""
        self.metrics = DecodeMetrics(worker="d", model="m")
        deliver = self.outcomes.put
        self.scheduler = DecodeScheduler(self.engine, deliver, max_num_seqs=max_num_seqs, metrics=self.metrics)  # type: ignore[arg-type]

    def step(self) -> StepOutcome:
        """Lets one step happen and returns its outcome."""
        self.engine.permits.release()
        while True:
            outcome = self.outcomes.get(timeout=WAIT_S)
            if outcome.tokens or outcome.failed:
                return outcome
            self.left += outcome.left

    def in_step(self) -> None:
        """Waits until the thread is inside a step; what happens now belongs to the next one."""
        assert self.engine.stepping.acquire(timeout=WAIT_S)


@contextlib.contextmanager
def running(max_num_seqs: int = 8) -> Iterator[Running]:
    made = Running(max_num_seqs)
    try:
        yield made
    finally:
        made.engine.permits.release(1000)
        made.scheduler.close()
        assert not made.scheduler._thread.is_alive()


def sequence(max_new_tokens: int = 100, room: int = 1000, **changes: bool) -> Sequence:
    return Sequence(
        kv=SequenceKV(kept=np.ones((1, 1), dtype=np.int64), room=room),
        sampler=Sampler(Sampling(max_new_tokens=max_new_tokens, **changes), frozenset({EOS})),
        last_token=0,
        next_position=10,
    )


def stepped(outcome: StepOutcome) -> list[Sequence]:
    return [new.sequence for new in outcome.tokens]
