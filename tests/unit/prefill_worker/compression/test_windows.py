"""Layers with a window: budgets go where they can be used, and only what is seen is shipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.compression.budget import share_surplus
from prefill_worker.compression.pipeline import Selection, keep_everything, select_tokens
from prefill_worker.compression.registry import POLICIES, build_policy
from prefill_worker.compression.windows import check_policy, seen_bitmaps, seen_parts
from prefill_worker.compute import PrefillCompute
from shared.errors import InvalidRequestError
from shared.kv.layout import KVLayout
from shared.model.support import UnsupportedModelError
from shared.request.params import Budget, BudgetScope
from tests.unit.prefill_worker.compression.observing import observe, positions, prompt_shape, random_attention

WINDOWS = (41, 0, 41, 21)
LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, dtype="float32", windows=WINDOWS)
PLAIN = KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, dtype="float32")
PROMPTS = {
    "image first": prompt_shape(200, range(2, 150), seed=1),
    "image last": prompt_shape(180, range(40, 178), seed=2),
    "text": prompt_shape(190, seed=4),
    "shorter than a window": prompt_shape(30, range(1, 20), seed=5),
}
EVICTING = {"elastic_cache", "h2o", "prefix_kv", "tgv_kv", "d2o", "scope", "tidal_decode"}
REFUSED = EVICTING | {"look_m", "kv_merger", "fast_v", "zip_vl", "kv_sharer"}


def suits(name: str) -> bool:
    try:
        check_policy(build_policy(name, {}), LAYOUT)
    except InvalidRequestError:
        return False
    return True


SERVED = [name for name in POLICIES if suits(name)]


def test_policies_that_know_no_windows_are_refused_with_the_reason() -> None:
    assert set(POLICIES) - set(SERVED) == REFUSED
    for name, stage in (("h2o", "eviction"), ("look_m", "merge"), ("zip_vl", "sparse prefill")):
        with pytest.raises(InvalidRequestError, match=f"{name} cannot be used with this model: its {stage}") as caught:
            check_policy(build_policy(name, {}), LAYOUT)
        assert caught.value.reason == "POLICY_MODEL"
        check_policy(build_policy(name, {}), PLAIN)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("retention", [0.05, 0.4, 0.95])
def test_every_policy_chooses_among_what_is_seen(name: str, kind: str, retention: float) -> None:
    policy, prompt = build_policy(name, {}), PROMPTS[kind]
    layers = [observe(policy, random_attention(prompt, seed=seed)) for seed in range(4)]
    budget = Budget(retention=retention)
    selections = select_tokens(policy, layers, budget, WINDOWS)
    whole = select_tokens(policy, layers, budget)
    for window, selection in zip(WINDOWS, selections, strict=True):
        hidden = prompt.num_tokens - (window - 1) if window else 0
        for kept in positions(selection):
            assert kept
            assert kept[0] >= hidden
    kept = sum(len(tokens) for selection in selections for tokens in positions(selection))
    assert kept <= max(sum(len(tokens) for selection in whole for tokens in positions(selection)), 8)
    parts = seen_parts(selections, LAYOUT, [layer.key for layer in layers])
    assert [positions(part) for part in parts] == [positions(selection) for selection in selections]


def test_a_cascade_is_refused_with_the_reason() -> None:
    identity: Any = SimpleNamespace(layout=LAYOUT)
    nobody: Any = None
    with pytest.raises(UnsupportedModelError, match="cascade is not offered for a model with sliding windows"):
        PrefillCompute(nobody, nobody, nobody, identity, nobody, cascade=True)
    PrefillCompute(nobody, nobody, nobody, identity, nobody)
    identity.layout = PLAIN
    PrefillCompute(nobody, nobody, nobody, identity, nobody, cascade=True)


def test_what_a_window_cannot_hold_goes_to_other_layers() -> None:
    policy, prompt = build_policy("snap_kv", {}), PROMPTS["image first"]
    layers = [observe(policy, random_attention(prompt, seed=seed)) for seed in range(4)]
    kept = [sel.num_kept(2, 200)[0] for sel in select_tokens(policy, layers, Budget(retention=0.3), WINDOWS)]
    # 60 each, of which windows hold 40, 40 and 20: 80 are left for the one that sees everything
    assert kept == [40, 140, 40, 20]
    everything = [sel.num_kept(2, 200)[0] for sel in select_tokens(policy, layers, Budget(retention=0.9), WINDOWS)]
    assert everything == [40, 200, 40, 20]


def test_text_that_is_kept_beside_the_image_ends_with_the_window() -> None:
    policy, prompt = build_policy("vl_cache", {}), PROMPTS["image last"]
    layers = [observe(policy, random_attention(prompt, seed=seed)) for seed in range(4)]
    budget = Budget(retention=0.1, scope=BudgetScope.VISUAL)
    selections = select_tokens(policy, layers, budget, WINDOWS)
    for window, selection in zip(WINDOWS, selections, strict=True):
        text = [token for token in range(180) if not prompt.visual[token] and (not window or token > 180 - window)]
        assert all(set(text) <= set(kept) for kept in positions(selection))


@given(st.data())
def test_a_surplus_is_shared_out_as_far_as_it_goes(data: st.DataObject) -> None:
    caps = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
    wanted = data.draw(st.lists(st.integers(1, 60), min_size=len(caps), max_size=len(caps)))
    kept = share_surplus(wanted, caps)
    assert sum(kept) == min(sum(wanted), sum(caps))
    assert all(min(want, cap) <= tokens <= cap for tokens, want, cap in zip(kept, wanted, caps, strict=True))


def test_without_windows_nothing_changes() -> None:
    selections = [Selection(chosen=torch.ones(2, 5, dtype=torch.bool), attention_mass=1.0), *keep_everything(3)]
    assert seen_parts(selections, PLAIN, [torch.empty(2, 5, 8)] * 4) == selections
    assert seen_bitmaps(selections, PLAIN, 5) == ()


def test_at_retention_one_layers_with_a_window_ship_what_is_seen() -> None:
    parts = seen_parts(keep_everything(4), LAYOUT, [torch.empty(2, 100, 8)] * 4)
    assert parts[1].chosen is None
    assert [positions(parts[layer]) for layer in (0, 2, 3)] == [
        [list(range(100 - seen, 100))] * 2 for seen in (40, 40, 20)
    ]
    assert seen_bitmaps(parts, LAYOUT, 100) == (b"\xff" * 5,) * 4 + (b"\xff\xff\x0f",) * 2
    short = seen_parts(keep_everything(4), LAYOUT, [torch.empty(2, 20, 8)] * 4)
    assert all(part.chosen is None for part in short)
    assert seen_bitmaps(short, LAYOUT, 20) == (b"\xff\xff\x0f",) * 6


def test_what_was_decoded_ahead_moves_the_window() -> None:
    chosen = torch.zeros(2, 100, dtype=torch.bool)
    chosen[:, [61, 63, 99]] = True
    selections = [Selection(chosen=chosen, attention_mass=1.0).followed_by(3)] * 4
    parts = seen_parts(selections, LAYOUT, [torch.empty(2, 103, 8)] * 4)
    assert positions(parts[0])[0] == [63, 99, 100, 101, 102]
    assert positions(parts[1])[0] == [61, 63, 99, 100, 101, 102]
    assert int.from_bytes(seen_bitmaps(parts, LAYOUT, 103)[0], "little") == 0b1111 << 36 | 1
    assert chosen.sum() == 6, "the choice itself stays"
