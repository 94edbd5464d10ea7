"""Prompts of every shape through preprocessing and the prefill pass, against transformers' own forward."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch

from prefill_worker.compression.attention import LayerAttention
from prefill_worker.compression.statistics import Statistic
from prefill_worker.engine.engine import PrefillEngine
from shared.model.loading import load_prefill_model
from tests.families.chats import CHATS, QUESTION, SMALL, TALL, WIDE, asked, images_of
from tests.families.family import HEAD_DIM, KV_HEADS, LAYERS, QUERY_HEADS, Family
from tests.families.prefilling import CPU, Prefilling, close

every_chat = pytest.mark.parametrize("kind", CHATS)


@every_chat
def test_a_prompt_is_what_the_familys_processor_makes(prefilling: Prefilling, kind: str) -> None:
    prompt, expected = prefilling.prompt(CHATS[kind]), prefilling.expected(CHATS[kind])
    assert torch.equal(prompt.inputs["input_ids"][0], expected.input_ids)
    visual = expected.input_ids == prefilling.loaded.model.config.image_token_id
    assert torch.equal(prompt.shape.visual, visual)
    assert len(prompt.images) == len(prompt.grids) == len(images_of(CHATS[kind]))


@every_chat
def test_the_pass_is_the_models_own(prefilling: Prefilling, kind: str) -> None:
    found, expected = prefilling.run(CHATS[kind]), prefilling.expected(CHATS[kind])
    assert close(found.logits, expected.logits)
    assert len(found.keys) == LAYERS
    for key, value, its_key, its_value in zip(found.keys, found.values, expected.keys, expected.values, strict=True):
        assert key.shape[0] == KV_HEADS
        assert close(key, its_key)
        assert close(value, its_value)


@every_chat
def test_positions_go_on_where_the_model_would(family: Family, prefilling: Prefilling, kind: str) -> None:
    prompt, model = prefilling.prompt(CHATS[kind]), prefilling.loaded.model.model
    ids, tokens = prompt.inputs["input_ids"], prompt.shape.num_tokens
    if not family.mrope:
        assert torch.equal(prompt.position_ids, torch.arange(tokens)[None])
        assert prompt.next_position == tokens
        return
    positions, delta = model.get_rope_index(
        ids, mm_token_type_ids=prompt.shape.visual[None].int(), image_grid_thw=prompt.inputs.get("image_grid_thw")
    )
    assert torch.equal(prompt.position_ids[1:], positions)
    assert torch.equal(prompt.position_ids[0, 0], torch.arange(tokens))
    assert prompt.next_position == tokens + delta.item()


@every_chat
def test_grids_are_all_of_the_visual_tokens_or_none(family: Family, prefilling: Prefilling, kind: str) -> None:
    prompt = prefilling.prompt(CHATS[kind])
    places = [range(grid.first_token, grid.first_token + grid.rows * grid.columns) for grid in prompt.grids]
    visual = prompt.shape.visual.nonzero().flatten().tolist()
    assert [place for image in places for place in image] == ([] if family.tiles else visual)


def test_a_grid_has_the_shape_of_its_image(family: Family, prefilling: Prefilling) -> None:
    if family.tiles:
        pytest.skip("no grid")
    (grid,) = prefilling.prompt(CHATS["tiles"]).grids
    assert (grid.columns > grid.rows) == family.mrope
    # LLaVA's processor cuts out the middle of an image
    assert grid.box == ((0.25, 0, 0.75, 1) if family.name == "llava" else (0, 0, 1, 1))


def test_the_pass_in_bfloat16_is_as_precise_as_that(prefilling: Prefilling) -> None:
    model = load_prefill_model(prefilling.loaded.folder, dtype=torch.bfloat16, device=CPU)
    found = PrefillEngine(model).prefill(prefilling.prompt(CHATS["several images"]), (), threading.Event())
    expected = prefilling.expected(CHATS["several images"])
    assert found.keys[0].dtype == torch.bfloat16
    assert (found.logits - expected.logits).norm() < 0.1 * expected.logits.norm()


def test_a_text_after_an_image_begins_anew(prefilling: Prefilling) -> None:
    """Models remember how far positions were shifted."""
    fresh = prefilling.expected(CHATS["text"])
    prefilling.run(CHATS["several images"])
    found = prefilling.run(CHATS["text"])
    assert close(found.logits, fresh.logits)


def test_each_image_is_encoded_alone(prefilling: Prefilling) -> None:
    """What is known of images in one prompt serves any other that shows as many."""
    engine, cancelled = prefilling.keeping(), threading.Event()
    engine.prefill(prefilling.prompt(asked(TALL, SMALL, QUESTION)), (), cancelled)
    for chat, known in ((asked("One:", SMALL, "and:", TALL, "Compare."), 2), (asked(WIDE, SMALL, QUESTION), 1)):
        found = engine.prefill(prefilling.prompt(chat), (), cancelled)
        engine.features.check_integrity()
        assert (found.known_images, found.known_tokens) == (known, 0)
        assert close(found.logits, prefilling.expected(chat).logits)


def test_another_question_about_known_images_passes_alone(prefilling: Prefilling) -> None:
    engine, cancelled = prefilling.keeping(), threading.Event()
    first = prefilling.prompt(asked(WIDE, QUESTION))
    engine.prefill(first, (), cancelled)
    other = asked(WIDE, "Answer in one word: yes or no.")
    found, expected = engine.prefill(prefilling.prompt(other), (), cancelled), prefilling.expected(other)
    assert first.shape.last_visual is not None
    assert found.known_tokens == first.shape.last_visual + 1
    assert close(found.logits, expected.logits)
    for key, its_key in zip(found.keys, expected.keys, strict=True):
        assert close(key, its_key)


@dataclass(frozen=True)
class PlainQueries(Statistic[torch.Tensor]):
    def measure(self, layer: LayerAttention) -> torch.Tensor:
        assert layer.rotation is not None
        return layer.rotation.undo(layer.query)


def test_every_layers_rotation_can_be_taken_off(prefilling: Prefilling) -> None:
    seen: list[torch.Tensor] = []

    def project(_: object, __: object, output: torch.Tensor) -> None:
        # a norm of heads comes before or after these come before tokens
        before = output.dim() == 4 and output.shape[1] == QUERY_HEADS
        seen.append(output[0] if before else output.reshape(-1, QUERY_HEADS, HEAD_DIM).transpose(0, 1))

    attentions = [layer.self_attn for layer in prefilling.model.get_decoder().layers]
    hooks = [getattr(each, "q_norm", each.q_proj).register_forward_hook(project) for each in attentions]
    measured = prefilling.run(CHATS["several images"], [PlainQueries()]).measured
    for hook in hooks:
        hook.remove()
    for layer, expected in zip(measured, seen, strict=True):
        assert close(layer[PlainQueries()], expected, 1e-4)
