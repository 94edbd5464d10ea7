"""What the router reserves before a prompt is tokenised is enough for what compression keeps of it, in either scope."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vlcache.v1 import inference_pb2 as pb
from vlcache.worker.v1 import worker_pb2

from prefill_worker.compression.budget import paper_budget, strict_budget
from prefill_worker.compression.pipeline import asked_retention, keep_everything, select_tokens, statistics_for
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policy import TokenBudget
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.engine.engine import PrefillEngine
from prefill_worker.prompt import PromptBuilder
from router.validation import AcceptedRequest, accept
from shared.errors import ServiceError
from shared.model.loading import load_spec
from shared.model.processor import load_processor
from shared.request.params import MIN_KEPT_TOKENS, Budget, BudgetScope
from tests.unit.decode_worker.tiny import CONTEXT, KV_HEADS, LAYERS
from tests.unit.prefill_worker.prompts import encoded, message, picture, user

PICTURE = encoded(picture(1))
# what protobuf strings can hold: everything but lone surrogates
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)
# so many that what stands around them outweighs the slack of the other bounds
MAX_IMAGES = 16
PARTS = st.builds(
    lambda texts, images: [*[PICTURE] * images, *texts],
    st.lists(TEXT, min_size=1, max_size=3),
    st.integers(0, MAX_IMAGES),
)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), PARTS), max_size=2)
SHARES = st.floats(1e-3, 1.0).map(lambda retention: {"retention": retention})
COUNTS = st.integers(1, 300).map(lambda tokens: {"max_kept_tokens": tokens})
SCOPES = st.sampled_from([pb.BUDGET_SCOPE_UNSPECIFIED, pb.BUDGET_SCOPE_CACHE, pb.BUDGET_SCOPE_VISUAL])
BUDGETS = st.builds(lambda budget, scope: pb.CompressionParams(budget_scope=scope, **budget), SHARES | COUNTS, SCOPES)


@pytest.fixture(scope="module")
def builder(checkpoint: Path) -> PromptBuilder:
    return PromptBuilder(load_processor(checkpoint), load_spec(checkpoint, torch.float32), max_images=MAX_IMAGES)


def model(builder: PromptBuilder) -> worker_pb2.ServedModel:
    return worker_pb2.ServedModel(
        name="tiny",
        context_tokens=CONTEXT,
        max_images=MAX_IMAGES,
        template_tokens=builder.processing.template_tokens(),
        max_tokens_per_image=builder.processing.image_bounds()[-1].visual_tokens + builder.processing.marker_tokens(),
        max_marker_tokens_per_image=builder.processing.marker_tokens(),
        policies=["vl_cache"],
        default_policy="vl_cache",
        default_retention=0.1,
        max_new_tokens=64,
        default_max_new_tokens=16,
    )


def accepted(
    builder: PromptBuilder,
    turns: list[tuple[str, list[str | bytes]]],
    last: list[str | bytes],
    params: pb.CompressionParams,
) -> AcceptedRequest | None:
    """The request as the router takes it; None where router or worker refuses it."""
    messages = [*(message(role, *parts) for role, parts in turns), user(*last)]
    try:
        return accept(pb.GenerateRequest(messages=messages, compression=params), model(builder))
    except ServiceError:
        return None


def most_kept(shape: PromptShape, budget: Budget, densities: list[float]) -> int:
    """Tokens of all layers together that the greediest allocations keep, text of the visual scope included."""
    if asked_retention(shape, budget) >= 1:
        return len(densities) * shape.num_tokens
    scored = shape.num_visual if budget.scope is BudgetScope.VISUAL else shape.num_tokens
    asked = TokenBudget(retention=asked_retention(shape, budget), num_tokens=scored, num_layers=len(densities))
    allocations = [rule(densities, asked, MIN_KEPT_TOKENS) for rule in (strict_budget, paper_budget)]
    return len(densities) * (shape.num_tokens - scored) + max(map(sum, allocations))


@given(TURNS, PARTS, BUDGETS, st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6))
def test_no_prompt_may_keep_more_than_was_reserved(
    builder: PromptBuilder,
    turns: list[tuple[str, list[str | bytes]]],
    last: list[str | bytes],
    params: pb.CompressionParams,
    densities: list[float],
) -> None:
    request = accepted(builder, turns, last, params)
    if request is None:
        return
    try:
        shape = builder.build(request.message.messages, max_new_tokens=1).shape
    except ServiceError:
        return
    budget = Budget.from_proto(request.message.compression, default_retention=0.1)
    assert shape.num_tokens <= request.prompt_tokens_bound
    assert most_kept(shape, budget, densities) <= request.offers[0].kept_tokens_bound * len(densities)


@settings(max_examples=40)
@given(PARTS, BUDGETS, st.sampled_from(["strict", "paper"]))
def test_no_prompt_of_the_model_keeps_more_than_was_reserved(
    builder: PromptBuilder, engine: PrefillEngine, last: list[str | bytes], params: pb.CompressionParams, rule: str
) -> None:
    request = accepted(builder, [], last, params)
    if request is None:
        return
    try:
        prompt = builder.build(request.message.messages, max_new_tokens=1)
    except ServiceError:
        return
    budget, policy = Budget.from_proto(request.message.compression, default_retention=0.1), VLCache(budget=rule)
    selections = keep_everything(LAYERS)
    if asked_retention(prompt.shape, budget) < 1:
        prefilled = engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event())
        selections = select_tokens(policy, prefilled.observed(prompt.shape), budget)
    kept = sum(sum(selection.num_kept(KV_HEADS, prompt.shape.num_tokens)) for selection in selections)
    assert kept <= request.offers[0].kept_tokens_bound * LAYERS * KV_HEADS


@given(
    st.integers(1, 2000),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.integers(0, 2000),
    st.integers(0, 500),
    BUDGETS,
    st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6),
)
def test_bounds_that_are_cut_at_the_context_still_cover_every_prompt_that_fits(
    text: int,
    visual: int,
    more_text: int,
    more_visual: int,
    room: int,
    params: pb.CompressionParams,
    layers: list[float],
) -> None:
    """The router guesses more text and more visual tokens than there are, and cuts the visual ones first."""
    budget, context = Budget.from_proto(params, default_retention=0.1), text + visual + room
    guessed_text = min(text + more_text, context)
    guessed_visual = min(visual + more_visual, context - guessed_text)
    shape = PromptShape(visual=torch.arange(text + visual) < visual)
    bound = budget.kept_tokens_bound(guessed_text, guessed_visual)
    assert most_kept(shape, budget, layers) <= bound * len(layers)
