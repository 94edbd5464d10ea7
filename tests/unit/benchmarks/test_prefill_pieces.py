"""The benchmark of prompts in pieces."""

from __future__ import annotations

from benchmarks.prefill_pieces import PrefillPiecesConfig, measure
from tests.unit.benchmarks.tiny_models import SIZES


def test_figures() -> None:
    found = measure(PrefillPiecesConfig(**SIZES, prompt=90, rows=10, pieces=(0, 32), rounds=2))
    assert list(found["peak_activation_bytes"]) == list(found["percentiles_ms"]) == [0, 32]
    assert all(figures["p50"] > 0 for figures in found["percentiles_ms"].values())
    # fp32 keys and values of 3 layers with one head
    assert found["kv_bytes"] == 2 * 3 * 90 * 128 * 4
