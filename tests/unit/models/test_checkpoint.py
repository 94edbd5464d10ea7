"""The bundled checkpoint loads plainly, is complete and small, and answers."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from models.shapes_vlm.evaluate import Answerer
from models.shapes_vlm.make_samples import SamplesConfig, make_samples
from models.shapes_vlm.paths import CHECKPOINT, SAMPLES
from models.shapes_vlm.questions import TASKS, Sample, draw_samples

FLOOR = 0.75
"""Least share of right answers on a few fresh questions; the card has the real figures."""


def test_it_loads_with_plain_auto_classes_and_no_weight_is_missing_or_left_over() -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (8, 8, 4)
    assert text.max_position_embeddings >= 4096
    assert model.generation_config.eos_token_id is not None
    assert not model.generation_config.do_sample


def test_it_is_small_enough_to_bundle() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 15e6
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) <= 2e6


def bundled_samples() -> list[Sample]:
    samples = []
    for entry in json.loads((SAMPLES / "samples.json").read_text()):
        images = tuple(Image.open(SAMPLES / name).convert("RGB") for name in entry["images"])
        texts = {key: entry[key] for key in ("task", "question", "answer")}
        samples.append(Sample(images=images, answer_patches=(), **texts))
    return samples


def test_bundled_samples_cover_every_task_and_use_every_image() -> None:
    entries = json.loads((SAMPLES / "samples.json").read_text())
    assert {entry["task"] for entry in entries} == set(TASKS)
    assert any(len(entry["images"]) == 2 for entry in entries)
    assert {name for entry in entries for name in entry["images"]} == {p.name for p in SAMPLES.glob("*.png")}


def test_bundled_samples_are_what_the_documented_command_writes(tmp_path) -> None:
    entries = make_samples(SamplesConfig(out=tmp_path))
    assert entries == json.loads((SAMPLES / "samples.json").read_text())
    for path in SAMPLES.glob("*.png"):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / path.name)))


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_fresh_questions(answerer: Answerer, task: str) -> None:
    samples = list(draw_samples(seed=97, count=4, tasks=[task]))
    right = sum(answer == s.answer for s, answer in zip(samples, answerer.answer(samples), strict=True))
    assert right / len(samples) >= FLOOR


def test_it_answers_most_bundled_samples(answerer: Answerer) -> None:
    samples = bundled_samples()[: len(TASKS)]
    right = sum(answerer.answer([sample])[0] == sample.answer for sample in samples)
    assert right >= 0.8 * len(samples)


def test_the_answer_is_in_the_image_and_not_in_the_text(answerer: Answerer) -> None:
    blank = Image.new("RGB", (336, 336), (200, 200, 200))
    samples = list(draw_samples(seed=98, count=4, tasks=["read"]))
    blinded = [Sample(**{**vars(sample), "images": (blank,)}) for sample in samples]
    answers = answerer.answer(blinded)
    assert all(answer != sample.answer for answer, sample in zip(answers, samples, strict=True))
