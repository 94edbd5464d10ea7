from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from shared.model.processor import VIDEO
from tests.families.family import Family
from tests.families.loaded import Loaded, noise

CHATS: dict[str, list[Image.Image]] = {
    "text": [],
    "square": [noise(28, 28)],
    "wide": [noise(112, 56, seed=1)],
    "two": [noise(56, 84, seed=2), noise(28, 40, seed=3)],
}
WITH_IMAGES = [name for name, images in CHATS.items() if images]


def test_a_checkpoint_loads_by_its_folder(family: Family, loaded: Loaded) -> None:
    config = AutoConfig.from_pretrained(loaded.folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder, local_files_only=True)
    generation = GenerationConfig.from_pretrained(loaded.folder, local_files_only=True)
    assert config.model_type == family.name
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(family.image_token)
    assert config.get_text_config().vocab_size == len(tokenizer)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(family.vocabulary.eos)
    assert not any(loaded.loading.values())


def test_the_auto_class_finds_the_processor_of_who_has_no_videos(loaded: Loaded) -> None:
    base = type(loaded.processor).__mro__[1]
    if VIDEO in base.get_attributes():
        pytest.skip("a video processor needs torchvision")
    found = AutoProcessor.from_pretrained(loaded.folder, backend="pil", local_files_only=True)
    assert type(found) is base
    assert found.to_dict() == loaded.processor.to_dict()


def test_weights_are_the_same_in_every_run(family: Family, loaded: Loaded, tmp_path: Path) -> None:
    torch.rand(3)
    family.save(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (loaded.folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_any_text_survives_the_tokenizer(loaded: Loaded) -> None:
    text = "Ein Bild, 一张图片 🙂\n\n  two  spaces"
    tokenizer = loaded.processor.tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("chat", WITH_IMAGES)
@torch.no_grad()
def test_a_prompt_has_one_placeholder_per_feature(loaded: Loaded, chat: str) -> None:
    inputs = loaded.chat(CHATS[chat])
    placeholders = int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())
    features = loaded.features(inputs)
    assert features.shape == (placeholders, loaded.model.config.get_text_config().hidden_size)
    assert torch.isfinite(features).all()


def test_large_images_become_tiles_where_the_family_has_them(family: Family, loaded: Loaded) -> None:
    if family.mrope:
        pytest.skip("images keep their resolution")
    pixels = loaded.chat(CHATS["wide"])["pixel_values"]
    views = pixels.numel() // (3 * 28 * 28)
    assert pixels.shape[-2:] == (28, 28)
    assert (views > 1) == family.tiles


@pytest.mark.parametrize("chat", CHATS)
def test_greedy_answers_are_repeatable_and_not_one_token(loaded: Loaded, chat: str) -> None:
    inputs = loaded.chat(CHATS[chat])
    first = loaded.answer(inputs)
    loaded.answer(loaded.chat([noise(56, 56, seed=9)]))
    assert loaded.answer(inputs) == first
    assert len(set(first)) > 2


@pytest.mark.parametrize("chat", WITH_IMAGES)
@torch.no_grad()
def test_every_image_changes_the_next_token(loaded: Loaded, chat: str) -> None:
    images = CHATS[chat]
    logits = loaded.model(**loaded.chat(images)).logits[0, -1]
    for index, image in enumerate(images):
        others = [*images[:index], noise(*image.size, seed=100 + index), *images[index + 1 :]]
        changed = loaded.model(**loaded.chat(others)).logits[0, -1]
        assert (changed - logits).std() > 0.02 * logits.std()


def grid_positions(start: int, height: int, width: int) -> list[tuple[int, int, int]]:
    return [(start, start + row, start + column) for row in range(height) for column in range(width)]


@pytest.mark.parametrize("chat", CHATS)
def test_positions_are_those_of_a_grid_where_they_have_three_axes(family: Family, loaded: Loaded, chat: str) -> None:
    if not family.mrope:
        assert not hasattr(loaded.model.model, "get_rope_index")
        return
    inputs = loaded.chat(CHATS[chat])
    tokens = inputs["input_ids"][0].tolist()
    merge = loaded.processor.image_processor.merge_size
    grids = [(height // merge, width // merge) for _, height, width in inputs.get("image_grid_thw", torch.empty(0, 3))]
    expected: list[tuple[int, int, int]] = []
    position = 0
    while len(expected) < len(tokens):
        if tokens[len(expected)] == loaded.model.config.image_token_id:
            height, width = (int(side) for side in grids.pop(0))
            expected += grid_positions(position, height, width)
            position += max(height, width)
        else:
            expected.append((position,) * 3)
            position += 1
    positions, delta = loaded.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    assert not grids
    assert positions[:, 0].T.tolist() == [list(axes) for axes in expected]
    assert delta.item() == position - len(tokens)
