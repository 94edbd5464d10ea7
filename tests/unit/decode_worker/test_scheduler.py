"""The step thread with a scripted engine: who is stepped when, and that nothing ends it."""

from __future__ import annotations

import queue

import pytest
from vlcache.v1 import inference_pb2 as public

from decode_worker.sequence import Sequence
from tests.unit.decode_worker.stepping import EOS, WAIT_S, running, sequence, stepped


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


def test_a_full_batch_lets_the_others_wait_in_order() -> None:
    with running(max_num_seqs=2) as it:
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


def test_the_wait_for_a_place_is_measured() -> None:
    with running(max_num_seqs=1) as it:
        first, second = sequence(2), sequence(3)
        it.scheduler.join(first)
        it.in_step()
        it.scheduler.join(second)
        second.waits_since -= 5.0
        it.step()
        it.in_step()
        read = it.metrics.registry.get_sample_value
        labels = {"role": "decode", "worker": "d", "model": "m", "stage": "decode_queue"}
        assert read("vlcache_stage_seconds_count", labels) == 2
        assert 5.0 <= (read("vlcache_stage_seconds_sum", labels) or 0) < 10.0


def test_who_waits_may_leave() -> None:
    with running(max_num_seqs=1) as it:
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
    with running(max_num_seqs=1) as it:
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
    with running(max_num_seqs=2) as it:
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
