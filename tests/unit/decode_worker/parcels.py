"""Parcels made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shared.kv.layout import KVLayout
from shared.kv.manifest import Manifest, TransferId, body_digest
from shared.request.sampling import Sampling


def body_of(rows: Sequence[Sequence[torch.Tensor]], layout: KVLayout) -> bytearray:
    """The body of a parcel; `rows` holds (K, V), each [kept, head_dim], layer-major per KV head."""
    heads, pieces = layout.num_kv_heads, []
    for layer in range(layout.num_layers):
        for part in range(2):
            pieces += [pair[part] for pair in rows[layer * heads : (layer + 1) * heads]]
    return bytearray(b"".join(piece.contiguous().view(torch.uint8).numpy().tobytes() for piece in pieces))


def manifest_of(layout: KVLayout, num_kept: Sequence[int], body: memoryview | bytearray, **changes: Any) -> Manifest:
    """Describes a body truly, unless `changes` say otherwise."""
    longest = max(num_kept)
    values: dict[str, Any] = {
        "transfer": TransferId(request_id="r", attempt=1, prefill_epoch="prefill"),
        "model": "tiny",
        "compatibility": "same",
        "layout": layout,
        "num_kept": tuple(num_kept),
        "logical_length": longest + 10,
        "next_position": longest + 10,
        "policy": "vl_cache",
        "requested_retention": 0.1,
        "realised_retention": 0.1,
        "layer_attention_mass": (0.5,) * layout.num_layers,
        "body_bytes": len(body),
        "digest": body_digest(memoryview(body)),
        "generated": (5,),
        "sampling": Sampling(max_new_tokens=8, ignore_eos=True),
    }
    return Manifest(**(values | changes))
