"""Two questions about the same scenes: what is remembered for the first one has to do for the second."""

from collections.abc import Iterator, Sequence

import numpy as np

from models.shapes_vlm.questions import NUM_IMAGES, TASKS, Question, Sample, ask, sample_of
from models.shapes_vlm.scenes import draw_full_scene

# Keeps these scenes apart from those of `draw_samples` and of the training.
_PAIRS_STREAM = 40_961

Pair = tuple[Sample, Sample]
"""The first and the second question; their images are the same, the patches that carry their answers are not."""


def draw_pairs(*, seed: int, count: int, tasks: Sequence[str] = TASKS) -> Iterator[Pair]:
    """`count` pairs, each about scenes of its own; the same seed gives the same pairs.

    Args:
        tasks: Of the second questions, in turn. The first is one of any task of as many images.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise ValueError(f"unknown tasks {unknown}; choose from {', '.join(TASKS)}")
    for index in range(count):
        yield _draw_pair(np.random.default_rng([seed, _PAIRS_STREAM, index]), tasks[index % len(tasks)])


def _draw_pair(rng: np.random.Generator, task: str) -> Pair:
    before = [other for other in TASKS if NUM_IMAGES[other] == NUM_IMAGES[task]]
    while True:
        scenes = [draw_full_scene(rng) for _ in range(NUM_IMAGES[task])]
        first, second = ask(rng, before[int(rng.integers(len(before)))], scenes), ask(rng, task, scenes)
        if first is not None and second is not None and _differ(first, second):
            return sample_of(first, scenes), sample_of(second, scenes)


def _differ(first: Question, second: Question) -> bool:
    return first.text != second.text and first.answer_patches != second.answer_patches
