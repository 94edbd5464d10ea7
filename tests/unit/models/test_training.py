"""The training pass computes what the model computes, and a few steps lower the loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from models.shapes_vlm.architecture import build_config, build_model
from models.shapes_vlm.processor import ASSISTANT, EOS, build_processor
from models.shapes_vlm.questions import NUM_IMAGES
from models.shapes_vlm.scenes import COLOUR_NAMES, NUM_PATCHES, Scene, draw_full_scene, draw_scene
from models.shapes_vlm.stamps import SHAPE_KINDS
from models.shapes_vlm.training.batches import Conversation, Encoder, keep_patches
from models.shapes_vlm.training.config import TrainingConfig
from models.shapes_vlm.training.curriculum import Difficulty, Step, draw_step
from models.shapes_vlm.training.dense import (
    CONTEXT_TARGETS,
    PATCH_TARGETS,
    DenseHeads,
    context_labels,
    kept_labels,
    patch_labels,
    with_some_background,
)
from models.shapes_vlm.training.forward import TextPass, visual_features
from models.shapes_vlm.training.loop import learning_rate
from models.shapes_vlm.training.state import load_state, save_state
from models.shapes_vlm.training.weights import MasterWeights

PROCESSOR = build_processor()
SIZES = {"text_layers": 2, "text_width": 64, "vision_layers": 1, "vision_width": 32}


def tiny_model() -> LlavaForConditionalGeneration:
    return build_model(build_config(PROCESSOR.tokenizer, **SIZES), seed=0)


def material(*, several_images: bool, all_patches: bool, rows: int) -> Step:
    hard = Difficulty(max_shapes=10, max_plates=4, several_images=float(several_images), all_patches=float(all_patches))
    return draw_step(np.random.default_rng(0), np.random.default_rng(1), hard, rows)


def plain_logits(model: LlavaForConditionalGeneration, scenes: list[Scene], turns: Conversation) -> torch.Tensor:
    """Logits of the conversation's answers by the model itself, from the chat template on: [n, vocabulary]."""
    content: list[dict[str, str]] = [{"type": "image"}] * len(scenes)
    messages: list[dict[str, Any]] = []
    for question in turns:
        content = [*content, {"type": "text", "text": question.text}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": question.answer}]
        content = []
    text = PROCESSOR.apply_chat_template(messages)
    images = [scene.image for scene in scenes]
    inputs = PROCESSOR(images=images, text=text, add_special_tokens=False, return_tensors="pt")
    tokens = inputs["input_ids"][0].tolist()
    start, end = (PROCESSOR.tokenizer.convert_tokens_to_ids(token) for token in (ASSISTANT, EOS))
    inside, predicting = False, []
    for position, token in enumerate(tokens):
        inside = (inside or token == start) and token != end
        if inside:
            predicting.append(position)
    return model(**inputs).logits[0, predicting]


@pytest.mark.parametrize("several_images", [False, True])
def test_logits_equal_the_plain_model_on_the_full_prompt(several_images: bool) -> None:
    model, step = tiny_model(), material(several_images=several_images, all_patches=True, rows=3)
    num_images = len(step.scenes[0])
    encoder = Encoder(PROCESSOR.tokenizer, model.config.image_token_id)
    prefix = encoder.prefix(np.random.default_rng(2), step.scenes, step.num_kept)
    conversations = [[row[0], row[1], (*row[2], *row[3])] for row in step.short]
    group = encoder.questions(conversations, num_images=num_images)
    with torch.no_grad():
        features = visual_features(model, prefix.patches, prefix.kept)
        output = TextPass(model, prefix, [group]).run(features)
        logits, (index,) = output.logits, output.index
        for number, turns in enumerate(conversations[0]):
            mine = logits[(index[:, 0] == 0) & (index[:, 1] == number)]
            torch.testing.assert_close(mine, plain_logits(model, step.scenes[0], turns), atol=1e-4, rtol=1e-4)


def test_dropping_patches_keeps_all_used_ones_and_their_positions() -> None:
    scene = draw_full_scene(np.random.default_rng(4))
    kept = keep_patches(np.random.default_rng(5), scene, 112)
    assert len(set(kept.tolist())) == 112
    assert set(scene.used_patches) <= set(kept.tolist())
    encoder = Encoder(PROCESSOR.tokenizer, PROCESSOR.image_token_id)
    prefix = encoder.prefix(np.random.default_rng(5), [[scene, scene]], 112)
    label_length = (int((~prefix.is_image).sum()) - 2) // 2
    starts = prefix.positions[0, prefix.is_image].view(2, 112) - prefix.kept
    assert [len(set(row.tolist())) for row in starts] == [1, 1]
    assert int(starts[1, 0] - starts[0, 0]) == NUM_PATCHES + label_length
    assert encoder.prefix_length(2) == int(starts[1, 0]) + NUM_PATCHES


def test_every_step_fits_its_number_of_images() -> None:
    one = material(several_images=False, all_patches=False, rows=2)
    tasks = {question.task for row in (*one.short, *one.long) for turns in row for question in turns}
    assert {NUM_IMAGES[task] for task in tasks} == {1}
    assert {"list", "codes"} <= tasks
    more = material(several_images=True, all_patches=False, rows=2)
    tasks = {question.task for row in (*more.short, *more.long) for turns in row for question in turns}
    assert 2 <= len(more.scenes[0]) <= 4
    assert tasks <= {"which", "read_in_image"}


def run_steps(model: LlavaForConditionalGeneration, weights: MasterWeights, count: int) -> list[float]:
    encoder, losses = Encoder(PROCESSOR.tokenizer, model.config.image_token_id), []
    step = material(several_images=False, all_patches=False, rows=1)
    prefix = encoder.prefix(np.random.default_rng(6), step.scenes, step.num_kept)
    group = encoder.questions(step.short, num_images=1)
    for _ in range(count):
        features = visual_features(model, prefix.patches, prefix.kept)
        output = TextPass(model, prefix, [group]).run(features)
        loss = torch.nn.functional.cross_entropy(output.logits.float(), group.targets[tuple(output.index[0].T)])
        loss.backward()
        weights.step(5e-3)
        losses.append(loss.item())
    return losses


def test_a_few_steps_lower_the_loss_and_resume_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model()
    weights = MasterWeights(dict(model.named_parameters()))
    losses = run_steps(model, weights, 8)
    assert losses[-1] < 0.7 * losses[0]
    save_state(tmp_path, 8, weights)
    expected = run_steps(model, weights, 2)
    other = tiny_model()
    resumed = MasterWeights(dict(other.named_parameters()))
    assert load_state(tmp_path, resumed) == 8
    assert run_steps(other, resumed, 2) == pytest.approx(expected, rel=1e-3)


def test_labels_say_what_a_patch_holds_and_what_came_before() -> None:
    scene = draw_scene(np.random.default_rng(4), num_shapes=6, num_plates=2)
    shape, above = scene.shapes[3], scene.shapes[2]
    content, colour, _, rank, *_ = patch_labels(scene)[shape.patches[0]]
    assert (SHAPE_KINDS[content - 1], COLOUR_NAMES[colour - 1], rank) == (shape.kind, shape.colour, 4)
    image, order, colour, kind, so_far = context_labels(scene, 1)[shape.patches[-1]]
    assert (image, order, COLOUR_NAMES[colour - 1], SHAPE_KINDS[kind - 1]) == (1, 4, above.colour, above.kind)
    assert so_far == sum(other.colour == shape.colour for other in scene.shapes[:4])
    slots = patch_labels(scene)[list(scene.plates[0].patches), 2]
    assert slots.tolist() == [1, 2, 3, 4, 5, 6] * 2


@pytest.mark.parametrize("targets", [PATCH_TARGETS, CONTEXT_TARGETS])
def test_dense_heads_learn(targets: dict[str, int]) -> None:
    torch.manual_seed(0)
    scenes = [draw_full_scene(np.random.default_rng(seed)) for seed in range(2)]
    per_image = [patch_labels(s) if targets is PATCH_TARGETS else context_labels(s, 0) for s in scenes]
    labels = kept_labels(per_image, torch.arange(NUM_PATCHES).expand(2, -1))
    heads, features = DenseHeads(32, targets), torch.randn(2, NUM_PATCHES, 32)
    chosen = with_some_background(labels[:, :, 1] > 0)
    optimiser = torch.optim.Adam(heads.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss, accuracies = heads.loss(features, labels, chosen)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(accuracies) == set(targets)


def test_the_learning_rate_warms_up_and_decays_once() -> None:
    config = TrainingConfig(out=Path("unused"), steps=1000, dense_steps=100)
    rates = [learning_rate(config, step) for step in range(100, 1000)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.05 * config.learning_rate


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="dense_steps"):
        TrainingConfig(out=Path("unused"), steps=10, dense_steps=10)
