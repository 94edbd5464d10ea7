"""Kinds of questions that nothing was tuned on: right answers, and what was asked before does not give them away."""

from __future__ import annotations

import pytest

from models.shapes_vlm.held_out import HELD_OUT, KNOWN_TASKS, draw_any
from models.shapes_vlm.questions import TASKS, Sample, draw_samples

NUM_IMAGES = {"read_in_three": 3, "second_turn_in_two": 2, "second_turn_in_four": 4}
TURNS_BEFORE = {"read_in_three": 0, "third_turn": 2}


def drawn(task: str) -> list[Sample]:
    return list(draw_any(seed=3, count=8, tasks=(task,)))


def test_bundled_tasks_are_drawn_as_ever() -> None:
    for ours, theirs in zip(draw_any(seed=5, count=11, tasks=TASKS), draw_samples(seed=5, count=11), strict=True):
        assert (ours.task, ours.question, ours.answer, ours.before) == (theirs.task, theirs.question, theirs.answer, ())
        assert [image.tobytes() for image in ours.images] == [image.tobytes() for image in theirs.images]


@pytest.mark.parametrize("task", HELD_OUT)
def test_a_kind_has_its_images_and_turns(task: str) -> None:
    for sample in drawn(task):
        assert sample.task == task
        assert len(sample.images) == len(sample.answer_patches) == NUM_IMAGES.get(task, 1)
        assert len(sample.before) == TURNS_BEFORE.get(task, 1)
        assert any(sample.answer_patches)


@pytest.mark.parametrize("task", [task for task in HELD_OUT if task != "read_in_three"])
def test_what_was_asked_before_is_another_thing(task: str) -> None:
    for sample in drawn(task):
        question, answer = sample.before[-1]
        assert question != sample.question
        assert answer != sample.answer


def test_turns_do_not_repeat_and_follow_the_seed() -> None:
    samples, again = drawn("third_turn"), drawn("third_turn")
    assert [(each.before, each.question) for each in samples] == [(each.before, each.question) for each in again]
    assert len({each.question for each in samples}) > 1
    assert all(each.before[0] != each.before[1] for each in samples)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown tasks \['poetry'\]; choose from read, .*third_turn"):
        next(draw_any(seed=0, count=1, tasks=["poetry", "read"]))
    assert set(KNOWN_TASKS) == {*TASKS, *HELD_OUT}
