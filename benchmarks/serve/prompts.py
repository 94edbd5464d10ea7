"""What is asked: fresh scenes of the bundled model's kind, encoded before any clock runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from models.shapes_vlm.questions import draw_samples


@dataclass(frozen=True)
class Prompt:
    """One request's input; `images` are PNG files."""

    question: str
    images: tuple[bytes, ...]


def draw_prompts(*, seed: int, count: int, tasks: Sequence[str], text_only: bool) -> list[Prompt]:
    """`count` prompts, each about scenes of its own; the same seed gives the same ones.

    Args:
        text_only: Leaves the images out and asks the question alone.
    """
    samples = draw_samples(seed=seed, count=count, tasks=tasks)
    return [Prompt(sample.question, () if text_only else tuple(map(_png, sample.images))) for sample in samples]


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()
