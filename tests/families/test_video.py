"""Videos through preprocessing and the prefill pass, against transformers' own models and processors' arithmetic."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.preprocess.families import family_of
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import InvalidRequestError
from tests.families.chats import SMALL, TALL
from tests.families.family import Family
from tests.families.loaded import Loaded
from tests.families.oracle import Oracle
from tests.families.prefilling import Prefilling, close
from tests.families.test_prefill_to_decode import LONG, STEPS, Decoding, check_steps
from tests.families.videos import QUESTION, VIDEO_FAMILIES, frames, known_wrong, own_inputs, sent, user
from tests.unit.decode_worker.test_engine import Recorded

reading = pytest.mark.parametrize("family", VIDEO_FAMILIES, indirect=True)
EIGHT = frames(8)
# frames, and how many follow each other in a second
CLIPS = {"slow": (6, 0.5), "usual": (8, 2.0), "odd": (5, 2.0)}


def built(prefilling: Prefilling, *parts: object) -> Prompt:
    return prefilling.builder.build(user(*parts), max_new_tokens=1)  # type: ignore[arg-type]


def passed(engine: PrefillEngine, prompt: Prompt) -> Prefilled:
    return engine.prefill(prompt, (), threading.Event())


def check_positions(loaded: Loaded, prompt: Prompt, seconds: float) -> None:
    inputs = own_inputs(loaded, prompt, seconds)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    known = {name: inputs[name] for name in names if name in inputs}
    positions, delta = loaded.model.model.get_rope_index(**known)
    assert torch.equal(prompt.position_ids[1:], positions)
    assert prompt.next_position == prompt.shape.num_tokens + delta.item()


@reading
@pytest.mark.parametrize("kind", CLIPS)
def test_the_pass_over_a_video_is_the_models_own(loaded: Loaded, prefilling: Prefilling, kind: str) -> None:
    count, fps = CLIPS[kind]
    prompt = built(prefilling, sent(EIGHT[:count], sample_fps=fps), QUESTION)
    times = prompt.inputs["image_grid_thw"][0, 0].item()
    rule = family_of(loaded.model.config.model_type).video
    assert rule is not None
    # an odd frame too many is left out, or shown twice
    assert times == (count + rule.to_the_end) // 2
    seconds = count / fps / times
    if known_wrong(loaded, seconds):
        pytest.skip("the oldest transformers reads whole seconds")
    check_positions(loaded, prompt, seconds)
    with torch.inference_mode():
        expected = loaded.model(**own_inputs(loaded, prompt, seconds)).logits[0, -1]
    assert close(passed(prefilling.engine, prompt).logits, expected)


@reading
def test_images_and_videos_mix_in_any_order(loaded: Loaded, prefilling: Prefilling) -> None:
    clip = sent(EIGHT, sample_fps=2.0)
    for parts in ((SMALL, clip, TALL, QUESTION), (clip, "then", SMALL, "and", sent(EIGHT[:4]), QUESTION)):
        prompt = built(prefilling, *parts)
        check_positions(loaded, prompt, 1.0)
        with torch.inference_mode():
            expected = loaded.model(**own_inputs(loaded, prompt, 1.0)).logits[0, -1]
        assert close(passed(prefilling.engine, prompt).logits, expected)
        assert len(prompt.grids) == len(prompt.pixels) == sum(not isinstance(part, str | pb.Part) for part in parts)
        ids = prompt.inputs["input_ids"][0]
        for grid in prompt.grids:
            of_image = ids[grid.first_token : grid.first_token + grid.rows * grid.columns]
            assert (of_image == loaded.model.config.image_token_id).all()


@reading
def test_the_window_begins_behind_the_last_visual_token_of_any_kind(loaded: Loaded, prefilling: Prefilling) -> None:
    config = loaded.model.config
    for parts, last in (
        ((SMALL, sent(EIGHT[:4])), config.video_token_id),
        ((sent(EIGHT[:4]), SMALL), config.image_token_id),
    ):
        prompt = built(prefilling, *parts, QUESTION)
        ids = prompt.inputs["input_ids"][0]
        assert prompt.shape.last_visual == (ids == last).nonzero()[-1].item()
        either = (ids == config.image_token_id) | (ids == config.video_token_id)
        assert torch.equal(prompt.shape.visual, either)
        assert not set(prompt.shape.special) & set(either.nonzero().flatten().tolist())


@reading
def test_frames_become_temporal_patches(loaded: Loaded, prefilling: Prefilling) -> None:
    """Against the patches of each frame alone, in which its values come twice."""
    shown, images = frames(4, (56, 56)), loaded.processor.image_processor
    (clip,) = built(prefilling, sent(shown), QUESTION).images
    times, rows, columns = clip["image_grid_thw"][0].tolist()
    found = clip["pixel_values"].numpy().reshape(times, rows * columns, 3, 2, -1)
    for at, frame in enumerate(shown):
        alone = images(images=[frame], return_tensors="np")["pixel_values"].reshape(rows * columns, 3, 2, -1)
        assert np.array_equal(found[at // 2, :, :, at % 2], alone[:, :, 0])


@reading
def test_a_single_frame_fills_a_temporal_patch(loaded: Loaded, prefilling: Prefilling) -> None:
    (shown,) = frames(1, (56, 56))
    (clip,) = built(prefilling, sent([shown]), QUESTION).images
    image = loaded.processor.image_processor(images=[shown], return_tensors="pt")
    assert torch.equal(clip["image_grid_thw"], image["image_grid_thw"])
    assert torch.equal(clip["pixel_values"], image["pixel_values"])


@reading
def test_timestamps_are_the_middle_of_what_a_patch_shows(
    family: Family, loaded: Loaded, prefilling: Prefilling
) -> None:
    text = loaded.processor.tokenizer.decode(built(prefilling, sent(EIGHT), QUESTION).inputs["input_ids"][0])
    said = [f"<{at:.1f} seconds><|vision_start|><|video_pad|>" in text for at in (0.25, 1.25, 2.25, 3.25)]
    assert said == [family.name == "qwen3_vl"] * 4
    assert text.count("<|vision_start|>") == (4 if family.name == "qwen3_vl" else 1)


@reading
def test_a_known_video_is_not_encoded_again(prefilling: Prefilling) -> None:
    engine, first = prefilling.keeping(), built(prefilling, sent(EIGHT[:4]), QUESTION)
    alone = passed(engine, first)
    again = built(prefilling, SMALL, sent(EIGHT[:4]), QUESTION)
    found = passed(engine, again)
    assert (alone.known_images, found.known_images) == (0, 1)
    assert close(found.logits, passed(prefilling.engine, again).logits)


@reading
def test_the_same_frames_at_another_speed_are_another_prompt(family: Family, prefilling: Prefilling) -> None:
    """Qwen2.5-VL's positions tell the speed where its tokens do not."""
    engine = prefilling.keeping()
    slow, fast = (built(prefilling, sent(EIGHT[:4], sample_fps=fps), QUESTION) for fps in (0.1, 2.0))
    passed(engine, slow)
    found = passed(engine, fast)
    assert found.known_images == 1
    assert bool(found.known_tokens) == (family.name == "qwen2_vl")
    assert close(found.logits, passed(prefilling.engine, fast).logits)


@reading
def test_a_video_keeps_within_its_frames_and_tokens(loaded: Loaded, prefilling: Prefilling) -> None:
    """Whatever its shape."""
    prompt = built(prefilling, sent(EIGHT, max_frames=4), QUESTION)
    assert prompt.inputs["image_grid_thw"][0, 0] == 2
    for size in ((300, 200), (640, 40), (40, 640)):
        for most in (32, 40, 64):
            builder = PromptBuilder(
                loaded.processor, prefilling.spec, max_images=1, max_video_frames=4, max_video_tokens=most
            )
            tight = builder.build(user(sent(frames(6, size)), QUESTION), max_new_tokens=1)
            assert tight.inputs["image_grid_thw"][0, 0] == 2
            assert tight.shape.num_visual <= most
            around = tight.shape.num_tokens - tight.shape.num_visual
            plain = builder.build(user(QUESTION), max_new_tokens=1).shape.num_tokens
            assert around <= plain + builder.processing.video_marker_tokens()


@pytest.mark.parametrize("family", ["llava", "internvl", "llava_onevision"], indirect=True)
def test_a_family_that_reads_none_names_those_that_do(prefilling: Prefilling) -> None:
    with pytest.raises(InvalidRequestError, match="qwen2_5_vl, qwen2_vl, qwen3_vl do") as refused:
        prefilling.builder.build(user(QUESTION, pb.Part(video=pb.Video(file=b"x"))), max_new_tokens=1)
    assert refused.value.reason == "VIDEO_MODEL"
    assert not prefilling.builder.processing.reads_videos
    assert prefilling.builder.processing.video_marker_tokens() == 0


@reading
def test_at_retention_a_tenth_logits_are_those_of_a_masked_full_cache(
    prefilling: Prefilling, decoder: Recorded, oracle: Oracle
) -> None:
    prompt = prefilling.builder.build(user(SMALL, sent(EIGHT), LONG), max_new_tokens=STEPS + 1)
    decoding = Decoding(prefilling, decoder)
    manifest, sequence = decoding.bring_prompt(prompt, 0.1)
    assert manifest.realised_retention <= 0.1
    logits = oracle.prefill(own_inputs(prefilling.loaded, prompt, 1.0))
    check_steps(decoding, decoder, oracle, prompt, manifest, sequence, logits)


@reading
def test_a_video_may_pass_in_pieces(prefilling: Prefilling) -> None:
    prompt = built(prefilling, SMALL, sent(EIGHT), QUESTION)
    whole, pieces = passed(prefilling.engine, prompt), passed(prefilling.cutting(7), prompt)
    assert close(pieces.logits, whole.logits)
