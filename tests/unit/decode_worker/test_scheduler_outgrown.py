"""The step thread and sequences without room for another token: they are handed back, and may come again."""

from __future__ import annotations

import pytest

from tests.unit.decode_worker.stepping import running, sequence, stepped


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
    with running(max_num_seqs=1) as it:
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
