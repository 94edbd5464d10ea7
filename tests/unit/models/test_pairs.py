"""Pairs of questions share their images and differ in what they ask for."""

from collections.abc import Iterator
from itertools import islice

import pytest

from models.shapes_vlm.pairs import Pair, draw_pairs
from models.shapes_vlm.questions import NUM_IMAGES, TASKS, draw_samples


def pixels(pair: Pair) -> list[bytes]:
    return [image.tobytes() for sample in pair for image in sample.images]


def test_both_questions_are_about_the_same_images_but_not_about_the_same_patches() -> None:
    for index, pair in enumerate(draw_pairs(seed=3, count=2 * len(TASKS))):
        first, second = pair
        assert second.task == TASKS[index % len(TASKS)]
        assert len(first.images) == len(second.images) == NUM_IMAGES[first.task] == NUM_IMAGES[second.task]
        assert all(one == other for one, other in zip(first.images, second.images, strict=True))
        assert first.question != second.question
        assert first.answer_patches != second.answer_patches
        assert all(len(sample.answer_patches) == len(sample.images) for sample in pair)


def test_first_questions_are_of_many_tasks() -> None:
    assert len({first.task for first, _ in draw_pairs(seed=4, count=20, tasks=("read",))}) > 3


def test_the_same_seed_gives_the_same_pairs_and_a_longer_run_begins_with_them() -> None:
    one = list(draw_pairs(seed=5, count=3))
    for again, pair in zip(islice(draw_pairs(seed=5, count=5), 3), one, strict=True):
        assert [sample.question for sample in again] == [sample.question for sample in pair]
        assert pixels(again) == pixels(pair)
    other = list(draw_pairs(seed=6, count=3))
    assert [pixels(pair) for pair in other] != [pixels(pair) for pair in one]


def test_scenes_are_not_those_of_the_samples() -> None:
    samples: Iterator[bytes] = (image.tobytes() for sample in draw_samples(seed=5, count=11) for image in sample.images)
    assert set(samples).isdisjoint(each for pair in draw_pairs(seed=5, count=11) for each in pixels(pair))


@pytest.mark.parametrize("tasks", [(), ("read", "dance")])
def test_unknown_tasks_are_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="choose from read"):
        next(draw_pairs(seed=1, count=1, tasks=tasks))
