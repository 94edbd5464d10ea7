"""The tokenizer keeps any text, and the template puts images first."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.shapes_vlm.processor import build_tokenizer
from models.shapes_vlm.questions import TASKS, draw_samples
from models.shapes_vlm.scenes import COLOUR_NAMES, GLYPHS
from models.shapes_vlm.stamps import SHAPE_KINDS

TOKENIZER = build_tokenizer()


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    special = [token for token in TOKENIZER.all_special_tokens if token in text]
    assert special or TOKENIZER.decode(ids) == text


def test_every_word_of_a_task_is_one_token() -> None:
    for word in (*COLOUR_NAMES, *SHAPE_KINDS, "plate", "image", "shapes", "code"):
        assert len(TOKENIZER.tokenize(f" {word}")) == 1, word


def test_codes_stay_character_by_character() -> None:
    for first in GLYPHS:
        for second in GLYPHS:
            assert TOKENIZER.tokenize(first + second) == [first, second]


def test_the_saved_tokenizer_is_the_one_the_code_builds(processor: Any) -> None:
    texts = [text for s in draw_samples(seed=2, count=len(TASKS)) for text in (s.question, s.answer)]
    for text in texts:
        assert processor.tokenizer.encode(text) == TOKENIZER.encode(text)
    assert processor.tokenizer.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_images_come_first_and_the_prompt_ends_with_the_answer_mark(processor: Any, count: int) -> None:
    content = [{"type": "text", "text": "What is it?"}, *([{"type": "image"}] * count)]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    labels = "".join(f"Image {i + 1}:<image>" for i in range(count))
    assert prompt == f"<s><|user|>{labels}What is it?<|assistant|>"


def test_text_alone_and_earlier_turns_are_rendered(processor: Any) -> None:
    turns = [
        {"role": "user", "content": "Grüß Gott 你好"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "user", "content": "And?"},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "<s><|user|>Grüß Gott 你好<|assistant|>Hello.</s><|user|>And?<|assistant|>"


def test_one_image_takes_576_tokens(processor: Any) -> None:
    sample = next(draw_samples(seed=3, count=1))
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[sample.images[0]], text=prompt, add_special_tokens=False, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 576
    assert tuple(inputs["pixel_values"].shape) == (1, 3, 336, 336)
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    assert int((inputs["input_ids"] == processor.tokenizer.bos_token_id).sum()) == 1
