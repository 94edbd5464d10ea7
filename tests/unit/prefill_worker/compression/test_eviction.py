"""What policies say of the time after the prompt, and the scores that travel with it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from prefill_worker.compression.eviction import add_scores, eviction_for, parcel_bound
from prefill_worker.compression.pipeline import Selection, keep_everything, select_tokens
from prefill_worker.compression.registry import POLICIES, build_policy
from shared.errors import InvalidRequestError
from shared.kv.eviction import Eviction, FixedSlot, HeavyHitters, Recall, Scope, SparseRead, TextGuard
from shared.kv.layout import KVLayout
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import attention_matrix, observe, prompt_shape, random_attention

LAYERS, HEADS = 3, 2
LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=8, dtype="float32")
# text, image, text
PROMPT = prompt_shape(200, range(10, 170), seed=1)
PROMPTS = {
    "image": PROMPT,
    "image last": prompt_shape(90, range(40, 90), seed=2),
    "text": prompt_shape(120, seed=4),
    "short": prompt_shape(12, range(1, 9), seed=5),
    "one token": prompt_shape(1),
}


def selected(name: str, budget: Budget, kind: str = "image", **parameters: object) -> list[Selection]:
    policy, prompt = build_policy(name, parameters), PROMPTS[kind]
    layers = [random_attention(prompt, seed, num_kv_heads=HEADS, spread=1.0 + 2 * seed) for seed in range(LAYERS)]
    return select_tokens(policy, [observe(policy, layer) for layer in layers], budget)


def eviction(name: str, budget: Budget, kind: str = "image", **parameters: object) -> Eviction | None:
    selections = selected(name, budget, kind, **parameters)
    return eviction_for(build_policy(name, parameters), PROMPTS[kind], budget, selections, HEADS)


def counts(selections: Sequence[Selection], kind: str) -> list[int]:
    return [count for each in selections for count in each.num_kept(HEADS, PROMPTS[kind].num_tokens)]


# those with a pass of their own cannot be observed like this, and say nothing of decoding
OBSERVABLE = [name for name in POLICIES if not build_policy(name, {}).needs_own_pass]
# a budget of visual tokens keeps everything where there are none
SCOPES = [
    (kind, scope)
    for kind, prompt in PROMPTS.items()
    for scope in BudgetScope
    if prompt.num_visual or scope is BudgetScope.CACHE
]


@pytest.mark.parametrize("name", OBSERVABLE)
@pytest.mark.parametrize(("kind", "scope"), SCOPES)
@pytest.mark.parametrize("retention", [0.05, 0.1234567890123456789, 1e-300, 0.999])
def test_it_suits_the_kept_rows(name: str, kind: str, scope: BudgetScope, retention: float) -> None:
    """As the decode worker checks it, after a trip over the wire."""
    budget = Budget(retention=retention, scope=scope)
    made = eviction(name, budget, kind)
    if made is not None:
        made.check(LAYOUT, counts(selected(name, budget, kind), kind))
        assert made.to_proto().SerializeToString()
        assert made.carries_scores == POLICIES[name].carries_scores


EVICTING = ("h2o", "d2o", "elastic_cache", "prefix_kv", "tgv_kv", "scope")


def test_who_goes_on() -> None:
    going = [name for name in OBSERVABLE if eviction(name, Budget(retention=0.1))]
    assert sorted(going) == sorted([*EVICTING, "tidal_decode"])


@pytest.mark.parametrize("name", [*EVICTING, "tidal_decode"])
def test_at_retention_one_nothing_goes(name: str) -> None:
    made = eviction_for(build_policy(name, {}), PROMPT, Budget(retention=1.0), keep_everything(LAYERS), HEADS)
    assert made == (SparseRead(select_layers=(2,), top=256) if name == "tidal_decode" else None)


def test_h2o_goes_on_with_the_budget_of_the_prompt() -> None:
    assert eviction("h2o", Budget(retention=0.29)) == HeavyHitters(budget=58, recent=29)
    assert eviction("h2o", Budget(retention=0.29), recent_share=0.1) == HeavyHitters(budget=58, recent=5)
    assert eviction("h2o", Budget(retention=0.29), kind="short") == HeavyHitters(budget=16, recent=8)


def test_d2o_goes_on_with_the_budget_of_each_layer() -> None:
    made = eviction("d2o", Budget(retention=0.29), recent_share=0.25)
    assert isinstance(made, Recall)
    kept = counts(selected("d2o", Budget(retention=0.29), recent_share=0.25), "image")
    assert made.budget == tuple(kept[::HEADS])
    assert len(set(made.budget)) > 1
    assert made.recent == tuple(rows // 4 for rows in made.budget)
    assert made.sinks == 4


def test_d2o_leaves_one_row_that_may_go() -> None:
    budget = Budget(retention=0.5)
    assert eviction("d2o", budget, "one token") == Recall(budget=(16,) * 3, recent=(8,) * 3, sinks=4)
    everything = {"recent_share": 1.0, "sinks": 16}
    assert eviction("d2o", budget, "short", **everything) == Recall(budget=(16,) * 3, recent=(0,) * 3, sinks=15)


def test_elastic_cache_goes_on_with_exactly_the_share_that_was_asked_for() -> None:
    asked = FixedSlot(retention=(Fraction(29, 100),) * LAYERS, distance=-25)
    assert eviction("elastic_cache", Budget(retention=0.29)) == asked
    # all text, and a tenth of the image
    share = (40 + Fraction(16)) / 200
    visual = eviction("elastic_cache", Budget(retention=0.1, scope=BudgetScope.VISUAL))
    assert visual == FixedSlot(retention=(share,) * LAYERS, distance=-25)


def test_prefix_kv_and_tgv_kv_go_on_layer_by_layer() -> None:
    for name, kind in (("prefix_kv", FixedSlot), ("tgv_kv", TextGuard)):
        made = eviction(name, Budget(retention=0.2))
        assert isinstance(made, kind)
        kept = counts(selected(name, Budget(retention=0.2)), "image")[::HEADS]
        assert made.retention == tuple(Fraction(count, 200) for count in kept)
        assert len(set(kept)) > 1


@pytest.mark.parametrize("kind", ["image", "text", "image last"])
def test_tgv_kv_counts_the_text_after_the_image_that_was_kept(kind: str) -> None:
    made = eviction("tgv_kv", Budget(retention=0.1), kind)
    assert isinstance(made, TextGuard)
    prompt = PROMPTS[kind]
    # without any, the text among the rows that are observed in its place
    first = 170 if kind == "image" else prompt.num_tokens - 50
    for selection, text in zip(selected("tgv_kv", Budget(retention=0.1), kind), made.text, strict=True):
        assert selection.chosen is not None
        kept = [place for place in range(prompt.num_tokens) if selection.chosen[0, place]]
        assert text == sum(place >= first and not prompt.visual[place] for place in kept)
    assert made.sinks == 4


def test_scope_and_tidal_decode_say_what_was_asked_for() -> None:
    asked: dict[str, Any] = {"variant": "adaptive", "decode_window": 9, "decode_recent": 3, "delta": 4}
    made = eviction("scope", Budget(retention=0.1), **asked)
    assert made == Scope(variant="adaptive", window=9, recent=3, delta=4)
    tidal = eviction("tidal_decode", Budget(retention=0.1), first=0, second=2, top=5)
    assert tidal == SparseRead(select_layers=(0, 2), top=5)
    assert eviction("tidal_decode", Budget(retention=0.1), first=7, second=8) is None


def test_scope_keeps_of_the_prompt_what_snap_kv_keeps() -> None:
    ours, theirs = (selected(name, Budget(retention=0.1), window=16) for name in ("scope", "snap_kv"))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.chosen, other.chosen)  # type: ignore[arg-type]


def test_tidal_decode_keeps_the_same_tokens_everywhere() -> None:
    chosen = [each.chosen for each in selected("tidal_decode", Budget(retention=0.1))]
    expected = torch.zeros(HEADS, 200, dtype=torch.bool)
    expected[:, [*range(4), *range(184, 200)]] = True
    assert all(torch.equal(each, expected) for each in chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("scope", {"window": 0}),
        ("scope", {"window": 257}),
        ("scope", {"variant": "jump"}),
        ("scope", {"decode_recent": 0}),
        ("scope", {"decode_window": 8}),
        ("scope", {"decode_window": 1 << 25}),
        ("scope", {"delta": 0}),
        ("tidal_decode", {"first": -1}),
        ("tidal_decode", {"second": 2}),
        ("tidal_decode", {"top": 0}),
        ("tidal_decode", {"sinks": 17}),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match=name):
        build_policy(name, parameters)


def test_scores_are_the_attention_that_kept_tokens_received() -> None:
    policy = build_policy("h2o", {})
    layers = [random_attention(PROMPT, seed, num_kv_heads=HEADS) for seed in range(LAYERS)]
    observed = [observe(policy, layer) for layer in layers]
    selections = select_tokens(policy, observed, Budget(retention=0.1))
    room = memoryview(bytearray(b"\xff" * 2000))
    body = add_scores(policy, observed, selections, room[:100], room)
    assert bytes(body[:100]) == b"\xff" * 100
    expected = []
    for layer, selection in zip(layers, selections, strict=True):
        assert selection.chosen is not None
        sums = attention_matrix(layer).sum(dim=1)
        for head in range(HEADS):
            received = sums[head * layer.group : (head + 1) * layer.group].sum(dim=0)
            expected += [float(received[place]) for place in range(200) if selection.chosen[head, place]]
    np.testing.assert_allclose(np.frombuffer(body[100:], dtype="<f4"), expected, rtol=1e-4)


def test_the_first_tokens_of_d2o_have_scores_like_any_other() -> None:
    policy, layer = build_policy("d2o", {}), random_attention(PROMPT, 1, num_kv_heads=HEADS)
    assert policy.score(observe(policy, layer))[:, :4].isinf().all()
    assert policy.accumulated(observe(policy, layer)).isfinite().all()


def test_only_who_carries_scores_pays_for_them() -> None:
    assert parcel_bound(build_policy("elastic_cache", {}), LAYOUT, 10) == LAYOUT.full_bytes(10)
    assert parcel_bound(build_policy("h2o", {}), LAYOUT, 10) == LAYOUT.full_bytes(10) + 4 * 10 * LAYERS * HEADS
