"""What a router reserves by, and how images are told apart, by the sizes of images alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prefill_worker.preprocess.image_counts import ImageBound, image_views
from prefill_worker.preprocess.images import MAX_PIXELS
from tests.families.chats import QUESTION, asked
from tests.families.family import Family
from tests.families.loaded import noise
from tests.families.prefilling import Prefilling

Size = tuple[int, int]

SIZES: list[list[Size]] = [[(8, 8), (8, 9)], [(200, 8), (31, 90)], [(150, 150), (10, 200), (57, 56)]]
SMALL_SIZE = st.tuples(st.integers(8, 200), st.integers(8, 200))
ANY_SIZE = st.tuples(st.integers(8, 9000), st.integers(8, 9000)).filter(lambda size: max(size) <= 200 * min(size))


@pytest.fixture(scope="session")
def bounds(prefilling: Prefilling) -> list[ImageBound]:
    return prefilling.builder.processing.image_bounds()


def test_bounds_rise_up_to_the_largest_image(family: Family, bounds: list[ImageBound]) -> None:
    assert bounds == sorted(set(bounds))
    assert bounds[-1].pixels == MAX_PIXELS
    assert len({bound.visual_tokens for bound in bounds}) == len(bounds)
    # tiles are cut of images that were made larger before
    assert family.tiles or (len(bounds) > 1) == family.mrope


@pytest.mark.parametrize("sizes", SIZES)
def test_a_prompt_is_within_the_bounds(prefilling: Prefilling, bounds: list[ImageBound], sizes: list[Size]) -> None:
    text = prefilling.prompt(asked(QUESTION)).shape
    shape = prefilling.prompt(asked(*(Image.new("RGB", size) for size in sizes), QUESTION)).shape
    markers = prefilling.builder.processing.marker_tokens()
    assert shape.num_visual <= sum(bound_of(bounds, size) for size in sizes)
    assert shape.num_tokens - shape.num_visual <= text.num_tokens + len(sizes) * markers


@settings(max_examples=100, deadline=None)
@given(size=ANY_SIZE | SMALL_SIZE)
def test_no_image_has_more_tokens_than_its_bound(prefilling: Prefilling, bounds: list[ImageBound], size: Size) -> None:
    told = prefilling.loaded.processor._get_num_multimodal_tokens(image_sizes=[size])
    assert told.num_image_tokens[0] <= bound_of(bounds, size)


def bound_of(bounds: list[ImageBound], size: Size) -> int:
    """As a router finds it."""
    pixels = size[0] * size[1]
    return next((bound.visual_tokens for bound in bounds if pixels <= bound.pixels), bounds[-1].visual_tokens)


@pytest.mark.parametrize("sizes", SIZES)
def test_each_image_has_its_own_rows(prefilling: Prefilling, sizes: list[Size]) -> None:
    images = [noise(*size, seed=at) for at, size in enumerate(sizes)]
    prompt = prefilling.prompt(asked(*images, QUESTION))
    assert image_views(prefilling.loaded.processor, sizes) == prompt.views
    if "batch_num_images" in prompt.inputs:
        # several images are shown otherwise than one
        return
    for rows, image in zip(prompt.images, images, strict=True):
        (alone,) = prefilling.prompt(asked(image, QUESTION)).images
        assert rows.keys() == alone.keys()
        assert all(torch.equal(rows[name], alone[name]) for name in rows)
