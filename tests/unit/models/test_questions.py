"""Questions have the right answers, and their patches carry them."""

import re

import numpy as np
import pytest

from models.shapes_vlm.questions import NUM_IMAGES, TASKS, Sample, ask, draw_samples
from models.shapes_vlm.scenes import CODE_LENGTH, GLYPHS, NUM_PATCHES, Scene, draw_full_scene


def scenes_and_question(seed: int, task: str) -> tuple[list[Scene], str, str, tuple[tuple[int, ...], ...]]:
    rng = np.random.default_rng(seed)
    while True:
        scenes = [draw_full_scene(rng) for _ in range(NUM_IMAGES[task])]
        question = ask(rng, task, scenes)
        if question is not None:
            return scenes, question.text, question.answer, question.answer_patches


def colour_in(text: str) -> str:
    match = re.search(r"red|orange|yellow|green|cyan|blue|purple|black", text)
    assert match is not None
    return match.group()


@pytest.mark.parametrize("task", ["read", "instructed"])
def test_reading_names_the_code_of_the_plate_in_question(task: str) -> None:
    for seed in range(10):
        (scene,), text, answer, patches = scenes_and_question(seed, task)
        (plate,) = (plate for plate in scene.plates if plate.colour == colour_in(text))
        assert re.fullmatch(rf"The code is {plate.code}\.|It says {plate.code}\.|{plate.code}", answer)
        assert patches == (plate.patches,)
        assert len(plate.code) == CODE_LENGTH
        assert set(plate.code) <= set(GLYPHS)


@pytest.mark.parametrize("task", ["read_in_image", "read_in_four"])
def test_reading_in_an_image_points_at_that_image_alone(task: str) -> None:
    for seed in range(10):
        scenes, text, answer, patches = scenes_and_question(seed, task)
        index = int(text[-2]) - 1
        (plate,) = (plate for plate in scenes[index].plates if plate.colour == colour_in(text))
        assert plate.code in answer
        assert patches == tuple(plate.patches if i == index else () for i in range(len(scenes)))


def test_counting_counts_and_lists_list() -> None:
    for seed in range(10):
        (scene,), text, answer, patches = scenes_and_question(seed, "count")
        counted = [shape for shape in scene.shapes if shape.colour == colour_in(text)]
        assert answer.endswith(f" is {len(counted)}.")
        assert len(patches[0]) == 4 * len(counted)
        (scene,), _, answer, patches = scenes_and_question(seed, "list")
        assert answer == f"In order: {', '.join(shape.name for shape in scene.shapes)}."
        assert len(patches[0]) == 4 * len(scene.shapes)


def test_shape_and_colour_questions_have_one_right_answer() -> None:
    for seed in range(10):
        (scene,), text, answer, _ = scenes_and_question(seed, "shape")
        (shape,) = (shape for shape in scene.shapes if shape.colour == colour_in(text))
        assert shape.colour in answer
        assert answer.endswith(f" {shape.kind}.")
        (scene,), text, answer, _ = scenes_and_question(seed, "colour")
        (shape,) = (shape for shape in scene.shapes if shape.kind in text)
        assert answer == f"The {shape.kind} is {shape.colour}."


def test_below_is_the_next_shape_from_top_to_bottom() -> None:
    for seed in range(10):
        (scene,), text, answer, patches = scenes_and_question(seed, "below")
        names = [shape.name for shape in scene.shapes]
        index = next(i for i, name in enumerate(names) if name in text)
        assert answer == f"The next shape is the {names[index + 1]}."
        assert patches == (tuple(sorted((*scene.shapes[index].patches, *scene.shapes[index + 1].patches))),)


def test_which_image_shows_a_shape_that_the_other_lacks() -> None:
    for seed in range(10):
        scenes, _, answer, patches = scenes_and_question(seed, "which")
        match = re.fullmatch(r"The (\w+ \w+) is in image ([12])\.", answer)
        assert match is not None
        holders = [i for i, scene in enumerate(scenes) if match[1] in {shape.name for shape in scene.shapes}]
        assert holders == [int(match[2]) - 1]
        assert [len(part) for part in patches] == [4 if i == holders[0] else 0 for i in range(2)]


def as_values(sample: Sample) -> tuple[object, ...]:
    pixels = tuple(image.tobytes() for image in sample.images)
    return sample.task, pixels, sample.question, sample.answer, sample.answer_patches


def test_samples_follow_the_seed_and_take_turns() -> None:
    first, again, other = ([as_values(s) for s in draw_samples(seed=seed, count=2 * len(TASKS))] for seed in (5, 5, 6))
    assert first == again
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))
    assert [sample[0] for sample in first] == [*TASKS, *TASKS]


def test_samples_have_images_and_patches_of_the_promised_kind() -> None:
    for sample in draw_samples(seed=7, count=len(TASKS)):
        assert len(sample.images) == len(sample.answer_patches) == NUM_IMAGES[sample.task]
        assert all(image.mode == "RGB" and image.size == (336, 336) for image in sample.images)
        patches = [patch for part in sample.answer_patches for patch in part]
        assert patches
        assert all(0 <= patch < NUM_PATCHES for patch in patches)


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown tasks"):
        next(draw_samples(seed=0, count=1, tasks=["poetry"]))
