"""A manifest for tests that do not care what is in it."""

from typing import Any

from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest, TransferId, body_digest
from shared.request.sampling import Sampling

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")


def manifest(body: bytes = bytes(4 * 2 * 32), **changes: Any) -> Manifest:
    """One kept token per layer and head."""
    values: dict[str, Any] = {
        "transfer": TransferId(request_id="r", attempt=1, prefill_epoch="e"),
        "model": "m",
        "compatibility": "same",
        "layout": LAYOUT,
        "num_kept": (1,) * 4,
        "logical_length": 10,
        "next_position": 10,
        "policy": "vl_cache",
        "requested_retention": 0.1,
        "realised_retention": 0.1,
        "layer_attention_mass": (0.5, 0.5),
        "body_bytes": len(body),
        "digest": body_digest(memoryview(body)),
        "generated": (5,),
        "sampling": Sampling(max_new_tokens=8),
    }
    return Manifest(**(values | changes))
