"""Dense supervision of the projector's output: what every patch holds and where it is.

Without it the language model sits on a plateau until it finds out what the visual tokens mean. The slot of a
glyph on its plate and the rank of a thing from the top give "the third glyph of" and "the next one below" as
features, instead of leaving them to be discovered.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.shapes_vlm.scenes import COLOUR_NAMES, GLYPHS, GRID_PATCHES, MAX_SHAPES, NUM_PATCHES, Scene
from models.shapes_vlm.stamps import SHAPE_KINDS

TARGETS: dict[str, int] = {
    "content": 1 + len(SHAPE_KINDS) + len(GLYPHS),
    "colour": 1 + len(COLOUR_NAMES),
    "slot": 1 + 6,
    "rank": 1 + MAX_SHAPES,
    "row": GRID_PATCHES,
    "column": GRID_PATCHES,
}
"""Classes per target; class 0 of the first four means background (for slot: no glyph)."""


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """[576, targets] class indices."""
    labels = np.zeros((NUM_PATCHES, len(TARGETS)), dtype=np.int64)
    labels[:, 4], labels[:, 5] = np.divmod(np.arange(NUM_PATCHES), GRID_PATCHES)
    for rank, shape in enumerate(scene.shapes):
        colour = 1 + COLOUR_NAMES.index(shape.colour)
        labels[list(shape.patches), :4] = (1 + SHAPE_KINDS.index(shape.kind), colour, 0, 1 + rank)
    for rank, plate in enumerate(scene.plates):
        colour = 1 + COLOUR_NAMES.index(plate.colour)
        for row in np.array(plate.patches).reshape(2, -1):
            for slot, (patch, glyph) in enumerate(zip(row, plate.code, strict=True)):
                content = 1 + len(SHAPE_KINDS) + GLYPHS.index(glyph)
                labels[patch, :4] = (content, colour, 1 + slot, 1 + rank)
    return labels


def kept_labels(scenes: Sequence[Scene], kept: Tensor) -> Tensor:
    """Labels of the kept patches: [images, K, targets]."""
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
    return labels.gather(1, kept[:, :, None].expand(-1, -1, labels.shape[2]))


class DenseHeads(nn.Module):
    """One linear head per target; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, sum(TARGETS.values()))

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy over targets, and the accuracy per target on patches that hold something."""
        used = labels[:, :, 0] > 0
        # Background says little: as much of it as there are used patches is enough.
        background = ~used & (torch.rand(used.shape) < used.float().mean())
        chosen = used | background
        logits, truth = self.head(features[chosen]).float().split(tuple(TARGETS.values()), dim=-1), labels[chosen]
        losses = [F.cross_entropy(part, truth[:, i]) for i, part in enumerate(logits)]
        something = truth[:, 0] > 0
        accuracies = {
            name: (part.argmax(-1) == truth[:, i])[something].float().mean().item()
            for i, (name, part) in enumerate(zip(TARGETS, logits, strict=True))
        }
        return torch.stack(losses).mean(), accuracies
