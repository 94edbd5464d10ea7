"""Kept features of images: the same pass bit for bit, for one tenant alone, within their memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.engine.content_cache import ContentCache
from prefill_worker.engine.content_key import ContentKeys
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from shared.model.loading import load_prefill_model
from tests.unit.decode_worker.tiny import VISUAL_TOKENS
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, raw_prompt, user

FEATURE_BYTES = VISUAL_TOKENS * 32 * 4


@pytest.fixture
def towers(engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the vision tower was shown."""
    shown: list[torch.Tensor] = []
    original = type(engine._model).get_image_features

    def counted(model: object, pixel_values: torch.Tensor, **others: object) -> object:
        shown.append(pixel_values)
        return original(model, pixel_values, **others)

    monkeypatch.setattr(type(engine._model), "get_image_features", counted)
    return shown


def caching(engine: PrefillEngine, images: float = 100) -> PrefillEngine:
    return PrefillEngine(engine._model, vision_cache_bytes=int(images * FEATURE_BYTES))


def asked(builder: PromptBuilder, *images: int, tenant: str = "", question: str = QUESTION) -> Prompt:
    files = [encoded(picture(seed)) for seed in images]
    return builder.build([user(*files, question)], max_new_tokens=1, tenant=tenant)


def run(engine: PrefillEngine, prompt: Prompt) -> Prefilled:
    done = engine.prefill(prompt, (), threading.Event())
    engine.features.check_integrity()
    return done


def same(one: Prefilled, other: Prefilled) -> bool:
    pairs = zip((one.logits, *one.keys, *one.values), (other.logits, *other.keys, *other.values), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_a_known_image_gives_the_same_pass_bit_for_bit(
    engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]
) -> None:
    prompt, keeps = asked(builder, 1), caching(engine)
    plain, first, again = run(engine, prompt), run(keeps, prompt), run(keeps, asked(builder, 1))
    assert same(plain, first)
    assert same(plain, again)
    assert [plain.known_images, first.known_images, again.known_images] == [0, 0, 1]
    assert len(towers) == 2
    assert keeps.features.used_bytes == FEATURE_BYTES
    assert engine.features.used_bytes == 0


def test_another_question_about_a_known_image_is_another_pass(
    engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]
) -> None:
    keeps = caching(engine)
    run(keeps, asked(builder, 1))
    found = run(keeps, asked(builder, 1, question="Red?"))
    assert same(found, run(engine, asked(builder, 1, question="Red?")))
    assert found.known_images == 1


def test_only_new_images_are_encoded(engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]) -> None:
    keeps = caching(engine)
    run(keeps, asked(builder, 1, 2))
    prompt = asked(builder, 3, 2, 1)
    towers.clear()
    found = run(keeps, prompt)
    assert found.known_images == 2
    (shown,) = towers
    assert torch.equal(shown, prompt.inputs["pixel_values"][:1])
    assert same(found, run(engine, prompt))


def test_the_same_image_twice_in_a_prompt_is_encoded_once(
    engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]
) -> None:
    prompt = asked(builder, 1, 1)
    found = run(caching(engine), prompt)
    assert (found.known_images, len(towers)) == (1, 1)
    assert same(found, run(engine, prompt))


def test_tenants_share_nothing(engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]) -> None:
    keeps = caching(engine)
    for tenant in ("", "a", "b", "a", "aa"):
        run(keeps, asked(builder, 1, tenant=tenant))
    assert len(towers) == 4
    assert keeps.features.used_bytes == 4 * FEATURE_BYTES


def test_the_longest_unused_image_leaves_first(
    engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]
) -> None:
    keeps = caching(engine, images=2.5)
    known = [run(keeps, asked(builder, image)).known_images for image in (1, 2, 1, 3, 1, 2, 3)]
    #                                                                      2 leaves, then 3
    assert known == [0, 0, 1, 0, 1, 0, 0]
    assert keeps.features.used_bytes == 2 * FEATURE_BYTES


def test_what_does_not_fit_is_not_kept(
    engine: PrefillEngine, builder: PromptBuilder, towers: list[torch.Tensor]
) -> None:
    keeps = caching(engine, images=0.9)
    assert [run(keeps, asked(builder, 1)).known_images for _ in range(2)] == [0, 0]
    assert keeps.features.used_bytes == 0


def test_a_cancelled_prompt_encodes_no_further_image(
    engine: PrefillEngine, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps, cancelled, seen = caching(engine), threading.Event(), list[int]()
    encode = keeps._vision._encode

    def cancelling(image: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(1)
        cancelled.set()
        return encode(image)

    monkeypatch.setattr(keeps._vision, "_encode", cancelling)
    with pytest.raises(RequestCancelledError, match="before an image"):
        keeps.prefill(asked(builder, 1, 2), (), cancelled)
    assert len(seen) == 1
    keeps.features.check_integrity()


def test_features_and_places_must_agree(engine: PrefillEngine, builder: PromptBuilder) -> None:
    prompt = asked(builder, 1)
    ids = prompt.inputs["input_ids"][0].tolist()
    short = raw_prompt(ids, prompt.shape, pixel_values=prompt.inputs["pixel_values"].repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="image features"):
        run(engine, short)


def test_half_precision_features_are_kept_as_they_are(checkpoint: Path, builder: PromptBuilder) -> None:
    model = load_prefill_model(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"))
    keeps, prompt = PrefillEngine(model, vision_cache_bytes=1 << 20), asked(builder, 1)
    assert same(run(keeps, prompt), run(keeps, prompt))
    assert keeps.features.used_bytes == FEATURE_BYTES // 2


def test_a_key_covers_tenant_run_values_shape_and_kind() -> None:
    keys = ContentKeys()
    image = torch.arange(24, dtype=torch.float32).view(1, 2, 3, 4)
    base = keys.of_image("t", {"pixel_values": image})
    assert base == keys.of_image("t", {"pixel_values": image.clone()})
    assert base == keys.of_image("t", {"pixel_values": image.mT.contiguous().mT}), "however it lies in memory"
    changed = image.clone()
    changed[0, 1, 2, 3] += 1e-6 * 23
    others = [
        keys.of_image("u", {"pixel_values": image}),
        keys.of_image("", {"pixel_values": image}),
        ContentKeys().of_image("t", {"pixel_values": image}),
        keys.of_image("t", {"pixel_values": changed}),
        keys.of_image("t", {"pixel_values": image.view(1, 2, 4, 3)}),
        keys.of_image("t", {"pixel_values": image.view(torch.int32)}),
        keys.of_image("t", {"pixel_values": image, "image_sizes": torch.tensor([[3, 4]])}),
        keys.of_image("t", {"other": image}),
    ]
    assert len({base, *others}) == len(others) + 1


OPERATIONS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 6)), max_size=60)


@given(capacity=st.integers(0, 12), operations=OPERATIONS)
def test_the_cache_is_a_bounded_least_recently_used_one(capacity: int, operations: list[tuple[int, int]]) -> None:
    """Against a naive one, in units of four bytes."""
    cache, naive = ContentCache[torch.Tensor](4 * capacity), OrderedDict[int, torch.Tensor]()
    for name, size in operations:
        key, found = bytes([name]), cache.get(bytes([name]))
        if name in naive:
            assert found is not None
            assert torch.equal(found, naive[name])
            naive.move_to_end(name)
            continue
        assert found is None
        made = torch.full((size,), float(name))
        cache.put(key, made)
        if size <= capacity:
            naive[name] = made
        while sum(map(len, naive.values())) > capacity:
            naive.popitem(last=False)
        cache.check_integrity()
        assert cache.used_bytes == 4 * sum(map(len, naive.values()))
