"""The step thread with a scripted engine: who is stepped when, and that nothing ends it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from vlcache.v1 import inference_pb2 as public

from decode_worker.kv_pool.base import SequenceKV
from decode_worker.scheduler import DecodeScheduler, StepOutcome
from decode_worker.sequence import Sequence
from shared.request.params import Sampling
from shared.telemetry.metrics import DecodeMetrics

WAIT_S = 10
EOS = 99


class Engine:
    """Takes one permit per step; notes the batch; answers with what `answers` says, else 1."""

    def __init__(self) -> None:
        self.batches: list[list[Sequence]] = []
        self.permits = threading.Semaphore(0)
        self.stepping = threading.Semaphore(0)
        self.answers: dict[Sequence, list[int]] = {}
        self.error: Exception | None = None

    def step(self, batch: list[Sequence]) -> list[int]:
        self.stepping.release()
        assert self.permits.acquire(timeout=WAIT_S)
        self.batches.append(list(batch))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        for each in batch:
            each.kv.appended += 1
        return [self.answers[each].pop(0) if self.answers.get(each) else 1 for each in batch]


class Running:
    """A scheduler, its engine, and what it delivered."""

    def __init__(self, max_batch: int) -> None:
        self.engine = Engine()
        self.outcomes: queue.Queue[StepOutcome] = queue.Queue()
        self.left: list[Sequence] = []
        """Who left between two steps, so far."""
        metrics = DecodeMetrics(worker="d", model="m")
        deliver = self.outcomes.put
        self.scheduler = DecodeScheduler(self.engine, deliver, max_batch=max_batch, metrics=metrics)  # type: ignore[arg-type]

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
def running(max_batch: int = 8) -> Iterator[Running]:
    made = Running(max_batch)
    try:
        yield made
    finally:
        made.engine.permits.release(1000)
        made.scheduler.close()
        assert not made.scheduler._thread.is_alive()


def sequence(max_new_tokens: int = 100, room: int = 1000, **changes: bool) -> Sequence:
    return Sequence(
        kv=SequenceKV(kept=np.ones((1, 1), dtype=np.int64), room=room),
        sampling=Sampling(max_new_tokens=max_new_tokens, **changes),
        eos_token_ids=frozenset({EOS}),
        last_token=0,
        next_position=10,
    )


def stepped(outcome: StepOutcome) -> list[Sequence]:
    return [new.sequence for new in outcome.tokens]


def test_sequences_join_between_steps() -> None:
    with running() as it:
        first, second = sequence(), sequence()
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.join(second)
        assert stepped(it.step()) == [first]
        assert stepped(it.step()) == [first, second]
        assert (it.scheduler.running, it.scheduler.waiting) == (2, 0)


def test_sequences_leave_between_steps_and_are_handed_back_once() -> None:
    with running() as it:
        first, second = sequence(), sequence()
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.join(second)
        it.step()
        it.in_step()
        it.scheduler.leave(first)
        both = it.step()
        assert (stepped(both), both.left, it.left) == ([first, second], [], [])
        after = it.step()
        assert (stepped(after), after.left, it.left) == ([second], [], [first])
        it.step()
        assert it.left == [first]


def test_who_leaves_is_handed_back_before_the_next_step_ends() -> None:
    """Someone may wait for their memory."""
    with running() as it:
        first, second = sequence(), sequence()
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.join(second)
        it.scheduler.leave(first)
        assert stepped(it.step()) == [first]
        it.in_step()
        assert it.outcomes.get(timeout=WAIT_S).left == [first]
        assert it.engine.batches == [[first]], "the second is still being stepped"


def test_an_outgrown_sequence_is_handed_back_with_its_last_step() -> None:
    with running() as it:
        small, large = sequence(room=2), sequence()
        it.scheduler.join(small)
        it.in_step()
        it.scheduler.join(large)
        first = it.step()
        assert (stepped(first), first.outgrown, small.kv.full) == ([small], [], False)
        second = it.step()
        assert (stepped(second), second.outgrown, second.left) == ([small, large], [small], [])
        assert stepped(it.step()) == [large]
        assert (it.scheduler.running, it.left) == (1, [])


def test_two_may_outgrow_and_one_finish_in_one_step() -> None:
    with running() as it:
        made = [sequence(room=1), sequence(max_new_tokens=2, room=1), sequence(room=1), sequence()]
        it.scheduler.join(made[3])
        it.in_step()
        for each in made[:3]:
            it.scheduler.join(each)
        it.step()
        outcome = it.step()
        assert stepped(outcome) == [made[3], *made[:3]]
        assert (outcome.outgrown, outcome.left) == ([made[0], made[2]], [made[1]]), "a finished one has not outgrown"


def test_an_outgrown_batch_leaves_the_thread_idle() -> None:
    with running() as it:
        only = sequence(room=1)
        it.scheduler.join(only)
        assert it.step().outgrown == [only]
        assert it.scheduler.running == 0
        only.kv.room += 1
        it.scheduler.join(only)
        assert stepped(it.step()) == [only], "back with more room"


def test_a_leave_that_came_too_late_is_forgotten_when_it_joins_again() -> None:
    with running() as it:
        moved, other = sequence(room=1), sequence()
        it.scheduler.join(moved)
        it.in_step()
        it.scheduler.join(other)
        assert it.step().outgrown == [moved]
        it.in_step()
        it.scheduler.leave(moved)
        moved.kv.room += 5
        it.scheduler.join(moved)
        it.step()
        assert stepped(it.step()) == [other, moved]
        assert it.left == []


def test_who_comes_back_goes_before_those_that_have_not_begun() -> None:
    """A pause in the middle of an answer is worse than a late start."""
    with running(max_batch=1) as it:
        moved, waiting = sequence(room=1), sequence()
        it.scheduler.join(moved)
        it.in_step()
        it.scheduler.join(waiting)
        it.scheduler.join(sequence())
        assert it.step().outgrown == [moved]
        it.in_step()
        moved.kv.room += 2
        it.scheduler.join(moved, first=True)
        it.scheduler.leave(waiting)
        it.step()
        assert stepped(it.step()) == [moved]


def test_who_has_no_room_may_not_join() -> None:
    """It would write into its neighbour's memory."""
    with running() as it, pytest.raises(AssertionError, match="beyond"):
        it.scheduler.join(sequence(room=0))


def test_a_full_batch_lets_the_others_wait_in_order() -> None:
    with running(max_batch=2) as it:
        short, long, third, fourth = (sequence(n) for n in (3, 100, 100, 100))
        it.scheduler.join(short)
        it.in_step()
        for each in (long, third, fourth):
            it.scheduler.join(each)
        assert stepped(it.step()) == [short]
        it.in_step()
        assert (it.scheduler.running, it.scheduler.waiting) == (2, 2)
        finished = it.step()
        assert (stepped(finished), finished.left) == ([short, long], [short])
        assert stepped(it.step()) == [long, third]
        it.in_step()
        it.scheduler.leave(long)
        it.step()
        assert stepped(it.step()) == [third, fourth]


def test_who_waits_may_leave() -> None:
    with running(max_batch=1) as it:
        first, second, third = sequence(), sequence(), sequence()
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.join(second)
        it.scheduler.join(third)
        it.scheduler.leave(second)
        it.step()
        assert it.left == []
        assert stepped(it.step()) == [first]
        assert it.left == [second]
        assert it.scheduler.waiting == 1


def test_joining_and_leaving_at_once_comes_back_without_a_step() -> None:
    with running(max_batch=1) as it:
        blocker, brief = sequence(), sequence()
        it.scheduler.join(blocker)
        it.in_step()
        it.scheduler.join(brief)
        it.scheduler.leave(brief)
        it.scheduler.leave(blocker)
        it.engine.permits.release()
        left: list[Sequence] = []
        while len(left) < 2:
            left += it.outcomes.get(timeout=WAIT_S).left
        assert left == [blocker, brief]
        assert it.engine.batches == [[blocker]]


def test_leaving_twice_or_without_being_there_does_nothing() -> None:
    with running() as it:
        first, stranger = sequence(2), sequence()
        it.scheduler.leave(stranger)
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.leave(first)
        it.scheduler.leave(first)
        outcome = it.step()
        assert outcome.left == [first], "it ended by itself in that step"
        other = sequence()
        it.scheduler.join(other)
        assert stepped(it.step()) == [other]
        assert it.left == []


@pytest.mark.parametrize(
    ("tokens", "max_new_tokens", "ignore_eos", "reasons"),
    [
        ([5, 6, 7], 4, False, ["UNSPECIFIED", "UNSPECIFIED", "LENGTH"]),
        ([5, EOS], 9, False, ["UNSPECIFIED", "STOP"]),
        ([5, EOS, 6], 4, True, ["UNSPECIFIED", "UNSPECIFIED", "LENGTH"]),
        ([EOS], 2, False, ["STOP"]),
        ([5], 2, False, ["LENGTH"]),
    ],
)
def test_a_sequence_ends_with_its_reason(
    tokens: list[int], max_new_tokens: int, ignore_eos: bool, reasons: list[str]
) -> None:
    with running() as it:
        mine = sequence(max_new_tokens, ignore_eos=ignore_eos)
        it.engine.answers[mine] = list(tokens)
        it.scheduler.join(mine)
        for number, (token, reason) in enumerate(zip(tokens, reasons, strict=True)):
            outcome = it.step()
            (new,) = outcome.tokens
            assert (new.token, public.FinishReason.Name(new.finish_reason)) == (token, f"FINISH_REASON_{reason}")
            assert outcome.left == ([mine] if reason != "UNSPECIFIED" else [])
            assert mine.next_position >= 11 + number
        assert it.scheduler.running == 0


def test_a_failed_step_fails_its_batch_and_the_thread_lives_on() -> None:
    with running(max_batch=2) as it:
        first, second, third = sequence(), sequence(), sequence()
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.join(second)
        it.scheduler.join(third)
        it.step()
        it.in_step()
        it.engine.error = RuntimeError("a bug")
        outcome = it.step()
        assert (outcome.failed, outcome.tokens, outcome.left) == ([first, second], [], [])
        assert stepped(it.step()) == [third], "who waited is not affected"


def test_the_thread_ends_when_asked_and_sleeps_when_idle() -> None:
    with running() as it:
        with pytest.raises(queue.Empty):
            it.outcomes.get(timeout=0.05)
        it.scheduler.join(sequence())
        it.in_step()
