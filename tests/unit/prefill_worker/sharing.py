"""Layers that may share KV, made up."""

from __future__ import annotations

from prefill_worker.compression.layer_sharing import LayerSharing, SharedPair
from prefill_worker.compression.policies.kv_sharer import KVSharer


def sharing(*pairs: tuple[int, int]) -> LayerSharing:
    """Of (borrower, lender), the first to share first."""
    made = tuple(SharedPair(borrower=high, lender=low, distance=1.0, cosine=0.9) for high, low in pairs)
    return LayerSharing(checkpoint="tiny", threshold=0.5, prompts="none", pairs=made)


def sharer(*pairs: tuple[int, int], layers: int = 0, base: str = "vl_cache") -> KVSharer:
    """The policy for a checkpoint of such layers."""
    return KVSharer(layers=layers, base=base).for_checkpoint(sharing(*pairs))
