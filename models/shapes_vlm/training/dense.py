"""Dense supervision of the projector's output: what every patch holds and where it is.

Without it the language model sits on a plateau until it finds out what the visual tokens mean. The slot of a
glyph on its plate and the rank of a thing from the top give "the third glyph of" and "the next one below" as
features, instead of leaving them to be discovered. What follows from other patches (which image this is, what
stands above, how many of this colour there were so far) is asked of the language model's own visual tokens after
its first layers: they see everything before them, as the answer will need it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.shapes_vlm.scenes import (
    CODE_LENGTH,
    COLOUR_NAMES,
    GLYPHS,
    GRID_PATCHES,
    MAX_SAME_COLOUR,
    MAX_SHAPES,
    NUM_PATCHES,
    Scene,
)
from models.shapes_vlm.stamps import SHAPE_KINDS

MAX_IMAGES = 4

PATCH_TARGETS: dict[str, int] = {
    "content": 1 + len(SHAPE_KINDS) + len(GLYPHS),
    "colour": 1 + len(COLOUR_NAMES),
    "slot": 1 + CODE_LENGTH,
    "rank": 1 + MAX_SHAPES,
    "row": GRID_PATCHES,
    "column": GRID_PATCHES,
}
"""Classes per target of the projector's output; class 0 of the first four: background (of slot: no glyph)."""
CONTEXT_TARGETS: dict[str, int] = {
    "image": MAX_IMAGES,
    "order": 1 + MAX_SHAPES,
    "above_colour": 1 + len(COLOUR_NAMES),
    "above_kind": 1 + len(SHAPE_KINDS),
    "so_far": 1 + MAX_SAME_COLOUR,
}
"""Classes per target of the language model's visual tokens; `above` is the thing of the same sort (shape or plate)
just before, 0 for the first one and the kind of a plate; `so_far` counts shapes of this colour, itself included."""


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """[576, targets] class indices."""
    labels = np.zeros((NUM_PATCHES, len(PATCH_TARGETS)), dtype=np.int64)
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


def context_labels(scene: Scene, image: int) -> NDArray[np.int64]:
    """[576, context targets] class indices of the image number `image`, from 0."""
    labels = np.zeros((NUM_PATCHES, len(CONTEXT_TARGETS)), dtype=np.int64)
    labels[:, 0] = image
    colour, kind, so_far = 0, 0, dict.fromkeys(COLOUR_NAMES, 0)
    for rank, shape in enumerate(scene.shapes):
        so_far[shape.colour] += 1
        labels[list(shape.patches), 1:] = (1 + rank, colour, kind, so_far[shape.colour])
        colour, kind = 1 + COLOUR_NAMES.index(shape.colour), 1 + SHAPE_KINDS.index(shape.kind)
    colour = 0
    for rank, plate in enumerate(scene.plates):
        labels[list(plate.patches), 1:] = (1 + rank, colour, 0, 0)
        colour = 1 + COLOUR_NAMES.index(plate.colour)
    return labels


def kept_labels(labels: Sequence[NDArray[np.int64]], kept: Tensor) -> Tensor:
    """Labels of the kept patches, from one [576, targets] per image: [images, K, targets]."""
    stacked = torch.from_numpy(np.stack(labels))
    return stacked.gather(1, kept[:, :, None].expand(-1, -1, stacked.shape[2]))


class DenseHeads(nn.Module):
    """One linear head per target; thrown away after training."""

    def __init__(self, width: int, targets: Mapping[str, int]) -> None:
        super().__init__()
        self._targets = dict(targets)
        self.head = nn.Linear(width, sum(targets.values()))

    def loss(self, features: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean cross entropy over targets on the chosen patches, and the accuracy per target.

        features [images, K, width], labels [images, K, targets], chosen [images, K] bool.
        """
        sizes, truth = tuple(self._targets.values()), labels[chosen]
        logits = self.head(features[chosen]).float().split(sizes, dim=-1)
        losses = [F.cross_entropy(part, truth[:, i]) for i, part in enumerate(logits)]
        accuracies = {
            name: (part.argmax(-1) == truth[:, i]).float().mean().item()
            for i, (name, part) in enumerate(zip(self._targets, logits, strict=True))
        }
        return torch.stack(losses).mean(), accuracies


def with_some_background(used: Tensor) -> Tensor:
    """The used patches and about as many others: background says little. used: [images, K] bool."""
    return used | (torch.rand(used.shape) < used.float().mean())
