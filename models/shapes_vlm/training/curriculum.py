"""What a step trains on: how hard the scenes are, how many images and patches, which questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.shapes_vlm.questions import Question, ask
from models.shapes_vlm.scenes import MAX_PLATES, MAX_SHAPES, NUM_PATCHES, Scene, draw_scene
from models.shapes_vlm.training.batches import Conversation

KEPT_PATCHES = 112
"""Kept of 576 in the fast batches: at most 88 patches are in use."""

ONE_IMAGE = {"read": 0.15, "shape": 0.1, "colour": 0.2, "count": 0.32, "below": 0.23}
MORE_IMAGES = {"which": 0.75, "read_in_image": 0.25}
"""Shares of the short tasks. With more than two images their questions are the same, with higher numbers."""
NUM_SHORT = 12
IMAGE_COUNTS = {2: 0.7, 3: 0.15, 4: 0.15}
"""Shares among the batches with more than one image."""
INSTRUCTED_SHARE, TURNS_SHARE = 0.3, 0.25
"""Shares of the batches with a long instruction, and with a second question in the same conversation."""
MAX_TRIES = 8
TURNS = "turns"


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Upper bounds of a scene, and the shares of batches."""

    max_shapes: int
    max_plates: int
    several_images: float
    """Share of the batches with more than one image."""
    all_patches: float
    """Share of the batches with all 576 patches."""


def difficulty(progress: float, full_from: float) -> Difficulty:
    """`progress` in [0, 1] over the question stage."""
    growth = min(max((progress - 0.05) / 0.25, 0.0), 1.0)
    full = min(max((progress - full_from) / (0.5 * (1 - full_from) + 1e-9), 0.0), 1.0)
    return Difficulty(
        max_shapes=round(3 + growth * (MAX_SHAPES - 3)),
        max_plates=round(1 + growth * (MAX_PLATES - 1)),
        several_images=0.4 if progress > 0.12 else 0.0,
        all_patches=max(full, 0.08 if growth == 1.0 else 0.0),
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """The material of one step of one process."""

    scenes: list[list[Scene]]
    """B sets of N scenes."""
    short: list[list[Conversation]]
    long: list[list[Conversation]]
    num_kept: int


def draw_step(rng: np.random.Generator, shared: np.random.Generator, hard: Difficulty, rows: int) -> Step:
    """`shared` is equal in all processes, so that their steps cost the same and none waits for another."""
    num_images = _num_images(shared) if shared.random() < hard.several_images else 1
    num_kept = NUM_PATCHES if shared.random() < hard.all_patches else KEPT_PATCHES
    scenes = [[_draw(rng, hard) for _ in range(num_images)] for _ in range(_fitting(rows, num_images, num_kept))]
    short: list[list[Conversation]] = [[(_short(rng, row),) for _ in range(NUM_SHORT)] for row in scenes]
    kinds = _long_kinds(shared, num_images)
    long = [[_long(rng, kind, row) for kind in kinds] for row in scenes]
    return Step(scenes=scenes, short=short, long=long, num_kept=num_kept)


def _num_images(shared: np.random.Generator) -> int:
    return int(shared.choice(list(IMAGE_COUNTS), p=list(IMAGE_COUNTS.values())))


def _fitting(rows: int, num_images: int, num_kept: int) -> int:
    """Fewer rows where each costs more: all patches, many images."""
    if num_kept == NUM_PATCHES:
        return max(1, 2 * rows // (3 * num_images))
    return max(1, 2 * rows // max(2, num_images))


def _draw(rng: np.random.Generator, hard: Difficulty) -> Scene:
    # Easy scenes stay in the mixture: their gradients are the clearest.
    num_shapes = int(rng.integers(1, hard.max_shapes + 1))
    return draw_scene(rng, num_shapes=num_shapes, num_plates=int(rng.integers(1, hard.max_plates + 1)))


def _long_kinds(shared: np.random.Generator, num_images: int) -> list[str]:
    kinds = ["list", "codes"] if num_images == 1 else []
    if num_images == 1 and shared.random() < INSTRUCTED_SHARE:
        kinds.append("instructed")
    if shared.random() < TURNS_SHARE:
        kinds.append(TURNS)
    return kinds


def _long(rng: np.random.Generator, kind: str, scenes: Sequence[Scene]) -> Conversation:
    if kind == TURNS:
        return _short(rng, scenes), _short(rng, scenes)
    question = ask(rng, kind, scenes)
    assert question is not None, "every training scene has a shape and a plate"
    return (question,)


def _short(rng: np.random.Generator, scenes: Sequence[Scene]) -> Question:
    """A question the scenes allow; with unlucky scenes a reading question, which is always possible."""
    shares = ONE_IMAGE if len(scenes) == 1 else MORE_IMAGES
    for _ in range(MAX_TRIES):
        question = ask(rng, str(rng.choice(list(shares), p=list(shares.values()))), scenes)
        if question is not None:
            return question
    fallback = ask(rng, "read" if len(scenes) == 1 else "read_in_image", scenes)
    assert fallback is not None, "every training scene has a plate"
    return fallback
