"""Prompts that pass in pieces: logits, KV, what is measured and what is chosen are those of one pass."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefill_worker.compression.cascade import Cascade
from prefill_worker.compression.pipeline import select_tokens, statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.engine.pieces import cut
from shared.errors import RequestCancelledError
from shared.request.params import Budget
from tests.families.chats import CHATS, QUESTION, SMALL, TALL, WIDE, Chat, asked
from tests.families.family import LAYERS, Family
from tests.families.prefilling import Prefilling, close

CHUNK = 13
KINDS = ("text", "tiles", "interleaved")
# one of those whose attention is plainly causal, and the one of masks
TOLD_APART = ("llava", "gemma3")
LONG = "Zebras quiz my jovial fox. " * 3
# the rows that are observed lie in several pieces
OBSERVED: dict[str, Chat] = {"text behind": asked(TALL, SMALL, LONG), "image last": asked(LONG, WIDE)}
# the others change the pass, or look at the answer
PLAIN = [
    policy
    for policy in (build_policy(name, {}) for name in POLICIES)
    if not (policy.look_ahead or policy.needs_own_pass)
]
every_policy = pytest.mark.parametrize("policy", PLAIN, ids=[policy.name for policy in PLAIN])


class PassesCounted:
    """How many tokens each pass of a model has."""

    def __init__(
        self, engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch, after_first: Callable[[], None] = lambda: None
    ) -> None:
        self.tokens: list[int] = []
        forward = type(engine._model).forward

        @functools.wraps(forward)
        def counted(model: Any, **inputs: Any) -> Any:
            self.tokens.append(inputs["position_ids"].shape[-1])
            made = forward(model, **inputs)
            after_first()
            return made

        monkeypatch.setattr(type(engine._model), "forward", counted)


def assert_same(found: Prefilled, wanted: Prefilled) -> None:
    assert close(found.logits, wanted.logits)
    for one, other in zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True):
        assert one.shape == other.shape
        assert close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_kv_are_those_of_one_pass(
    prefilling: Prefilling, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    engine, prompt = prefilling.cutting(CHUNK), prefilling.prompt(CHATS[kind])
    wanted, passes = prefilling.run(CHATS[kind]), PassesCounted(engine, monkeypatch)
    found = engine.prefill(prompt, (), threading.Event())
    assert_same(found, wanted)
    assert sum(passes.tokens) == prompt.shape.num_tokens
    assert len(passes.tokens) > 1
    assert found.peak_kv_bytes == wanted.peak_kv_bytes


def test_an_image_whose_tokens_see_each_other_is_not_cut(family: Family, prefilling: Prefilling) -> None:
    prompt = prefilling.prompt(CHATS["several images"])
    together = family.name == "gemma3"
    assert prefilling.engine._kinds.bidirectional == together
    visual = prompt.shape.visual
    for chunk in range(2, 40):
        pieces = cut(prompt.shape, 0, chunk, whole_images=together)
        cuts = [bool(visual[piece.stop - 1] and visual[piece.stop]) for piece in pieces[:-1]]
        assert not (any(cuts) and together)


@pytest.mark.parametrize("kind", OBSERVED)
@every_policy
def test_every_policy_chooses_the_same(family: Family, prefilling: Prefilling, kind: str, policy: Any) -> None:
    if family.name not in TOLD_APART:
        pytest.skip("as another one")
    prompt, budget = prefilling.prompt(OBSERVED[kind]), Budget(retention=0.3)
    statistics = statistics_for(policy, prompt.shape)
    wanted, found = (
        engine.prefill(prompt, statistics, threading.Event()) for engine in (prefilling.engine, prefilling.cutting(48))
    )
    assert_same(found, wanted)
    chosen, expected = (select_tokens(policy, each.observed(prompt.shape), budget) for each in (found, wanted))
    for one, other in zip(chosen, expected, strict=True):
        assert (one.chosen is None) == (other.chosen is None)
        assert one.chosen is None or torch.equal(one.chosen, other.chosen)


def test_what_follows_a_known_beginning_passes_in_pieces(prefilling: Prefilling) -> None:
    engine, cancelled = prefilling.cutting(11), threading.Event()
    engine.prefill(prefilling.prompt(asked(WIDE, QUESTION)), (), cancelled)
    other = asked(WIDE, LONG)
    found = engine.prefill(prefilling.prompt(other), (), cancelled)
    assert found.known_tokens > 0
    assert_same(found, prefilling.run(other))


@pytest.mark.parametrize("kind", OBSERVED)
def test_looking_ahead_sees_the_same(prefilling: Prefilling, kind: str) -> None:
    prompt, steps = prefilling.prompt(OBSERVED[kind]), 5
    looked = []
    for engine in (prefilling.engine, prefilling.cutting(CHUNK)):
        prefilled, drawn = engine.prefill(prompt, (), threading.Event()), list[int]()

        def draw(logits: torch.Tensor, drawn: list[int] = drawn) -> int:
            drawn.append(int(logits.argmax()))
            return drawn[-1]

        first = draw(prefilled.logits)
        looked.append((engine.look_ahead(prefilled, first, prompt.next_position, steps, draw).ahead, drawn))
    (wanted, expected), (found, drawn) = looked
    assert drawn == expected
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or close(one, other)


def test_a_cascade_passes_at_once(prefilling: Prefilling, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives KV up behind each layer, which needs all of the layer's tokens."""
    if prefilling.spec.layout.windows:
        pytest.skip("not offered")
    engine, prompt, policy = prefilling.cutting(CHUNK), prefilling.prompt(CHATS["tiles"]), VLCache()
    passes = PassesCounted(engine, monkeypatch)
    cascade = Cascade(policy, prompt.shape, Budget(retention=0.3), LAYERS)
    engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event(), cascade=cascade)
    assert passes.tokens == [prompt.shape.num_tokens]


def test_a_prompt_is_cancelled_between_its_pieces(prefilling: Prefilling, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cancelled = prefilling.cutting(CHUNK), threading.Event()
    passes = PassesCounted(engine, monkeypatch, after_first=cancelled.set)
    with pytest.raises(RequestCancelledError):
        engine.prefill(prefilling.prompt(CHATS["tiles"]), (), cancelled)
    assert len(passes.tokens) == 2
