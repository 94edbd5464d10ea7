"""Small parcels."""

from __future__ import annotations

import random
from typing import Any

from shared.kv.arena import Arena
from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest, TransferId, body_digest
from shared.kv.transport.base import Parcel
from shared.request.sampling import Sampling

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")


def manifest_of(body: bytes | memoryview, **changes: Any) -> Manifest:
    """A valid manifest for a body whose rows all lie in the first layer's first head but for one in each other."""
    heads = LAYOUT.num_layers * LAYOUT.num_kv_heads
    rows = len(body) // (2 * LAYOUT.row_bytes)
    values: dict[str, Any] = {
        "transfer": TransferId(request_id="r-1", attempt=1, prefill_epoch="e-1"),
        "model": "toy",
        "compatibility": "abc",
        "layout": LAYOUT,
        "num_kept": (rows - (heads - 1), *[1] * (heads - 1)),
        "logical_length": 1 << 20,
        "next_position": 1 << 20,
        "policy": "vl_cache",
        "requested_retention": 0.1,
        "realised_retention": 0.1,
        "layer_attention_mass": (0.5, 0.25),
        "body_bytes": len(body),
        "digest": body_digest(memoryview(body)),
        "generated": (7,),
        "sampling": Sampling(max_new_tokens=4, temperature=0.5, seed=3, stop=("x",)),
    }
    return Manifest(**(values | changes))


def parcel_in(arena: Arena, nbytes: int, seed: int = 0) -> Parcel:
    """A parcel of random bytes in a slot of the arena."""
    assert nbytes % (2 * LAYOUT.row_bytes) == 0
    slot = arena.allocate(nbytes)
    assert slot is not None
    body = arena.view(slot, nbytes)
    body[:] = random.Random(seed).randbytes(nbytes)
    return Parcel(manifest=manifest_of(body), body=body, slot=slot)
