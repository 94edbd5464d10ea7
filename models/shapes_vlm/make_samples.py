"""Writes the bundled sample images and questions: `python -m models.shapes_vlm.make_samples`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from models.shapes_vlm.paths import SAMPLES
from models.shapes_vlm.questions import NUM_IMAGES, TASKS, ask
from models.shapes_vlm.scenes import Scene, draw_full_scene


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """How many images, from which seed, and where they go."""

    out: Path = SAMPLES
    """Folder of the images and samples.json."""
    seed: int = 20_000
    """Seed of the scenes and questions; neither training nor the card's evaluation uses it."""
    images: int = 6
    """Number of images; the questions go round them."""

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError("at least 2 images are needed: some questions are about two")


def make_samples(config: SamplesConfig) -> list[dict[str, Any]]:
    """Draws the images and two questions per task about them; returns what samples.json holds."""
    rng = np.random.default_rng(config.seed)
    scenes = [draw_full_scene(rng) for _ in range(config.images)]
    config.out.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        scene.image.save(config.out / _file_name(index), optimize=True)
    samples = [_sample(rng, scenes, task, start) for start, task in enumerate((*TASKS, *TASKS))]
    (config.out / "samples.json").write_text(json.dumps(samples, indent=2) + "\n")
    return samples


def _file_name(index: int) -> str:
    return f"scene_{index + 1}.png"


def _sample(rng: np.random.Generator, scenes: list[Scene], task: str, start: int) -> dict[str, Any]:
    """A question about consecutive images from `start` on, or from the next ones where none is possible."""
    for shift in range(len(scenes)):
        chosen = [(start + shift + i) % len(scenes) for i in range(NUM_IMAGES[task])]
        question = ask(rng, task, [scenes[index] for index in chosen])
        if question is not None:
            files = [_file_name(index) for index in chosen]
            return {"images": files, "question": question.text, "answer": question.answer, "task": task}
    raise ValueError(f"no image allows a question of the task {task!r}; choose another seed")


if __name__ == "__main__":
    print(f"{len(make_samples(tyro.cli(SamplesConfig, description=__doc__)))} questions written")
