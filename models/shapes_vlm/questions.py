"""Tasks: what is asked about scenes, the one right answer, and the patches that carry it.

Answers have several tokens, and most begin with words that say nothing about the image: the first token comes
from the prefill and is never touched by compression, so what counts has to come later. Some wordings ask for the
bare code: those teach the model to look while it still reads the prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from PIL import Image

from models.shapes_vlm.scenes import Plate, Scene, Shape, draw_full_scene

T = TypeVar("T")

WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "read": (
        ("What is the code on the {colour} plate?", "The code is {code}."),
        ("What does the {colour} plate say?", "It says {code}."),
        ("Read the {colour} plate.", "{code}"),
    ),
    "codes": (
        ("List all codes from top to bottom.", "In order: {all}."),
        ("Read all plates from top to bottom.", "In order: {all}."),
    ),
    "shape": (
        ("What shape is the {colour} one?", "The {colour} shape is a {kind}."),
        ("Which {colour} shape is there?", "It is the {colour} {kind}."),
        ("Name the {colour} shape.", "The {colour} shape is a {kind}."),
    ),
    "colour": (
        ("What colour is the {kind}?", "The {kind} is {colour}."),
        ("What color is the {kind}?", "The {kind} is {colour}."),
        ("Name the colour of the {kind}.", "The {kind} is {colour}."),
    ),
    "count": (
        ("How many {colour} shapes are there?", "The number of {colour} shapes is {number}."),
        ("Count the {colour} shapes.", "The number of {colour} shapes is {number}."),
    ),
    "list": (
        ("List all shapes from top to bottom.", "In order: {all}."),
        ("Which shapes are there, from top to bottom?", "In order: {all}."),
    ),
    "below": (
        ("Which shape comes next below the {name}?", "The next shape is the {other}."),
        ("What is below the {name}?", "The next shape is the {other}."),
    ),
    "which": (
        ("Which image shows the {name}?", "The {name} is in image {number}."),
        ("In which image is the {name}?", "The {name} is in image {number}."),
    ),
    "read_in_image": (
        ("What is the code on the {colour} plate in image {number}?", "The code is {code}."),
        ("Read the {colour} plate in image {number}.", "{code}"),
    ),
    "read_in_four": (("What is the code on the {colour} plate in image {number}?", "The code is {code}."),),
    "instructed": (("What is the code on the {colour} plate? {instruction}", "The code is {code}."),),
}
"""Per task, its wordings: (question, answer)."""
TASKS: tuple[str, ...] = tuple(WORDINGS)
NUM_IMAGES: dict[str, int] = {**dict.fromkeys(TASKS, 1), "which": 2, "read_in_image": 2, "read_in_four": 4}

INSTRUCTIONS: tuple[str, ...] = (
    "Look at the whole picture before you answer, do not explain how you found it, and reply with one short "
    "sentence that names nothing else.",
    "Please answer in one short sentence, leave out everything that was not asked, and do not describe any "
    "other part of the picture.",
    "Take the time that you need, keep the order as it is shown, and write the answer in one sentence without "
    "any remark before or after it.",
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about one or more scenes; `answer_patches`: per image, the patches that carry the answer."""

    task: str
    text: str
    answer: str
    answer_patches: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with its images (RGB, 336 x 336); patch index = row * 24 + column.

    Attributes:
        before: Questions about the same images that were asked before, each with its answer.
    """

    task: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    answer_patches: tuple[tuple[int, ...], ...]
    before: tuple[tuple[str, str], ...] = ()


def draw_samples(*, seed: int, count: int, tasks: Sequence[str] = TASKS) -> Iterator[Sample]:
    """`count` samples, tasks in turn, each with scenes of its own; the same seed gives the same samples."""
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise ValueError(f"unknown tasks {unknown}; choose from {', '.join(TASKS)}")
    for index in range(count):
        task = tasks[index % len(tasks)]
        yield draw_sample(np.random.default_rng([seed, index]), task)


def draw_sample(rng: np.random.Generator, task: str) -> Sample:
    """One sample with scenes of its own."""
    while True:
        scenes = [draw_full_scene(rng) for _ in range(NUM_IMAGES[task])]
        question = ask(rng, task, scenes)
        if question is not None:
            return sample_of(question, scenes)


def ask(rng: np.random.Generator, task: str, scenes: Sequence[Scene]) -> Question | None:
    """A random question of this task, or None where the scenes do not allow one."""
    return _ASK[task](rng, scenes)


def sample_of(question: Question, scenes: Sequence[Scene]) -> Sample:
    """The question with the images of the scenes that it was asked about."""
    return Sample(
        task=question.task,
        images=tuple(scene.image for scene in scenes),
        question=question.text,
        answer=question.answer,
        answer_patches=question.answer_patches,
    )


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T | None:
    return items[int(rng.integers(len(items)))] if items else None


def _patches_of(things: Sequence[Shape | Plate]) -> tuple[int, ...]:
    return tuple(sorted(patch for thing in things for patch in thing.patches))


def _word(rng: np.random.Generator, task: str, answer_patches: tuple[tuple[int, ...], ...], **words: str) -> Question:
    text, answer = WORDINGS[task][int(rng.integers(len(WORDINGS[task])))]
    return Question(task=task, text=text.format(**words), answer=answer.format(**words), answer_patches=answer_patches)


def _ask_read(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    plate = _pick(rng, scenes[0].plates)
    if plate is None:
        return None
    return _word(rng, "read", (plate.patches,), colour=plate.colour, code=plate.code)


def _ask_instructed(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    plate, instruction = _pick(rng, scenes[0].plates), _pick(rng, INSTRUCTIONS)
    if plate is None or instruction is None:
        return None
    words = {"colour": plate.colour, "code": plate.code, "instruction": instruction}
    return _word(rng, "instructed", (plate.patches,), **words)


def _ask_codes(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    plates = scenes[0].plates
    if not plates:
        return None
    everything = ", ".join(f"{plate.colour} {plate.code}" for plate in plates)
    return _word(rng, "codes", (_patches_of(plates),), all=everything)


def _ask_list(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    shapes = scenes[0].shapes
    if not shapes:
        return None
    return _word(rng, "list", (_patches_of(shapes),), all=", ".join(shape.name for shape in shapes))


def _ask_shape(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    shapes = scenes[0].shapes
    shape = _pick(rng, [s for s in shapes if sum(o.colour == s.colour for o in shapes) == 1])
    if shape is None:
        return None
    return _word(rng, "shape", (shape.patches,), colour=shape.colour, kind=shape.kind)


def _ask_colour(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    shapes = scenes[0].shapes
    shape = _pick(rng, [s for s in shapes if sum(o.kind == s.kind for o in shapes) == 1])
    if shape is None:
        return None
    return _word(rng, "colour", (shape.patches,), colour=shape.colour, kind=shape.kind)


def _ask_below(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    shapes = scenes[0].shapes
    pair = _pick(rng, list(pairwise(shapes)))
    if pair is None:
        return None
    return _word(rng, "below", (_patches_of(pair),), name=pair[0].name, other=pair[1].name)


def _ask_count(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    shapes = scenes[0].shapes
    # Drawn over colours, not shapes, half the time: else small counts would hardly ever be asked.
    by_shape = _pick(rng, [s.colour for s in shapes])
    by_colour = _pick(rng, sorted({s.colour for s in shapes}))
    colour = by_shape if rng.random() < 0.5 else by_colour
    if colour is None:
        return None
    counted = [s for s in shapes if s.colour == colour]
    return _word(rng, "count", (_patches_of(counted),), colour=colour, number=str(len(counted)))


def _ask_which(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    index = int(rng.integers(len(scenes)))
    elsewhere = {s.name for i, scene in enumerate(scenes) if i != index for s in scene.shapes}
    shape = _pick(rng, [s for s in scenes[index].shapes if s.name not in elsewhere])
    if shape is None:
        return None
    return _word(rng, "which", _in_image(scenes, index, shape), name=shape.name, number=str(index + 1))


def _ask_read_in_image(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    return _read_one_of(rng, "read_in_image", scenes)


def _ask_read_in_four(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question | None:
    return _read_one_of(rng, "read_in_four", scenes)


def _read_one_of(rng: np.random.Generator, task: str, scenes: Sequence[Scene]) -> Question | None:
    index = int(rng.integers(len(scenes)))
    plate = _pick(rng, scenes[index].plates)
    if plate is None:
        return None
    words = {"colour": plate.colour, "code": plate.code, "number": str(index + 1)}
    return _word(rng, task, _in_image(scenes, index, plate), **words)


def _in_image(scenes: Sequence[Scene], index: int, thing: Shape | Plate) -> tuple[tuple[int, ...], ...]:
    return tuple(thing.patches if i == index else () for i in range(len(scenes)))


_ASK: dict[str, Callable[[np.random.Generator, Sequence[Scene]], Question | None]] = {
    "read": _ask_read,
    "codes": _ask_codes,
    "shape": _ask_shape,
    "colour": _ask_colour,
    "count": _ask_count,
    "list": _ask_list,
    "below": _ask_below,
    "which": _ask_which,
    "read_in_image": _ask_read_in_image,
    "read_in_four": _ask_read_in_four,
    "instructed": _ask_instructed,
}
