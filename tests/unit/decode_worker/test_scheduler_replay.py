"""The step thread with a scripted engine: what is known goes in between two steps, a piece at a time."""

from __future__ import annotations

from decode_worker.scheduler import StepOutcome
from decode_worker.sequence import Sequence
from tests.unit.decode_worker.stepping import EOS, WAIT_S, Running, running, sequence, stepped


def knowing(*known: int, room: int = 1000, max_new_tokens: int = 100) -> Sequence:
    each = sequence(max_new_tokens, room)
    each.known.extend(known)
    return each


def replay(it: Running) -> StepOutcome:
    """Lets one piece go in and returns its outcome."""
    it.engine.permits.release()
    return it.outcomes.get(timeout=WAIT_S)


def told(outcome: StepOutcome) -> list[int]:
    assert all(new.known and not new.finish_reason for new in outcome.tokens)
    return [new.token for new in outcome.tokens]


def test_pieces_are_as_large_as_a_batch_and_steps_come_in_between() -> None:
    with running(max_num_seqs=4) as it:
        other, late = sequence(), knowing(*range(10, 20))
        it.scheduler.join(other)
        it.in_step()
        it.scheduler.join(late)
        assert stepped(it.step()) == [other]
        for piece in ([10, 11, 12, 13], [14, 15, 16, 17]):
            assert told(replay(it)) == piece
            assert stepped(it.step()) == [other]
        assert told(replay(it)) == [18, 19]
        assert (late.last_token, late.next_position, late.generated) == (19, 20, 11)
        assert stepped(it.step()) == [other, late]
        assert it.engine.replays == [4, 4, 2]


def test_one_after_the_other_in_the_order_in_which_they_came() -> None:
    with running(max_num_seqs=4) as it:
        other, first, second = sequence(), knowing(1, 2, 3), knowing(4, 5)
        it.scheduler.join(other)
        it.in_step()
        it.scheduler.join(first)
        it.scheduler.join(second)
        it.step()
        assert told(replay(it)) == [1, 2, 3]
        assert stepped(it.step()) == [other, first]
        assert told(replay(it)) == [4, 5]
        assert stepped(it.step()) == [other, first, second]


def test_a_replay_ends_where_the_room_does() -> None:
    with running() as it:
        each = knowing(1, 2, 3, 4, room=3)
        it.scheduler.join(each)
        outcome = replay(it)
        assert (told(outcome), outcome.outgrown, outcome.left) == ([1, 2, 3], [each], [])
        assert list(each.known) == [4]
        each.kv.room = 4
        it.scheduler.join(each, first=True)
        outcome = replay(it)
        assert (told(outcome), outcome.outgrown) == ([4], [each])
        assert it.scheduler.running == 0


def test_who_is_asked_to_leave_leaves_between_two_pieces() -> None:
    with running(max_num_seqs=2) as it:
        each = knowing(1, 2, 3, 4)
        it.scheduler.join(each)
        it.in_step()
        it.scheduler.leave(each)
        assert told(replay(it)) == [1, 2]
        assert it.outcomes.get(timeout=WAIT_S).left == [each]
        assert list(each.known) == [3, 4]
        assert it.engine.replays == [2]


def test_an_end_that_is_known_is_none() -> None:
    with running() as it:
        each = knowing(EOS, 5, max_new_tokens=4)
        it.scheduler.join(each)
        assert told(replay(it)) == [EOS, 5]
        last = it.step()
        assert ([new.token for new in last.tokens], last.left) == ([1], [each])


def test_a_replay_that_fails_takes_nobody_with_it() -> None:
    with running() as it:
        other, each = sequence(), knowing(1, 2)
        it.scheduler.join(other)
        it.in_step()
        it.scheduler.join(each)
        it.step()
        it.engine.error = RuntimeError("a bug")
        outcome = replay(it)
        assert (outcome.failed, outcome.tokens, outcome.left) == ([each], [], [])
        assert stepped(it.step()) == [other]
        assert it.scheduler.running == 1


def test_a_step_that_fails_leaves_who_has_more_to_replay() -> None:
    with running(max_num_seqs=2) as it:
        other, each = sequence(), knowing(1, 2, 3)
        it.scheduler.join(other)
        it.in_step()
        it.scheduler.join(each)
        it.step()
        assert told(replay(it)) == [1, 2]
        it.engine.error = RuntimeError("a bug")
        assert it.step().failed == [other]
        assert told(replay(it)) == [3]
        assert stepped(it.step()) == [each]
