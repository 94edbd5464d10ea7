"""Scenes are drawn as they are described."""

import numpy as np
import pytest

from models.shapes_vlm.scenes import (
    COLOURS,
    GRID_PATCHES,
    NUM_PATCHES,
    PATCH_PX,
    Plate,
    Scene,
    Shape,
    draw_full_scene,
    draw_scene,
)


def patch_pixels(scene: Scene, patch: int) -> np.ndarray:
    """[14, 14, 3] float64."""
    row, column = divmod(patch, GRID_PATCHES)
    top, left = row * PATCH_PX, column * PATCH_PX
    return scene.pixels[top : top + PATCH_PX, left : left + PATCH_PX].astype(float)


def inked_share(scene: Scene, thing: Shape | Plate) -> float:
    """Share of the thing's patches with at least a few pixels of its colour."""
    ink = np.array(COLOURS[thing.colour])
    distances = (np.abs(patch_pixels(scene, patch) - ink).max(-1) for patch in thing.patches)
    return float(np.mean([(distance < 30).sum() >= 5 for distance in distances]))


@pytest.mark.parametrize("seed", range(5))
def test_every_patch_of_a_thing_shows_its_colour(seed: int) -> None:
    scene = draw_full_scene(np.random.default_rng(seed))
    for thing in (*scene.shapes, *scene.plates):
        assert inked_share(scene, thing) == 1.0, thing


@pytest.mark.parametrize("seed", range(5))
def test_unused_patches_hold_background_only(seed: int) -> None:
    scene = draw_full_scene(np.random.default_rng(seed))
    unused = sorted(set(range(NUM_PATCHES)) - set(scene.used_patches))
    # The grain is uniform in [-9, 9]; anything drawn would spread a patch much further.
    assert max(np.ptp(patch_pixels(scene, patch), axis=(0, 1)).max() for patch in unused) <= 22


def test_things_never_overlap_and_stand_on_different_rows() -> None:
    for seed in range(20):
        scene = draw_scene(np.random.default_rng(seed), num_shapes=10, num_plates=4)
        assert len(scene.used_patches) == len(set(scene.used_patches)) == 10 * 4 + 4 * 12
        for things in (scene.shapes, scene.plates):
            rows = [thing.row for thing in things]
            assert rows == sorted(set(rows))
        assert len({shape.name for shape in scene.shapes}) == 10
        assert len({plate.colour for plate in scene.plates}) == 4


def test_the_same_seed_draws_the_same_pixels_and_another_seed_others() -> None:
    first, again, other = (draw_full_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first.pixels, again.pixels)
    assert (first.shapes, first.plates) == (again.shapes, again.plates)
    assert not np.array_equal(first.pixels, other.pixels)


def test_too_many_things_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 10 shapes and 4 plates"):
        draw_scene(np.random.default_rng(0), num_shapes=11, num_plates=1)
