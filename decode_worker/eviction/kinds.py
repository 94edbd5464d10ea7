"""From what a parcel says to the rule that does it."""

from __future__ import annotations

import numpy as np

from decode_worker.eviction.fixed_slot import FixedSlotRule
from decode_worker.eviction.heavy_hitters import HeavyHittersRule
from decode_worker.eviction.ledger import RowLedger
from decode_worker.eviction.recall import RecallRule
from decode_worker.eviction.rule import Rule
from decode_worker.eviction.scope import ScopeRule
from decode_worker.eviction.shared_layers import SharedLayersRule
from decode_worker.eviction.sparse_read import SparseReadRule
from decode_worker.eviction.text_guard import TextGuardRule
from shared.kv.eviction import FixedSlot, HeavyHitters, Recall, Scope, SharedLayers, SparseRead, TextGuard
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
        case Recall():
            return RecallRule(eviction, kept)
        case Scope():
            return ScopeRule(eviction, kept)
        case TextGuard():
            return TextGuardRule(eviction, kept, prompt_tokens)
        case SparseRead():
            return SparseReadRule(eviction, kept)
        case SharedLayers():
            return SharedLayersRule(eviction, kept)
    return None


def opened(manifest: Manifest, body: memoryview) -> tuple[memoryview, RowLedger | None]:
    """The rows of a plain parcel body, and what its sequence evicts by."""
    rule, rows_end = rule_of(manifest), len(body) - manifest.score_bytes
    scores = np.frombuffer(body[rows_end:], dtype="<f4") if manifest.score_bytes else None
    return body[:rows_end], None if rule is None else RowLedger.begin(rule, scores)
