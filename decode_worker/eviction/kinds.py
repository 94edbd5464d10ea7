"""From what a parcel says to the rule that does it."""

from __future__ import annotations

import numpy as np

from decode_worker.eviction.fixed_slot import FixedSlotRule
from decode_worker.eviction.heavy_hitters import HeavyHittersRule
from decode_worker.eviction.rule import Rule
from decode_worker.eviction.scope import ScopeRule
from decode_worker.eviction.sparse_read import SparseReadRule
from decode_worker.eviction.text_guard import TextGuardRule
from shared.kv.eviction import FixedSlot, HeavyHitters, Scope, SparseRead, TextGuard
from shared.kv.manifest import Manifest


def rule_of(manifest: Manifest) -> Rule | None:
    """The rule of a parcel's sequence; None keeps and reads everything."""
    layout, eviction, prompt_tokens = manifest.layout, manifest.eviction, manifest.logical_length
    kept = np.array(manifest.num_kept, dtype=np.int64).reshape(layout.num_layers, layout.num_kv_heads)
    match eviction:
        case FixedSlot():
            return FixedSlotRule(eviction, kept, prompt_tokens)
        case HeavyHitters():
            return HeavyHittersRule(eviction, kept)
        case Scope():
            return ScopeRule(eviction, kept)
        case TextGuard():
            return TextGuardRule(eviction, kept, prompt_tokens)
        case SparseRead():
            return SparseReadRule(eviction, kept)
    return None


def scores_in(manifest: Manifest, body: memoryview) -> np.ndarray | None:
    """The scores at a body's end, [sum of kept] fp32; None where the rule does not go by them."""
    if not manifest.score_bytes:
        return None
    return np.frombuffer(body[len(body) - manifest.score_bytes :], dtype="<f4")
