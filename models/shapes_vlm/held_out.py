"""Kinds of questions that no training and no tuning saw, put together from what the model knows.

What was chosen on the tasks of `questions.py` is judged on these.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from models.shapes_vlm.questions import TASKS, Question, Sample, ask, draw_sample, sample_of
from models.shapes_vlm.scenes import Scene, draw_full_scene

LOOK_UPS = ("read", "shape", "colour")


def draw_any(*, seed: int, count: int, tasks: Sequence[str]) -> Iterator[Sample]:
    """As `questions.draw_samples`, of either's tasks."""
    unknown = sorted(set(tasks) - set(KNOWN_TASKS))
    if unknown or not tasks:
        raise ValueError(f"unknown tasks {unknown}; choose from {', '.join(KNOWN_TASKS)}")
    for index in range(count):
        task, rng = tasks[index % len(tasks)], np.random.default_rng([seed, index])
        yield _draw_held_out(rng, task) if task in _DRAW else draw_sample(rng, task)


def _draw_held_out(rng: np.random.Generator, task: str) -> Sample:
    while True:
        sample = _DRAW[task](rng)
        if sample is not None:
            return replace(sample, task=task)


def _read_in_three(rng: np.random.Generator) -> Sample | None:
    return _about(rng, "read_in_image", _scenes(rng, 3))


def _second_turn(rng: np.random.Generator) -> Sample | None:
    return _after_another(rng, LOOK_UPS, _scenes(rng, 1))


def _second_turn_in_two(rng: np.random.Generator) -> Sample | None:
    return _after_another(rng, ("read_in_image",), _scenes(rng, 2))


def _second_turn_in_four(rng: np.random.Generator) -> Sample | None:
    return _after_another(rng, ("read_in_four",), _scenes(rng, 4))


def _third_turn(rng: np.random.Generator) -> Sample | None:
    scenes = _scenes(rng, 1)
    sample, first = _after_another(rng, LOOK_UPS, scenes), ask(rng, "below", scenes)
    if sample is None or first is None:
        return None
    return replace(sample, before=((first.text, first.answer), *sample.before))


def _about(rng: np.random.Generator, task: str, scenes: Sequence[Scene]) -> Sample | None:
    question = ask(rng, task, scenes)
    return None if question is None else sample_of(question, scenes)


def _after_another(rng: np.random.Generator, tasks: Sequence[str], scenes: Sequence[Scene]) -> Sample | None:
    """A question in the second turn; the first turn's answer lies elsewhere."""
    first, second = (ask(rng, _one_of(rng, tasks), scenes) for _ in range(2))
    if first is None or second is None or _overlap(first, second):
        return None
    return replace(sample_of(second, scenes), before=((first.text, first.answer),))


def _overlap(first: Question, second: Question) -> bool:
    pairs = zip(first.answer_patches, second.answer_patches, strict=True)
    return any(set(one) & set(other) for one, other in pairs)


def _scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    return [draw_full_scene(rng) for _ in range(count)]


def _one_of(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


_DRAW: dict[str, Callable[[np.random.Generator], Sample | None]] = {
    "read_in_three": _read_in_three,
    "second_turn": _second_turn,
    "second_turn_in_two": _second_turn_in_two,
    "second_turn_in_four": _second_turn_in_four,
    "third_turn": _third_turn,
}
HELD_OUT: tuple[str, ...] = tuple(_DRAW)
KNOWN_TASKS = (*TASKS, *HELD_OUT)
"""Every task that can be drawn."""
