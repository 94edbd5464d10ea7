"""Passes that a policy changes: the same numbers as a pass written out with masks, and less computed."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prefill_worker.compression.pipeline import select_tokens, sparse_prefill_for, statistics_for
from prefill_worker.compression.policies.fast_v import FastV
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policies.zip_vl import ZipVL
from prefill_worker.compression.policy import Policy
from prefill_worker.compression.prompt_shape import PromptShape
from prefill_worker.compression.rows import probe_rows
from prefill_worker.compression.sparse.fast_v import LastRow
from prefill_worker.engine.engine import Prefilled, PrefillEngine
from prefill_worker.engine.sparse_pass import with_own_layers
from prefill_worker.prompt import Prompt, PromptBuilder
from shared.errors import RequestCancelledError
from shared.model.attention import PREFILL_ATTENTION
from shared.model.loading import load_prefill_model
from shared.model.packing import pack_linears
from shared.request.params import Budget, BudgetScope
from tests.unit.decode_worker.tiny import KV_HEADS, LAYERS, load_whole
from tests.unit.prefill_worker.compression.observing import positions, prompt_shape
from tests.unit.prefill_worker.naive_pass import NaivePass, Rule, naive_pass
from tests.unit.prefill_worker.naive_sparse import NaiveFastV, NaiveZipVL
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture, raw_prompt, user

CLOSE = {"rtol": 5e-4, "atol": 5e-4}
TOKENS = 200
SHAPES = {
    "image first": prompt_shape(TOKENS, range(3, 150), seed=1),
    "image last": prompt_shape(TOKENS, range(40, TOKENS), seed=2),
    "two images": prompt_shape(TOKENS, [*range(5, 60), *range(80, 170)], seed=3),
}
every_shape = pytest.mark.parametrize("kind", SHAPES)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Any:
    return load_whole(checkpoint, dtype=torch.float64)


def pretended(kind: str) -> Prompt:
    """Random words, some of which the policy takes for an image's."""
    words = random.Random(len(kind))
    return raw_prompt([words.randrange(3, 200) for _ in range(TOKENS)], SHAPES[kind])


def embeddings(model: Any, prompt: Prompt) -> torch.Tensor:
    with torch.inference_mode():
        inputs = {name: part.double() if part.is_floating_point() else part for name, part in prompt.inputs.items()}
        return model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[0][0]


def sparse_pass(
    engine: PrefillEngine, prompt: Prompt, policy: Policy, budget: Budget, layers: int = LAYERS
) -> Prefilled:
    sparse = sparse_prefill_for(policy, prompt.shape, budget, layers)
    return engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event(), sparse)


def plain_pass(engine: PrefillEngine, prompt: Prompt, policy: Policy) -> Prefilled:
    return engine.prefill(prompt, statistics_for(policy, prompt.shape), threading.Event())


def assert_equal_passes(found: Prefilled, naive: NaivePass) -> None:
    torch.testing.assert_close(found.logits.double(), naive.logits, **CLOSE)
    for layer, present in enumerate(naive.present):
        torch.testing.assert_close(found.keys[layer].double(), naive.keys[layer][:, present], **CLOSE)
        torch.testing.assert_close(found.values[layer].double(), naive.values[layer][:, present], **CLOSE)


@pytest.mark.parametrize("layer", [1, 2])
@every_shape
def test_fast_v_is_a_pass_in_which_nobody_sees_the_dropped(
    engine: PrefillEngine, exact: Any, kind: str, layer: int
) -> None:
    prompt, budget = pretended(kind), Budget(retention=0.8)
    found = sparse_pass(engine, prompt, FastV(layer=layer), budget)
    visual = prompt.shape.visual.tolist()
    room = (int(0.8 * LAYERS * TOKENS) - layer * TOKENS) // (LAYERS - layer)
    images = room - (TOKENS - sum(visual)) - visual[-1]
    naive = naive_pass(exact, embeddings(exact, prompt), NaiveFastV(visual, layer, images))
    assert_equal_passes(found, naive)
    assert len(naive.present[-1]) == room < TOKENS
    assert found.survivors is not None
    assert found.survivors.nonzero().flatten().tolist() == naive.present[-1]
    selections = select_tokens(FastV(layer=layer), found.observed(prompt.shape), budget)
    assert [positions(chosen) for chosen in selections] == [[present] * KV_HEADS for present in naive.present]


@pytest.mark.parametrize("retention", [0.3, 0.5])
def test_fast_v_cuts_the_first_layers_to_survivors_where_they_alone_exceed_the_budget(
    engine: PrefillEngine, exact: Any, retention: float
) -> None:
    prompt, budget = pretended("image first"), Budget(retention=retention)
    kept, text = int(retention * TOKENS), TOKENS - prompt.shape.num_visual
    found = sparse_pass(engine, prompt, FastV(), budget)
    rule = NaiveFastV(prompt.shape.visual.tolist(), 2, kept - text)
    naive = naive_pass(exact, embeddings(exact, prompt), rule)
    assert_equal_passes(found, naive)
    selections = select_tokens(FastV(), found.observed(prompt.shape), budget)
    assert [positions(chosen) for chosen in selections] == [[naive.present[-1]] * KV_HEADS] * LAYERS


@every_shape
@pytest.mark.parametrize("theta", [0.6, 0.9, 0.975])
def test_zip_vl_is_a_pass_in_which_the_important_attend_among_themselves(
    engine: PrefillEngine, exact: Any, kind: str, theta: float
) -> None:
    prompt, budget, policy = pretended(kind), Budget(retention=0.999), ZipVL(theta=theta)
    found = sparse_pass(engine, prompt, policy, budget)
    naive = naive_pass(exact, embeddings(exact, prompt), NaiveZipVL(probe_rows(prompt.shape), theta))
    assert_equal_passes(found, naive)
    selections = select_tokens(policy, found.observed(prompt.shape), budget)
    assert [positions(chosen) for chosen in selections] == [[attended] * KV_HEADS for attended in naive.attended]
    assert all(1 < len(attended) < TOKENS for attended in naive.attended)


@pytest.mark.parametrize("policy", [FastV(image_share=0.5), ZipVL(theta=0.8)])
def test_a_real_image_passes_likewise(
    engine: PrefillEngine, exact: Any, builder: PromptBuilder, policy: Policy
) -> None:
    prompt, budget = builder.build([user(encoded(picture(1)), QUESTION)], max_new_tokens=1), Budget(retention=0.95)
    rule: Rule = NaiveZipVL(range(prompt.shape.num_tokens), 0.8)
    if isinstance(policy, FastV):
        rule = NaiveFastV(prompt.shape.visual.tolist(), 2, 8)
    found = sparse_pass(engine, prompt, policy, budget)
    assert_equal_passes(found, naive_pass(exact, embeddings(exact, prompt), rule))


@every_shape
@pytest.mark.parametrize("policy", [FastV(layer=1), ZipVL(theta=0.9)])
def test_the_attention_that_is_kept_is_that_of_the_pass(
    engine: PrefillEngine, exact: Any, kind: str, policy: Policy
) -> None:
    """What statistics say of a layer is said in positions of the prompt, whoever reached it."""
    prompt = pretended(kind)
    found = sparse_pass(engine, prompt, policy, Budget(retention=0.7))
    rule: Rule = NaiveZipVL(probe_rows(prompt.shape), 0.9)
    if found.survivors is not None:
        images = int((found.survivors & prompt.shape.visual).sum()) - int(prompt.shape.visual[-1])
        rule = NaiveFastV(prompt.shape.visual.tolist(), 1, images)
    naive = naive_pass(exact, embeddings(exact, prompt), rule)
    *_, received = statistics_for(policy, prompt.shape)
    for measured, attention in zip(found.measured, naive.attention, strict=True):
        rows = attention[:, list(received.rows)].sum(dim=1)  # type: ignore[attr-defined]
        wanted = rows.view(KV_HEADS, -1, TOKENS).sum(dim=1)
        torch.testing.assert_close(measured[received].double(), wanted, rtol=1e-3, atol=1e-3)
        if found.survivors is not None:
            last = attention[:, -1].mean(dim=0)
            torch.testing.assert_close(measured[LastRow()].double(), last, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", [FastV(), ZipVL()])
@pytest.mark.parametrize("scope", BudgetScope)
def test_equal_requests_make_equal_passes(engine: PrefillEngine, policy: Policy, scope: BudgetScope) -> None:
    prompt, budget = pretended("two images"), Budget(retention=0.4, scope=scope)
    first, second = (sparse_pass(engine, prompt, policy, budget) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    chosen = [select_tokens(policy, found.observed(prompt.shape), budget) for found in (first, second)]
    assert [positions(one) for one in chosen[0]] == [positions(other) for other in chosen[1]]


def test_dropped_tokens_are_not_computed(engine: PrefillEngine) -> None:
    """Rows that the feed-forward part of each layer sees; every layer shares it with the plain model's."""
    prompt, rows = pretended("image first"), []
    layers = engine._model.get_decoder().layers
    watches = [layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1])) for layer in layers]
    try:
        found = sparse_pass(engine, prompt, FastV(layer=1), Budget(retention=0.6))
    finally:
        for watch in watches:
            watch.remove()
    assert rows == [200, 80, 80], "360 tokens in all"
    assert [key.shape[1] for key in found.keys] == rows


def test_the_plain_pass_stays_bit_by_bit(engine: PrefillEngine) -> None:
    prompt, policy = pretended("image first"), VLCache()
    before = plain_pass(engine, prompt, policy)
    sparse_pass(engine, prompt, FastV(), Budget(retention=0.5))
    after = plain_pass(engine, prompt, policy)
    assert torch.equal(before.logits, after.logits)
    assert all(torch.equal(one, other) for one, other in zip(before.keys, after.keys, strict=True))
    # whoever decodes with this model must not meet a hook
    assert not any(part._forward_pre_hooks for part in engine._model.modules())


def test_the_sparse_model_holds_no_weights_of_its_own(checkpoint: Path) -> None:
    """Nor packed ones, which are no parameters: they lie in modules without children."""
    model = load_prefill_model(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"))
    pack_linears(model)
    own = with_own_layers(model)
    for part, shared in zip(own.modules(), model.modules(), strict=True):
        assert (part is shared) or len(list(part.children()))
    assert all(one is other for one, other in zip(own.parameters(), model.parameters(), strict=True))
    found = sparse_pass(PrefillEngine(model), pretended("image first"), FastV(), Budget(retention=0.7))
    assert found.logits.isfinite().all()


@pytest.mark.parametrize(
    ("policy", "shape"),
    [
        (FastV(), prompt_shape(90)),
        (FastV(), prompt_shape(12, range(2, 8))),
        (FastV(layer=LAYERS), SHAPES["image first"]),
    ],
    ids=["no image", "shorter than the floor", "no deeper layer"],
)
def test_without_a_token_to_drop_fast_v_leaves_the_pass_alone(policy: FastV, shape: PromptShape) -> None:
    assert sparse_prefill_for(policy, shape, Budget(retention=0.3), LAYERS) is None


@pytest.mark.parametrize(("policy", "own"), [(VLCache(), False), (FastV(), True), (ZipVL(), True)])
def test_a_policy_says_whether_it_needs_a_pass_of_its_own(policy: Policy, own: bool) -> None:
    assert policy.needs_own_pass is own


@pytest.mark.parametrize("policy", [FastV(), ZipVL()])
def test_a_cancelled_sparse_pass_ends_before_the_next_layer(
    engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    prompt, cancelled = pretended("image first"), threading.Event()
    sparse = sparse_prefill_for(policy, prompt.shape, Budget(retention=0.5), LAYERS)
    attend = type(sparse).attend
    monkeypatch.setattr(type(sparse), "attend", lambda *args: (cancelled.set(), attend(*args))[1])
    with pytest.raises(RequestCancelledError, match="before layer 1"):
        engine.prefill(prompt, statistics_for(policy, prompt.shape), cancelled, sparse)


def qwen() -> Any:
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=PREFILL_ATTENTION).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("policy", [FastV(), ZipVL(theta=0.9)])
def test_another_family_of_layers_passes_likewise(policy: Policy) -> None:
    """Qwen2: biases, and layers made by other code."""
    model, prompt = qwen(), pretended("two images")
    found = sparse_pass(PrefillEngine(model), prompt, policy, Budget(retention=0.8), layers=4)
    rule: Rule = NaiveZipVL(probe_rows(prompt.shape), 0.9)
    if found.survivors is not None:
        rule = NaiveFastV(prompt.shape.visual.tolist(), 2, int((found.survivors & prompt.shape.visual).sum()))
    model = model.double()
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(prompt.inputs["input_ids"])[0]
    naive = naive_pass(model, embedded, rule)
    torch.testing.assert_close(found.logits.double(), naive.logits, rtol=2e-3, atol=2e-3)
    assert [key.shape[1] for key in found.keys] == [len(present) for present in naive.present]
